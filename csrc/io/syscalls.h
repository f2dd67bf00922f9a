// Every system call on files, and nothing else calls the kernel for them. EINTR is retried here; errors come back as -1
// with errno, as the kernel gives them.
#pragma once

#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/types.h>

namespace nf::sys {

int open(const char* path, int flags);
int open_at(int dirfd, const char* name, int flags, mode_t mode);
int set_direct(int fd, bool on);
ssize_t pread(int fd, void* data, size_t size, off_t offset);
ssize_t pwrite(int fd, const void* data, size_t size, off_t offset);
int fallocate(int fd, off_t size);
int ftruncate(int fd, off_t size);
int fsync(int fd);
int close(int fd);
int rename_at(int dirfd, const char* from, const char* to);
int unlink_at(int dirfd, const char* name);
int fstat(int fd, struct stat* status);
int fstatvfs(int fd, struct statvfs* status);

}  // namespace nf::sys
