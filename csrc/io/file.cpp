#include "io/file.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <stdexcept>
#include <utility>
#include <vector>

#include "io/crc32c.h"
#include "io/error.h"
#include "io/io_vtable.h"

namespace nf {
namespace {

using Use = io::Descriptor::Use;

constexpr uint64_t kBehind = 8 << 20;

uint64_t free_on(int fd) {
    struct statvfs status{};
    return io::fstatvfs(fd, &status) == 0 ? uint64_t{status.f_bavail} * status.f_frsize : 0;
}

// Some file systems, such as ramfs, do not say how large they are.
bool says_too_small(int fd, uint64_t bytes) {
    struct statvfs status{};
    return io::fstatvfs(fd, &status) == 0 && status.f_blocks > 0 && uint64_t{status.f_bavail} * status.f_frsize < bytes;
}

// Two names of a run folder are written large; what follows them is as anywhere.
void check_name(const std::string& name) {
    const auto plain = [](char c) { return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9'); };
    const size_t large = name.rfind("MANIFEST", 0) == 0 ? 8 : name.rfind("LOCK", 0) == 0 ? 4 : 0;
    bool good = !name.empty() && name.size() <= 64 && (large || plain(name[0]));
    for (size_t i = large; i < name.size(); ++i)
        good = good && (plain(name[i]) || name[i] == '_' || name[i] == '.' || name[i] == '-');
    if (!good)
        throw std::invalid_argument(
            "expected a file name [a-z0-9][a-z0-9_.-]{0,63}, or one that begins with "
            "MANIFEST or LOCK, without a folder, got \"" +
            name + "\"");
}

void check_component(const char* of, const std::string& name) {
    const bool good = !name.empty() && name != "." && name != ".." && name.find('/') == std::string::npos &&
                      name.find('\0') == std::string::npos;
    if (!good) throw std::invalid_argument(std::string("expected the name of one ") + of + ", got \"" + name + "\"");
}

// `code` is errno at the call: looking for free space may change it.
[[noreturn]] void fail_in(int folder, const char* op, const std::string& path, int code) {
    throw SystemError(op, path, -1, code, 0, free_on(folder));
}

int open_file(int folder, const std::string& path, const std::string& name, int flags) {
    const int all_flags = flags | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK;
    const int fd = io::open(folder, name.c_str(), all_flags, 0600, name.c_str());
    if (fd < 0) fail_in(folder, "open", path, errno);
    return fd;
}

int open_folder(std::string path, bool follow) {
    const int flags = O_RDONLY | O_DIRECTORY | O_CLOEXEC | (follow ? 0 : O_NOFOLLOW);
    while (!follow && path.size() > 1 && path.back() == '/') path.pop_back();  // link/ is looked up behind the link
    const int fd = io::open(AT_FDCWD, path.c_str(), flags, 0, ".");
    if (fd < 0) throw SystemError("open", path, -1, errno, 0, 0);
    return fd;
}

FileStatus status_of(const struct stat& status) {
    return {static_cast<uint64_t>(status.st_size),
            static_cast<uint64_t>(status.st_nlink),
            S_ISREG(status.st_mode) != 0,
            S_ISLNK(status.st_mode) != 0,
            status.st_uid,
            status.st_mode & 07777};
}

}  // namespace

File::File(int folder, std::string path, std::string name, int flags, bool paged, bool direct)
    : paged_(paged),
      descriptor_{open_file(folder, path, name, flags), std::move(path), std::move(name)},  // braces: in this order
      direct_(direct) {
    const Use use(descriptor_);
    if (direct_ && io::set_direct(use.fd(), true) != 0) direct_ = false;
    if (paged_ && !direct_) io::no_read_ahead(use.fd());
}

void File::fail(int fd, const char* op, int64_t offset, uint64_t needed, int code) const {
    throw SystemError(op, path(), offset, code, needed, free_on(fd));
}

void File::check(uint64_t offset, const void* data, size_t size) const {
    if (size > INT64_MAX || offset > INT64_MAX - size)
        throw std::invalid_argument("expected offset + bytes below 2^63, got " + std::to_string(offset) + " + " +
                                    std::to_string(size));
    const auto address = reinterpret_cast<uintptr_t>(data);
    if (paged_ && ((offset | size | address) % kPage || size == 0))
        throw std::invalid_argument("expected offset, address and bytes in multiples of 4096, got " +
                                    std::to_string(offset) + ", " + std::to_string(address) + ", " +
                                    std::to_string(size) + "; use an AlignedBuffer");
}

// A file system may accept O_DIRECT and refuse the request, or ask for more than page alignment after a short transfer.
// `was_direct` is from before the request: of two threads refused at the same time both may ask again.
bool File::fall_back_to_buffered(int fd, bool was_direct) {
    if (!was_direct || io::set_direct(fd, false) != 0) return false;
    direct_ = false;
    io::no_read_ahead(fd);
    return true;
}

void File::reserve(uint64_t bytes) {
    const Use use(descriptor_);
    if (io::fallocate(use.fd(), static_cast<off_t>(bytes), descriptor_.name()) == 0) return;
    // ENOSYS comes from kernels in sandboxes. posix_fallocate is no help: it emulates by writing every page.
    if (errno != EOPNOTSUPP && errno != ENOSYS) fail(use.fd(), "fallocate", 0, bytes, errno);
    if (says_too_small(use.fd(), bytes)) fail(use.fd(), "fallocate", 0, bytes, ENOSPC);
    if (io::ftruncate(use.fd(), static_cast<off_t>(bytes), descriptor_.name()) != 0)
        fail(use.fd(), "ftruncate", 0, bytes, errno);
}

void File::truncate(uint64_t bytes) {
    const Use use(descriptor_);
    if (io::ftruncate(use.fd(), static_cast<off_t>(bytes), descriptor_.name()) != 0)
        fail(use.fd(), "ftruncate", static_cast<int64_t>(bytes), 0, errno);
}

void File::write_all(int fd, uint64_t offset, const uint8_t* data, size_t size) {
    for (size_t done = 0; done < size;) {
        const auto at = static_cast<off_t>(offset + done);
        const bool was_direct = direct_;
        const ssize_t n = io::pwrite(fd, data + done, size - done, at, descriptor_.name());
        if (n > 0) {
            done += static_cast<size_t>(n);
            continue;
        }
        const int code = n == 0 ? EIO : errno;  // no progress and no reason: never spin on it
        if (code == EINVAL && fall_back_to_buffered(fd, was_direct)) continue;
        fail(fd, "pwrite", at, size - done, code);
    }
    leave_behind(fd, offset, size, true);
}

void File::write(uint64_t offset, const uint8_t* data, size_t size) {
    check(offset, data, size);
    const Use use(descriptor_);
    write_all(use.fd(), offset, data, size);
}

uint32_t File::write_chunk(uint64_t offset, const uint8_t* data, size_t size) {
    check(offset, data, size);
    const Use use(descriptor_);
    const uint32_t crc = crc32c(data, size);
    write_all(use.fd(), offset, data, size);
    return crc;
}

void File::read_all(int fd, uint64_t offset, uint8_t* data, size_t size) {
    for (size_t done = 0; done < size;) {
        const auto at = static_cast<off_t>(offset + done);
        const bool was_direct = direct_;
        const ssize_t n = io::pread(fd, data + done, size - done, at, descriptor_.name());
        if (n == 0) throw TruncatedError(path(), offset + size, offset + done);
        if (n > 0) {
            done += static_cast<size_t>(n);
            continue;
        }
        const int code = errno;
        if (code == EINVAL && fall_back_to_buffered(fd, was_direct)) continue;
        fail(fd, "pread", at, size - done, code);
    }
    leave_behind(fd, offset, size, false);
}

void File::read(uint64_t offset, uint8_t* data, size_t size) {
    check(offset, data, size);
    const Use use(descriptor_);
    read_all(use.fd(), offset, data, size);
}

int File::read_chunk(uint64_t offset, uint8_t* data, size_t size, uint32_t expected) {
    check(offset, data, size);
    const Use use(descriptor_);
    uint32_t got = 0;
    for (int reread = 0; reread < 2; ++reread) {  // once more: a flipped bit on the way is not one on the disk
        read_all(use.fd(), offset, data, size);
        got = crc32c(data, size);
        if (got == expected) return reread;
        // Else the second reading would only show the first again.
        if (!direct_) io::drop_from_page_cache(use.fd(), static_cast<off_t>(offset), static_cast<off_t>(size));
    }
    throw CorruptError(path(), offset, expected, got);
}

// Buffered: what was written starts on its way to the disk now; what lies kBehind back is waited for and dropped.
void File::leave_behind(int fd, uint64_t offset, size_t size, bool written) {
    if (!paged_ || direct_) return;
    std::vector<Range> old;
    {
        const std::lock_guard<std::mutex> lock(behind_mutex_);
        behind_.push_back({offset, size});
        behind_bytes_ += size;
        while (behind_bytes_ - behind_.front().size >= kBehind) {
            old.push_back(behind_.front());
            behind_bytes_ -= behind_.front().size;
            behind_.pop_front();
        }
    }
    const auto flush = [&](auto call, const Range& range) {
        if (call(fd, static_cast<off_t>(range.offset), static_cast<off_t>(range.size)) == 0) return;
        // The kernel reports a failed write once; a later fsync would then be a lie.
        if (errno == EIO || errno == ENOSPC || errno == EDQUOT)
            fail(fd, "sync_file_range", static_cast<int64_t>(range.offset), range.size, errno);
    };
    if (written) flush(io::start_writeback, {offset, size});
    for (const Range& range : old) {
        flush(io::wait_for_writeback, range);
        io::drop_from_page_cache(fd, static_cast<off_t>(range.offset), static_cast<off_t>(range.size));
    }
}

void File::fsync() {
    const Use use(descriptor_);
    if (io::fsync(use.fd(), descriptor_.name()) != 0) fail(use.fd(), "fsync", -1, 0, errno);
}

void File::close() {
    if (!descriptor_.close()) throw SystemError("close", path(), -1, errno, 0, 0);
}

FileStatus File::stat() {
    const Use use(descriptor_);
    struct stat status{};
    if (io::fstat(use.fd(), &status) != 0) fail(use.fd(), "fstat", -1, 0, errno);
    return status_of(status);
}

FolderLock::FolderLock(int folder, const std::string& folder_path, const std::string& name)
    : name_(name),
      fd_(io::open_for_this_process(folder, name_.c_str(), O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK,
                                    0600)) {
    const bool opened = fd_ >= 0;
    if (opened && io::lock_exclusively(fd_) == 0) return;
    const int code = errno;
    release();
    throw SystemError(opened ? "flock" : "open", folder_path + "/" + name, -1, code, 0, 0);
}

FolderLock::~FolderLock() { release(); }

void FolderLock::release() {
    const int fd = fd_.exchange(-1);
    if (fd >= 0 && origin_.here()) io::close_for_this_process(fd, name_.c_str());  // a child's is closed already
}

Folder::Folder(std::string path, bool follow) : descriptor_{open_folder(path, follow), std::move(path), "."} {}

std::unique_ptr<File> Folder::open_file(const std::string& name, int flags, bool paged) {
    check_name(name);
    const Use use(descriptor_);
    const bool direct = paged && io::probe_direct(use.fd()).direct;
    return std::make_unique<File>(use.fd(), full(name), name, flags, paged, direct);
}

std::unique_ptr<File> Folder::create(const std::string& name, bool direct) {
    return open_file(name, O_RDWR | O_CREAT | O_EXCL, direct);
}

std::unique_ptr<File> Folder::open(const std::string& name, bool direct) { return open_file(name, O_RDONLY, direct); }

std::unique_ptr<File> Folder::append(const std::string& name) { return open_file(name, O_RDWR | O_CREAT, false); }

std::unique_ptr<FolderLock> Folder::lock(const std::string& name) {
    check_name(name);
    const Use use(descriptor_);
    return std::make_unique<FolderLock>(use.fd(), path(), name);
}

void Folder::make_folder(const std::string& name) {
    check_component("folder", name);
    const Use use(descriptor_);
    if (io::make_folder(use.fd(), name.c_str(), 0700) != 0) fail_in(use.fd(), "mkdirat", full(name), errno);
}

void Folder::rename(const std::string& from, const std::string& to) {
    check_name(from);
    check_name(to);
    const Use use(descriptor_);
    if (io::rename(use.fd(), from.c_str(), to.c_str()) != 0) fail_in(use.fd(), "rename", full(from), errno);
}

void Folder::unlink(const std::string& name) {
    check_name(name);
    const Use use(descriptor_);
    if (io::unlink(use.fd(), name.c_str()) != 0) fail_in(use.fd(), "unlink", full(name), errno);
}

void Folder::fsync() {
    const Use use(descriptor_);
    if (io::fsyncdir(use.fd(), descriptor_.name()) != 0) throw SystemError("fsyncdir", path(), -1, errno, 0, 0);
}

FileStatus Folder::stat() {
    const Use use(descriptor_);
    struct stat status{};
    if (io::fstat(use.fd(), &status) != 0) fail_in(use.fd(), "fstat", path(), errno);
    return status_of(status);
}

FileStatus Folder::lstat(const std::string& name) {
    check_component("file", name);
    const Use use(descriptor_);
    struct stat status{};
    if (io::lstat(use.fd(), name.c_str(), &status) != 0) fail_in(use.fd(), "lstat", full(name), errno);
    return status_of(status);
}

std::vector<std::string> Folder::list() {
    const Use use(descriptor_);
    std::vector<std::string> names;
    if (io::list(use.fd(), names) != 0) fail_in(use.fd(), "list", path(), errno);
    return names;
}

uint64_t Folder::free_bytes() {
    const Use use(descriptor_);
    return free_on(use.fd());
}

io::Direct Folder::probe() {
    const Use use(descriptor_);
    return io::probe_direct(use.fd());
}

void Folder::close() { descriptor_.close(); }

}  // namespace nf
