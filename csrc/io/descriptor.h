// An open descriptor that close() cannot pull away from under a call in another thread, and that is dead in the child
// of a fork.
#pragma once

#include <shared_mutex>
#include <string>

#include "io/fork.h"

namespace nf::io {

class Descriptor {
  public:
    Descriptor(int fd, std::string path, std::string name) noexcept;
    ~Descriptor();
    Descriptor(const Descriptor&) = delete;
    Descriptor& operator=(const Descriptor&) = delete;

    // Holds close() off while it lives.
    class Use {
      public:
        explicit Use(Descriptor& descriptor);  // throws ClosedError
        int fd() const { return fd_; }

      private:
        std::shared_lock<std::shared_mutex> lock_;
        int fd_;
    };

    bool close();  // false, with errno: the last write may be lost; the descriptor is gone either way
    const std::string& path() const { return path_; }
    const char* name() const { return name_.c_str(); }

  private:
    std::shared_mutex closing_;
    Origin origin_;
    int fd_;
    std::string path_, name_;
};

}  // namespace nf::io
