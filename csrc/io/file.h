// Files of one folder, read and written in pieces that are complete or an error.
//
// Names have one component and are looked up under the folder's descriptor, so that a path that changes underneath
// cannot lead elsewhere. A file of the activation cache moves whole pages by O_DIRECT (a copy in the page cache would
// evict what the run needs); where the file system refuses that it goes through the page cache and its pages are
// dropped a few MiB behind. Any other file is opened with direct = false: buffered, any offset and length.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "io/descriptor.h"
#include "io/direct_probe.h"

namespace nf {

constexpr size_t kPage = 4096;

struct FileStatus {
    uint64_t size, links;
    bool regular, link;    // link: symbolic
    uint32_t owner, mode;  // uid; the permission bits, 07777 of st_mode
};

class File {
  public:
    File(int folder, std::string path, std::string name, int flags, bool paged, bool direct);

    void reserve(uint64_t bytes);
    void truncate(uint64_t bytes);
    void write(uint64_t offset, const uint8_t* data, size_t size);
    uint32_t write_chunk(uint64_t offset, const uint8_t* data, size_t size);  // returns its CRC32C
    void read(uint64_t offset, uint8_t* data, size_t size);
    int read_chunk(uint64_t offset, uint8_t* data, size_t size, uint32_t expected);  // returns how often it read again
    void fsync();
    void close();
    FileStatus stat();
    bool direct() const { return direct_; }
    const std::string& path() const { return descriptor_.path(); }

  private:
    struct Range {
        uint64_t offset;
        size_t size;
    };

    void check(uint64_t offset, const void* data, size_t size) const;
    void write_all(int fd, uint64_t offset, const uint8_t* data, size_t size);
    void read_all(int fd, uint64_t offset, uint8_t* data, size_t size);
    void leave_behind(int fd, uint64_t offset, size_t size, bool written);
    bool fall_back_to_buffered(int fd, bool was_direct);
    [[noreturn]] void fail(int fd, const char* op, int64_t offset, uint64_t needed, int code) const;

    const bool paged_;  // whole pages only, none left in the page cache
    std::mutex behind_mutex_;
    std::deque<Range> behind_;  // moved through the page cache and still there
    uint64_t behind_bytes_ = 0;
    io::Descriptor descriptor_;  // behind all that asks for memory: once there is a new file nothing may fail
    std::atomic<bool> direct_;
};

// An exclusive flock that lasts until release() or its end, and not in the child of a fork.
class FolderLock {
  public:
    FolderLock(int folder, const std::string& folder_path, const std::string& name);
    ~FolderLock();
    FolderLock(const FolderLock&) = delete;
    FolderLock& operator=(const FolderLock&) = delete;
    void release();

  private:
    io::Origin origin_;
    std::string name_;
    std::atomic<int> fd_;
};

class Folder {
  public:
    // With follow = false the last component of the path must not be a symbolic link.
    explicit Folder(std::string path, bool follow = true);

    // Read and write; fails where the name exists.
    std::unique_ptr<File> create(const std::string& name, bool direct = true);
    std::unique_ptr<File> open(const std::string& name, bool direct = true);  // read only
    std::unique_ptr<File> append(const std::string& name);      // read and write, buffered, made where it is missing
    std::unique_ptr<FolderLock> lock(const std::string& name);  // EWOULDBLOCK where another holds it
    void make_folder(const std::string& name);                  // for its owner alone
    void rename(const std::string& from, const std::string& to);
    void unlink(const std::string& name);
    void fsync();
    FileStatus stat();
    FileStatus lstat(const std::string& name);  // of whatever list() found; a symbolic link is not followed
    std::vector<std::string> list();            // all names but . and .., in any order
    uint64_t free_bytes();
    io::Direct probe();  // what its file system says of O_DIRECT
    void close();
    const std::string& path() const { return descriptor_.path(); }

  private:
    std::unique_ptr<File> open_file(const std::string& name, int flags, bool paged);
    std::string full(const std::string& name) const { return path() + "/" + name; }

    io::Descriptor descriptor_;
};

}  // namespace nf
