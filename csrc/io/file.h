// Files of one folder, read and written in page-aligned pieces that are complete or an error.
//
// Names have one component and are looked up under the folder's descriptor, so that a path that changes underneath
// cannot lead elsewhere. O_DIRECT where the file system takes it (a buffered copy would evict what the run needs), else
// buffered; `direct()` says which.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <shared_mutex>
#include <string>

namespace nf {

constexpr size_t kPage = 4096;

struct FileStatus {
    uint64_t size, links;
    bool regular;
};

class File {
  public:
    File(int fd, std::string path);
    ~File();
    File(const File&) = delete;
    File& operator=(const File&) = delete;

    void reserve(uint64_t bytes);
    uint32_t write_chunk(uint64_t offset, const uint8_t* data, size_t size);  // returns its CRC32C
    void read(uint64_t offset, uint8_t* data, size_t size);
    int read_chunk(uint64_t offset, uint8_t* data, size_t size, uint32_t expected);  // returns how often it read again
    void fsync();
    void close();
    FileStatus stat();
    bool direct() const { return direct_; }
    const std::string& path() const { return path_; }

  private:
    using Lock = std::shared_lock<std::shared_mutex>;
    Lock in_use();  // holds close() off
    void read_all(uint64_t offset, uint8_t* data, size_t size);
    bool fall_back_to_buffered();
    [[noreturn]] void fail(const char* op, int64_t offset, uint64_t needed, int code);

    std::shared_mutex closing_;
    int fd_;
    std::string path_;
    std::atomic<bool> direct_;
};

class Folder {
  public:
    explicit Folder(std::string path);
    ~Folder();
    Folder(const Folder&) = delete;
    Folder& operator=(const Folder&) = delete;

    std::unique_ptr<File> create(const std::string& name);  // read and write; fails where the name exists
    std::unique_ptr<File> open(const std::string& name);    // read only
    void rename(const std::string& from, const std::string& to);
    void unlink(const std::string& name);
    uint64_t free_bytes();
    void close();
    const std::string& path() const { return path_; }

  private:
    std::unique_ptr<File> open_file(const std::string& name, int flags);
    int fd();
    std::string full(const std::string& name) const { return path_ + "/" + name; }

    std::string path_;
    int fd_;
};

}  // namespace nf
