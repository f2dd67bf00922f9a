#include "io/file.h"

#include <fcntl.h>

#include <cerrno>
#include <mutex>
#include <stdexcept>
#include <utility>

#include "io/crc32c.h"
#include "io/error.h"
#include "io/syscalls.h"

namespace nf {
namespace {

uint64_t free_on(int fd) {
    struct statvfs status{};
    return sys::fstatvfs(fd, &status) == 0 ? uint64_t{status.f_bavail} * status.f_frsize : 0;
}

void check_name(const std::string& name) {
    const auto inner = [](char c) {
        return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_' || c == '.' || c == '-';
    };
    bool good = !name.empty() && name.size() <= 64 && name[0] != '.' && name[0] != '_' && name[0] != '-';
    for (char c : name) good = good && inner(c);
    if (!good)
        throw std::invalid_argument("expected a file name [a-z0-9][a-z0-9_.-]{0,63} without a folder, got \"" + name +
                                    "\"");
}

void check_aligned(uint64_t offset, const void* data, size_t size) {
    const auto address = reinterpret_cast<uintptr_t>(data);
    if ((offset | size | address) % kPage || size == 0 || offset > INT64_MAX - size)
        throw std::invalid_argument("expected offset, address and bytes in multiples of 4096, got " +
                                    std::to_string(offset) + ", " + std::to_string(address) + ", " +
                                    std::to_string(size) + "; use an AlignedBuffer");
}

}  // namespace

File::File(int fd, std::string path) : fd_(fd), path_(std::move(path)), direct_(sys::set_direct(fd, true) == 0) {}

File::~File() {
    if (fd_ >= 0) sys::close(fd_);  // unchecked: who needs the bytes has called close()
}

File::Lock File::in_use() {
    Lock lock(closing_);
    if (fd_ < 0) throw ClosedError(path_);
    return lock;
}

void File::fail(const char* op, int64_t offset, uint64_t needed, int code) {
    throw SystemError(op, path_, offset, code, needed, free_on(fd_));
}

// A file system may accept O_DIRECT and refuse the request, or ask for more than page alignment after a short transfer.
bool File::fall_back_to_buffered() { return direct_.exchange(false) && sys::set_direct(fd_, false) == 0; }

void File::reserve(uint64_t bytes) {
    const Lock lock = in_use();
    if (sys::fallocate(fd_, static_cast<off_t>(bytes)) == 0) return;
    // ENOSYS comes from kernels in sandboxes. posix_fallocate is no help: it emulates by writing every page.
    if (errno != EOPNOTSUPP && errno != ENOSYS) fail("fallocate", 0, bytes, errno);
    if (free_on(fd_) < bytes) fail("fallocate", 0, bytes, ENOSPC);
    if (sys::ftruncate(fd_, static_cast<off_t>(bytes)) != 0) fail("ftruncate", 0, bytes, errno);
}

uint32_t File::write_chunk(uint64_t offset, const uint8_t* data, size_t size) {
    check_aligned(offset, data, size);
    const Lock lock = in_use();
    const uint32_t crc = crc32c(data, size);
    for (size_t done = 0; done < size;) {
        const ssize_t n = sys::pwrite(fd_, data + done, size - done, static_cast<off_t>(offset + done));
        if (n > 0) {
            done += static_cast<size_t>(n);
            continue;
        }
        const int code = n == 0 ? EIO : errno;  // no progress and no reason: never spin on it
        if (code == EINVAL && fall_back_to_buffered()) continue;
        fail("pwrite", static_cast<int64_t>(offset + done), size - done, code);
    }
    return crc;
}

void File::read_all(uint64_t offset, uint8_t* data, size_t size) {
    for (size_t done = 0; done < size;) {
        const ssize_t n = sys::pread(fd_, data + done, size - done, static_cast<off_t>(offset + done));
        if (n == 0) throw TruncatedError(path_, offset + size, offset + done);
        if (n > 0) {
            done += static_cast<size_t>(n);
            continue;
        }
        const int code = errno;
        if (code == EINVAL && fall_back_to_buffered()) continue;
        fail("pread", static_cast<int64_t>(offset + done), size - done, code);
    }
}

void File::read(uint64_t offset, uint8_t* data, size_t size) {
    check_aligned(offset, data, size);
    const Lock lock = in_use();
    read_all(offset, data, size);
}

int File::read_chunk(uint64_t offset, uint8_t* data, size_t size, uint32_t expected) {
    check_aligned(offset, data, size);
    const Lock lock = in_use();
    uint32_t got = 0;
    for (int reread = 0; reread < 2; ++reread) {  // once more: a flipped bit on the way is not one on the disk
        read_all(offset, data, size);
        got = crc32c(data, size);
        if (got == expected) return reread;
    }
    throw CorruptError(path_, offset, expected, got);
}

void File::fsync() {
    const Lock lock = in_use();
    if (sys::fsync(fd_) != 0) fail("fsync", -1, 0, errno);
}

void File::close() {
    const std::unique_lock<std::shared_mutex> lock(closing_);
    if (fd_ < 0) return;
    const int fd = std::exchange(fd_, -1);
    if (sys::close(fd) != 0) fail("close", -1, 0, errno);
}

FileStatus File::stat() {
    const Lock lock = in_use();
    struct stat status{};
    if (sys::fstat(fd_, &status) != 0) fail("fstat", -1, 0, errno);
    return {static_cast<uint64_t>(status.st_size), static_cast<uint64_t>(status.st_nlink),
            S_ISREG(status.st_mode) != 0};
}

Folder::Folder(std::string path)
    : path_(std::move(path)), fd_(sys::open(path_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)) {
    if (fd_ < 0) throw SystemError("open", path_, -1, errno, 0, 0);
}

Folder::~Folder() { close(); }

int Folder::fd() {
    if (fd_ < 0) throw ClosedError(path_);
    return fd_;
}

std::unique_ptr<File> Folder::open_file(const std::string& name, int flags) {
    check_name(name);
    const int opened = sys::open_at(fd(), name.c_str(), flags | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK, 0600);
    if (opened < 0) throw SystemError("open", full(name), -1, errno, 0, free_on(fd()));
    return std::make_unique<File>(opened, full(name));
}

std::unique_ptr<File> Folder::create(const std::string& name) { return open_file(name, O_RDWR | O_CREAT | O_EXCL); }

std::unique_ptr<File> Folder::open(const std::string& name) { return open_file(name, O_RDONLY); }

void Folder::rename(const std::string& from, const std::string& to) {
    check_name(from);
    check_name(to);
    if (sys::rename_at(fd(), from.c_str(), to.c_str()) != 0)
        throw SystemError("rename", full(from), -1, errno, 0, free_on(fd()));
}

void Folder::unlink(const std::string& name) {
    check_name(name);
    if (sys::unlink_at(fd(), name.c_str()) != 0) throw SystemError("unlink", full(name), -1, errno, 0, free_on(fd()));
}

uint64_t Folder::free_bytes() { return free_on(fd()); }

void Folder::close() {
    if (fd_ >= 0) sys::close(std::exchange(fd_, -1));
}

}  // namespace nf
