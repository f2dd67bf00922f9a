// Every system call on files: the operations of one table, plain or with injected faults, and a few helpers beside it.
// Nothing else calls the kernel for files.
//
// EINTR is retried and EAGAIN waited for (about a second) above the table, so that injected ones are too; other errors
// come back as -1 with errno, as the kernel gives them. `name` is the file's name below its folder ("." for the folder
// itself); only the table with faults looks at it.
#pragma once

#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/statvfs.h>
#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace nf::io {

// Below a folder `open` takes no path that leads out of it, nor any symbolic link, by openat2 where the kernel has it.
struct Operations {
    int (*open)(int folder, const char* path, int flags, mode_t mode, const char* name);
    ssize_t (*pread)(int fd, void* data, size_t size, off_t offset, const char* name);
    ssize_t (*pwrite)(int fd, const void* data, size_t size, off_t offset, const char* name);
    int (*fsync)(int fd, const char* name);
    int (*fsyncdir)(int fd, const char* name);
    int (*close)(int fd, const char* name);
    int (*rename)(int folder, const char* from, const char* to);
    int (*unlink)(int folder, const char* name);
    int (*fallocate)(int fd, off_t size, const char* name);
    int (*ftruncate)(int fd, off_t size, const char* name);
};

extern const Operations plain;

// Reads NF_TESTING, NF_FAULT, NF_FAULT_COUNT, NF_FAULT_LOG, NF_DIRECT and NF_CRC. Called once, when the module is
// loaded and before any thread of ours; throws std::invalid_argument that names the variable and the field.
void configure();
bool direct_forbidden();  // by NF_DIRECT=0

int open(int folder, const char* path, int flags, mode_t mode, const char* name);
ssize_t pread(int fd, void* data, size_t size, off_t offset, const char* name);
ssize_t pwrite(int fd, const void* data, size_t size, off_t offset, const char* name);
int fsync(int fd, const char* name);
int fsyncdir(int fd, const char* name);
int close(int fd, const char* name);  // the descriptor is gone whatever it returns
int rename(int folder, const char* from, const char* to);
int unlink(int folder, const char* name);
int fallocate(int fd, off_t size, const char* name);
int ftruncate(int fd, off_t size, const char* name);

int fstat(int fd, struct stat* status);
int lstat(int folder, const char* name, struct stat* status);
int list(int folder, std::vector<std::string>& names);  // adds all names but . and ..
int fstatfs(int fd, struct statfs* status);
int fstatvfs(int fd, struct statvfs* status);
int lock_exclusively(int fd);  // EWOULDBLOCK where another holds it
int make_folder(int folder, const char* name, mode_t mode);
int set_direct(int fd, bool on);
int start_writeback(int fd, off_t offset, off_t size);
int wait_for_writeback(int fd, off_t offset, off_t size);
int drop_from_page_cache(int fd, off_t offset, off_t size);
int no_read_ahead(int fd);

// What O_DIRECT asks of memory addresses and of offsets; 0 and 0: the file does not take it. False: the kernel does not
// say.
bool direct_alignment(int fd, uint32_t* memory, uint32_t* offset);

}  // namespace nf::io
