#include "io/syscalls.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>

namespace nf::sys {
namespace {

template <typename Call>
auto retry(Call call) {
    auto result = call();
    while (result == -1 && errno == EINTR) result = call();
    return result;
}

}  // namespace

int open(const char* path, int flags) {
    return retry([&] { return ::open(path, flags); });
}

int open_at(int dirfd, const char* name, int flags, mode_t mode) {
    return retry([&] { return ::openat(dirfd, name, flags, mode); });
}

// O_DIRECT is set after the open: an open that fails on O_DIRECT alone may already have created the file.
int set_direct(int fd, bool on) {
    int flags = ::fcntl(fd, F_GETFL);
    if (flags == -1) return -1;
    return ::fcntl(fd, F_SETFL, on ? flags | O_DIRECT : flags & ~O_DIRECT);
}

ssize_t pread(int fd, void* data, size_t size, off_t offset) {
    return retry([&] { return ::pread(fd, data, size, offset); });
}

ssize_t pwrite(int fd, const void* data, size_t size, off_t offset) {
    return retry([&] { return ::pwrite(fd, data, size, offset); });
}

int fallocate(int fd, off_t size) {
    return retry([&] { return ::fallocate(fd, 0, 0, size); });
}

int ftruncate(int fd, off_t size) {
    return retry([&] { return ::ftruncate(fd, size); });
}

int fsync(int fd) {
    return retry([&] { return ::fsync(fd); });
}

// Linux frees the descriptor even when close reports EINTR: a second call could close a stranger's.
int close(int fd) {
    int result = ::close(fd);
    return result == -1 && errno == EINTR ? 0 : result;
}

int rename_at(int dirfd, const char* from, const char* to) { return ::renameat(dirfd, from, dirfd, to); }

int unlink_at(int dirfd, const char* name) { return ::unlinkat(dirfd, name, 0); }

int fstat(int fd, struct stat* status) { return ::fstat(fd, status); }

int fstatvfs(int fd, struct statvfs* status) { return ::fstatvfs(fd, status); }

}  // namespace nf::sys
