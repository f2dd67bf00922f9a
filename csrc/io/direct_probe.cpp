#include "io/direct_probe.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <map>
#include <mutex>

#include "io/file.h"
#include "io/fork.h"
#include "io/io_vtable.h"

namespace nf::io {
namespace {

std::map<dev_t, Direct> known;  // guarded by survives_fork

// A file without a name, or one whose name is gone at once. The operations are the plain ones: a fault meant for the
// run must not be spent here.
int temporary_file(int folder) {
    const int fd = plain.open(folder, ".", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600, ".");
    if (fd >= 0 || (errno != EOPNOTSUPP && errno != EISDIR && errno != ENOENT && errno != EINVAL)) return fd;
    static std::atomic<unsigned> count{0};
    const std::string name = "direct-probe-" + std::to_string(::getpid()) + "-" + std::to_string(count++) + ".tmp";
    const int named = plain.open(folder, name.c_str(), O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600, ".");
    if (named >= 0) plain.unlink(folder, name.c_str());
    return named;
}

bool refusal(int code) {
    return code == EINVAL || code == EOPNOTSUPP || code == ENOTSUP || code == EPERM || code == ENOSYS;
}

// What a failed step means: a refusal settles it; anything else (a full disk, a read-only mount) says nothing.
bool settle(Direct& answer, const char* step, int code) {
    answer.direct = !refusal(code);
    answer.reason = std::string(answer.direct ? "not known, " : "") + step + " failed: " + std::strerror(code);
    return !answer.direct;
}

// True where `answer` holds for the file system, false where it is only the best guess for now.
bool ask(int folder, Direct& answer) {
    const int fd = temporary_file(folder);
    if (fd < 0) {
        answer.direct = true;
        answer.reason = std::string("not known, no file can be made there: ") + std::strerror(errno);
        return false;
    }
    struct Closer {
        int fd;
        ~Closer() { plain.close(fd, "."); }
    } const closer{fd};

    if (direct_alignment(fd, &answer.mem_align, &answer.offset_align)) {
        if (answer.mem_align == 0 || answer.mem_align > kPage || answer.offset_align > kPage) {
            answer.reason = answer.mem_align == 0 ? "statx says that it has no direct I/O"
                                                  : "statx asks for more than page alignment";
            return true;
        }
    } else {
        answer.mem_align = answer.offset_align = kPage;
    }
    if (set_direct(fd, true) != 0) return settle(answer, "O_DIRECT", errno);

    alignas(kPage) uint8_t written[kPage], read[kPage] = {};
    for (size_t i = 0; i < kPage; ++i) written[i] = static_cast<uint8_t>(i * 7 + 1);
    const ssize_t sent = plain.pwrite(fd, written, kPage, 0, ".");
    if (sent != static_cast<ssize_t>(kPage)) return settle(answer, "pwrite", sent < 0 ? errno : EIO);
    const ssize_t received = plain.pread(fd, read, kPage, 0, ".");
    if (received != static_cast<ssize_t>(kPage)) return settle(answer, "pread", received < 0 ? errno : EIO);
    answer.direct = std::memcmp(written, read, kPage) == 0;
    answer.reason = answer.direct ? "" : "a page came back changed";
    return true;
}

}  // namespace

Direct probe_direct(int folder) {
    struct stat status{};
    struct statfs system{};
    const bool have_device = io::fstat(folder, &status) == 0;
    if (have_device) {
        const std::lock_guard<std::mutex> lock(survives_fork);
        const auto found = known.find(status.st_dev);
        if (found != known.end()) return found->second;
    }
    // Two threads may ask at once; they hear the same.
    Direct answer{false, "", 0, 0, false};
    answer.in_ram = io::fstatfs(folder, &system) == 0 &&
                    (system.f_type == TMPFS_MAGIC || static_cast<uint32_t>(system.f_type) == RAMFS_MAGIC);
    bool final = true;
    if (direct_forbidden()) {
        answer.reason = "NF_DIRECT=0";
    } else {
        final = ask(folder, answer);
    }
    if (final && have_device) {
        const std::lock_guard<std::mutex> lock(survives_fork);
        known[status.st_dev] = answer;
    }
    return answer;
}

}  // namespace nf::io
