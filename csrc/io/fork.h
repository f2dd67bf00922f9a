// A forked child has the parent's objects and none of its threads: a lock that one of them held never opens. So every
// object made before the fork is dead in the child, where its owner asks here() before it takes any lock.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <mutex>
#include <new>

namespace nf::io {

void handle_forks();  // installs the handlers, once

class Origin {
  public:
    Origin();
    bool here() const;  // made in this process, not before a fork

  private:
    uint64_t forks_;
};

// In the child of a fork: what the parent's threads use is left as it is, by a share that is never given back. It asks
// for no memory, as destructors call it.
template <typename Shared>
void leave_for_ever(const Shared& shared) noexcept {
    alignas(Shared) unsigned char share[sizeof(Shared)];
    new (share) Shared(shared);
}

// For what all threads share: held across every fork, so that no child finds it locked or what it guards half changed.
extern std::mutex survives_fork;

// A descriptor that the child of a fork closes before anything else: a flock lasts until the last copy is closed.
int open_for_this_process(int folder, const char* name, int flags, mode_t mode);
int close_for_this_process(int fd, const char* name);

}  // namespace nf::io
