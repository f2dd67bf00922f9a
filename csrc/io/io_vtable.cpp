#include "io/io_vtable.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>

#include "io/crc32c.h"
#include "io/fault.h"
#include "io/fork.h"

namespace nf::io {
namespace {

const Operations* table = &plain;
bool no_direct = false;

template <typename Call>
auto retry(Call call) {
    int64_t wait_ms = 1;
    while (true) {
        const auto result = call();
        if (result != -1 || (errno != EINTR && errno != EAGAIN)) return result;
        if (errno == EINTR) continue;
        if (wait_ms > 512) return result;
        const timespec wait{0, wait_ms * 1'000'000};
        ::nanosleep(&wait, nullptr);  // woken early by a signal, it only asks sooner
        errno = EAGAIN;
        wait_ms *= 2;
    }
}

std::string variable(const char* name) {
    const char* value = std::getenv(name);
    return value ? value : "";
}

// statx(2) of Linux 6.1 and later, spelt out because the C library's headers may be older.
struct Statx {
    uint32_t mask;
    uint8_t before[148];
    uint32_t direct_memory, direct_offset;
    uint8_t after[96];
};
static_assert(sizeof(Statx) == 256, "the kernel writes 256 bytes");
constexpr unsigned kStatxDirect = 0x2000;
constexpr int kEmptyPath = 0x1000;

// openat2(2) of Linux 5.6 and later, spelt out for the same reason; 437 is its number everywhere but on Alpha.
struct OpenHow {
    uint64_t flags, mode, resolve;
};
constexpr long kOpenat2 = 437;
constexpr uint64_t kNoMagicLinks = 0x02, kNoSymlinks = 0x04, kBeneath = 0x08;
std::atomic<bool> have_openat2{true};

bool refused_by_kernel(int code) { return code == ENOSYS || code == EPERM || code == E2BIG; }

// A second lock: the names that come by here have one component, and O_NOFOLLOW or O_DIRECTORY.
int open_beneath(int folder, const char* path, int flags, mode_t mode) {
    const bool makes = (flags & O_CREAT) || (flags & O_TMPFILE) == O_TMPFILE;  // else openat2 takes no mode
    const OpenHow how{static_cast<uint64_t>(flags | O_LARGEFILE), makes ? mode : 0,
                      kBeneath | kNoSymlinks | kNoMagicLinks};
    const auto fd = static_cast<int>(::syscall(kOpenat2, folder, path, &how, sizeof how));
    if (fd >= 0 || !refused_by_kernel(errno)) return fd;
    const int again = ::openat(folder, path, flags, mode);
    if (again >= 0 || errno != EPERM) have_openat2 = false;  // EPERM twice is about this file
    return again;
}

}  // namespace

const Operations plain = {
    [](int folder, const char* path, int flags, mode_t mode, const char*) {
        return folder != AT_FDCWD && have_openat2 ? open_beneath(folder, path, flags, mode)
                                                  : ::openat(folder, path, flags, mode);
    },
    [](int fd, void* data, size_t size, off_t offset, const char*) { return ::pread(fd, data, size, offset); },
    [](int fd, const void* data, size_t size, off_t offset, const char*) { return ::pwrite(fd, data, size, offset); },
    [](int fd, const char*) { return ::fsync(fd); },
    [](int fd, const char*) { return ::fsync(fd); },
    [](int fd, const char*) { return ::close(fd); },
    [](int folder, const char* from, const char* to) { return ::renameat(folder, from, folder, to); },
    [](int folder, const char* name) { return ::unlinkat(folder, name, 0); },
    [](int fd, off_t size, const char*) { return ::fallocate(fd, 0, 0, size); },
    [](int fd, off_t size, const char*) { return ::ftruncate(fd, size); },
};

void configure() {
    handle_forks();
    choose_crc32c(variable("NF_CRC"));
    if (variable("NF_TESTING") != "1") return;
    const std::string direct = variable("NF_DIRECT");
    if (!direct.empty() && direct != "0") throw std::invalid_argument("NF_DIRECT: expected 0, got \"" + direct + "\"");
    no_direct = !direct.empty();
    table = faulty(variable("NF_FAULT"), variable("RANK"), variable("NF_FAULT_COUNT"), variable("NF_FAULT_LOG"));
}

bool direct_forbidden() { return no_direct; }

int open(int folder, const char* path, int flags, mode_t mode, const char* name) {
    return retry([&] { return table->open(folder, path, flags, mode, name); });
}

ssize_t pread(int fd, void* data, size_t size, off_t offset, const char* name) {
    return retry([&] { return table->pread(fd, data, size, offset, name); });
}

ssize_t pwrite(int fd, const void* data, size_t size, off_t offset, const char* name) {
    return retry([&] { return table->pwrite(fd, data, size, offset, name); });
}

int fsync(int fd, const char* name) {
    return retry([&] { return table->fsync(fd, name); });
}

int fsyncdir(int fd, const char* name) {
    return retry([&] { return table->fsyncdir(fd, name); });
}

// Linux frees the descriptor even when close reports EINTR: a second call could close a stranger's.
int close(int fd, const char* name) {
    const int result = table->close(fd, name);
    return result == -1 && errno == EINTR ? 0 : result;
}

int rename(int folder, const char* from, const char* to) {
    return retry([&] { return table->rename(folder, from, to); });
}

int unlink(int folder, const char* name) {
    return retry([&] { return table->unlink(folder, name); });
}

int fallocate(int fd, off_t size, const char* name) {
    return retry([&] { return table->fallocate(fd, size, name); });
}

int ftruncate(int fd, off_t size, const char* name) {
    return retry([&] { return table->ftruncate(fd, size, name); });
}

int fstat(int fd, struct stat* status) { return ::fstat(fd, status); }

int lstat(int folder, const char* name, struct stat* status) {
    return ::fstatat(folder, name, status, AT_SYMLINK_NOFOLLOW);
}

// Of a descriptor of its own: a stream of `folder` itself would share its position with every other one.
int list(int folder, std::vector<std::string>& names) {
    struct Closer {
        void operator()(DIR* stream) const {
            const int code = errno;
            ::closedir(stream);
            errno = code;
        }
    };
    const int fd = open(folder, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0, ".");
    if (fd < 0) return -1;
    const std::unique_ptr<DIR, Closer> stream(::fdopendir(fd));
    if (!stream) {
        const int code = errno;
        ::close(fd);
        errno = code;
        return -1;
    }
    while (true) {
        errno = 0;
        const dirent* entry = ::readdir(stream.get());
        if (entry == nullptr) return errno == 0 ? 0 : -1;
        const std::string name = entry->d_name;
        if (name != "." && name != "..") names.push_back(name);
    }
}

int fstatfs(int fd, struct statfs* status) {
    return retry([&] { return ::fstatfs(fd, status); });
}

int fstatvfs(int fd, struct statvfs* status) {
    return retry([&] { return ::fstatvfs(fd, status); });
}

int lock_exclusively(int fd) {
    int result = ::flock(fd, LOCK_EX | LOCK_NB);
    while (result == -1 && errno == EINTR) result = ::flock(fd, LOCK_EX | LOCK_NB);
    return result;
}

int make_folder(int folder, const char* name, mode_t mode) { return ::mkdirat(folder, name, mode); }

// O_DIRECT is set after the open: an open that fails on O_DIRECT alone may already have created the file.
int set_direct(int fd, bool on) {
    const int flags = ::fcntl(fd, F_GETFL);
    if (flags == -1) return -1;
    return ::fcntl(fd, F_SETFL, on ? flags | O_DIRECT : flags & ~O_DIRECT);
}

int start_writeback(int fd, off_t offset, off_t size) {
    return retry([&] { return ::sync_file_range(fd, offset, size, SYNC_FILE_RANGE_WRITE); });
}

int wait_for_writeback(int fd, off_t offset, off_t size) {
    constexpr unsigned kAll = SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER;
    return retry([&] { return ::sync_file_range(fd, offset, size, kAll); });
}

int drop_from_page_cache(int fd, off_t offset, off_t size) {
    return ::posix_fadvise(fd, offset, size, POSIX_FADV_DONTNEED);
}

// The kernel's read-ahead is of no use to chunks in random order, and its large pages, which reach across our pieces,
// would not be dropped with them.
int no_read_ahead(int fd) { return ::posix_fadvise(fd, 0, 0, POSIX_FADV_RANDOM); }

bool direct_alignment(int fd, uint32_t* memory, uint32_t* offset) {
#ifdef SYS_statx
    Statx status{};
    if (::syscall(SYS_statx, fd, "", kEmptyPath, kStatxDirect, &status) != 0 || !(status.mask & kStatxDirect))
        return false;
    *memory = status.direct_memory;
    *offset = status.direct_offset;
    return true;
#else
    (void)fd, (void)memory, (void)offset;
    return false;
#endif
}

}  // namespace nf::io
