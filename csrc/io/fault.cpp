#include "io/fault.h"

#include <fcntl.h>
#include <fnmatch.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <stdexcept>

#include "io/io_vtable.h"

namespace nf::io {
namespace {

enum Op : unsigned {
    kOpen,
    kPread,
    kPwrite,
    kFsync,
    kFsyncdir,
    kClose,
    kRename,
    kUnlink,
    kFallocate,
    kFtruncate,
    kOps
};
constexpr const char* kOpNames[kOps] = {"open",  "pread",  "pwrite", "fsync",     "fsyncdir",
                                        "close", "rename", "unlink", "fallocate", "ftruncate"};
constexpr uint32_t kAny = (1u << kOps) - 1;

enum Mode { kNone, kErrno, kShort, kKill, kKillAfter, kTorn, kDelay, kFlip, kLieWrite, kDropFsync };
struct ModeRule {
    Mode mode;
    const char* name;
    const char* value;  // what stands behind the colon, nullptr for nothing
    uint32_t fits;      // operations
};
constexpr ModeRule kModes[] = {
    {kErrno, "errno", "E", kAny},
    {kShort, "short", "B", 1u << kPread | 1u << kPwrite},
    {kKill, "kill", nullptr, kAny},
    {kKillAfter, "kill_after", nullptr, kAny},
    {kTorn, "torn", "B", 1u << kPwrite},
    {kDelay, "delay", "MS", kAny},
    {kFlip, "flip", "BIT", 1u << kPread},
    {kLieWrite, "lie_write", nullptr, 1u << kPwrite},
    {kDropFsync, "drop_fsync", nullptr, 1u << kFsync | 1u << kFsyncdir},
};

struct Fault {
    uint32_t ops = kAny;
    std::string path = "*";
    uint64_t n = 1;
    bool sticky = false;
    Mode mode = kNone;
    uint64_t value = 0;
};

Fault fault;
bool watching = false;  // counting or logging: nothing fails
int log_fd = -1;
std::atomic<uint64_t> matches{0};
std::atomic<uint64_t> counts[kOps];

[[noreturn]] void refuse(const std::string& field, const std::string& expected, const std::string& got) {
    throw std::invalid_argument(field + ": expected " + expected + ", got \"" + got + "\"");
}

std::string trimmed(const std::string& text) {
    const size_t first = text.find_first_not_of(' ');
    return first == std::string::npos ? "" : text.substr(first, text.find_last_not_of(' ') - first + 1);
}

uint64_t number(const std::string& field, const std::string& text, uint64_t least, uint64_t most) {
    const bool digits = !text.empty() && text.size() <= 18 && text.find_first_not_of("0123456789") == std::string::npos;
    const uint64_t value = digits ? std::stoull(text) : 0;
    if (!digits || value < least || value > most)
        refuse(field, "an integer from " + std::to_string(least) + " to " + std::to_string(most), text);
    return value;
}

uint32_t parse_ops(const std::string& text) {
    if (text == "any") return kAny;
    std::string names;
    for (unsigned op = 0; op < kOps; ++op) {
        if (text == kOpNames[op]) return 1u << op;
        names += std::string(kOpNames[op]) + ", ";
    }
    refuse("NF_FAULT, op", names + "any", text);
}

const ModeRule& parse_mode(const std::string& text) {
    const size_t colon = text.find(':');
    std::string forms;
    for (const ModeRule& rule : kModes) {
        const std::string form = rule.name + (rule.value ? std::string(":") + rule.value : "");
        if (text.substr(0, colon) == rule.name) {
            if ((colon != std::string::npos) != (rule.value != nullptr)) refuse("NF_FAULT, mode", form, text);
            if (rule.value) {
                const uint64_t most = rule.mode == kErrno ? 4095 : std::numeric_limits<uint32_t>::max();
                fault.value = number("NF_FAULT, mode", text.substr(colon + 1), rule.mode == kErrno, most);
            }
            return rule;
        }
        forms += (forms.empty() ? "" : ", ") + form;
    }
    refuse("NF_FAULT, mode", forms, text);
}

void parse_fault(const std::string& text, uint64_t rank) {
    constexpr const char* kFields = "op, path, n, sticky, rank and mode, each once, as field=value between semicolons";
    constexpr uint64_t kMost = 999'999'999'999'999'999;
    std::string seen, op = "any", mode;
    bool ours = true;
    for (size_t begin = 0; begin <= text.size();) {
        const size_t end = std::min(text.find(';', begin), text.size());
        const std::string part = trimmed(text.substr(begin, end - begin));
        begin = end + 1;
        if (part.empty()) continue;
        const size_t equals = part.find('=');
        if (equals == std::string::npos) refuse("NF_FAULT", kFields, part);
        const std::string field = trimmed(part.substr(0, equals)), value = trimmed(part.substr(equals + 1));
        if (seen.find(" " + field + " ") != std::string::npos) refuse("NF_FAULT, " + field, "it once", part);
        seen += " " + field + " ";
        if (field == "op") {
            op = value;
            fault.ops = parse_ops(value);
        } else if (field == "path") {
            if (value.empty()) refuse("NF_FAULT, path", "a glob", value);
            fault.path = value;
        } else if (field == "n") {
            fault.n = number("NF_FAULT, n", value, 1, kMost);
        } else if (field == "sticky") {
            fault.sticky = number("NF_FAULT, sticky", value, 0, 1) == 1;
        } else if (field == "rank") {
            ours = number("NF_FAULT, rank", value, 0, kMost) == rank;
        } else if (field == "mode") {
            mode = value;
        } else {
            refuse("NF_FAULT", kFields, part);
        }
    }
    if (!watching && seen.find(" op ") == std::string::npos) refuse("NF_FAULT, op", "this field", text);
    if (!watching || seen.find(" mode ") != std::string::npos) {
        const ModeRule& rule = parse_mode(mode);
        if (!(fault.ops & rule.fits)) refuse("NF_FAULT, mode", "one that fits op=" + op, mode);
        fault.ops &= rule.fits;
        fault.mode = rule.mode;
    }
    if (!ours) fault.ops = 0;
}

// ---- What happens at an operation

[[noreturn]] void die() {
    ::kill(::getpid(), SIGKILL);
    while (true) ::pause();
}

void sleep_ms(uint64_t time_ms) {
    timespec left{static_cast<time_t>(time_ms / 1000), static_cast<long>(time_ms % 1000 * 1'000'000)};
    while (::nanosleep(&left, &left) == -1 && errno == EINTR) {
    }
}

void write_line(int fd, const std::string& line) {
    // One write a line, so that those of several threads do not mix.
    if (::write(fd, line.data(), line.size()) != static_cast<ssize_t>(line.size())) {
        std::perror("NF_FAULT_LOG or NF_FAULT_COUNT");
        std::abort();  // a test that reads half a log would pass for the wrong reason
    }
}

struct Request {
    Op op;
    const char* name;
    const char* new_name;  // of a rename, or nullptr
    int64_t offset;
    uint64_t length;
};

bool matching(const Request& request) {
    const auto like = [](const char* name) { return ::fnmatch(fault.path.c_str(), name, 0) == 0; };
    return (fault.ops >> request.op & 1) && (like(request.name) || (request.new_name && like(request.new_name)));
}

// `call(mode)` does the operation itself: as it should for kNone, else as a mode says that only this operation has.
template <typename Call>
auto perform(const Request& request, Call call) {
    if (!matching(request)) return call(kNone);
    counts[request.op].fetch_add(1);
    const uint64_t match = matches.fetch_add(1) + 1;
    const bool hit = !watching && (fault.sticky ? match >= fault.n : match == fault.n);
    const Mode mode = hit ? fault.mode : kNone;
    if (mode == kKill) die();
    if (mode == kDelay) sleep_ms(fault.value);
    auto result = decltype(call(mode))(-1);
    if (mode == kErrno) {
        if (request.op == kClose) call(kNone);  // Linux frees the descriptor of a close that fails, too
        errno = static_cast<int>(fault.value);
    } else {
        result = call(mode);
    }
    if (mode == kKillAfter) die();
    if (log_fd >= 0) {
        const int code = errno;
        write_line(log_fd, std::string(kOpNames[request.op]) + " " + request.name +
                               (request.new_name ? std::string(">") + request.new_name : "") + " " +
                               std::to_string(request.offset) + " " + std::to_string(request.length) + " " +
                               std::to_string(result == -1 ? -code : static_cast<int64_t>(result)) + "\n");
        errno = code;
    }
    return result;
}

// The same file without O_DIRECT, which refuses odd lengths.
class Buffered {
  public:
    Buffered(int fd, int flags) : fd_(::open(("/proc/self/fd/" + std::to_string(fd)).c_str(), flags | O_CLOEXEC)) {}
    ~Buffered() {
        const int code = errno;
        if (fd_ >= 0) ::close(fd_);
        errno = code;
    }
    Buffered(const Buffered&) = delete;
    Buffered& operator=(const Buffered&) = delete;
    int fd() const { return fd_; }

  private:
    int fd_;
};

size_t first_bytes(size_t size) { return static_cast<size_t>(std::min<uint64_t>(size, fault.value)); }

ssize_t faulty_pread(int fd, void* data, size_t size, off_t offset, const char* name) {
    return perform({kPread, name, nullptr, offset, size}, [&](Mode mode) -> ssize_t {
        if (mode == kShort) return ::pread(Buffered(fd, O_RDONLY).fd(), data, first_bytes(size), offset);
        const ssize_t n = ::pread(fd, data, size, offset);
        if (mode == kFlip && n > 0) {
            const uint64_t bit = fault.value % (8 * static_cast<uint64_t>(n));
            static_cast<uint8_t*>(data)[bit / 8] ^= static_cast<uint8_t>(1u << bit % 8);
        }
        return n;
    });
}

ssize_t faulty_pwrite(int fd, const void* data, size_t size, off_t offset, const char* name) {
    return perform({kPwrite, name, nullptr, offset, size}, [&](Mode mode) -> ssize_t {
        if (mode == kLieWrite) return static_cast<ssize_t>(size);
        if (mode != kShort && mode != kTorn) return ::pwrite(fd, data, size, offset);
        const ssize_t n = ::pwrite(Buffered(fd, O_WRONLY).fd(), data, first_bytes(size), offset);
        if (mode == kTorn) die();
        return n;
    });
}

int synced(Op op, int fd, const char* name) {
    return perform({op, name, nullptr, 0, 0}, [&](Mode mode) { return mode == kDropFsync ? 0 : ::fsync(fd); });
}

const Operations kFaulty = {
    [](int folder, const char* path, int flags, mode_t mode, const char* name) {
        return perform({kOpen, name, nullptr, flags, 0},
                       [&](Mode) { return plain.open(folder, path, flags, mode, name); });
    },
    faulty_pread,
    faulty_pwrite,
    [](int fd, const char* name) { return synced(kFsync, fd, name); },
    [](int fd, const char* name) { return synced(kFsyncdir, fd, name); },
    [](int fd, const char* name) { return perform({kClose, name, nullptr, 0, 0}, [&](Mode) { return ::close(fd); }); },
    [](int folder, const char* from, const char* to) {
        return perform({kRename, from, to, 0, 0}, [&](Mode) { return ::renameat(folder, from, folder, to); });
    },
    [](int folder, const char* name) {
        return perform({kUnlink, name, nullptr, 0, 0}, [&](Mode) { return ::unlinkat(folder, name, 0); });
    },
    [](int fd, off_t size, const char* name) {
        const auto length = static_cast<uint64_t>(size);
        return perform({kFallocate, name, nullptr, 0, length}, [&](Mode) { return ::fallocate(fd, 0, 0, size); });
    },
    [](int fd, off_t size, const char* name) {
        const auto length = static_cast<uint64_t>(size);
        return perform({kFtruncate, name, nullptr, 0, length}, [&](Mode) { return ::ftruncate(fd, size); });
    },
};

void print_counts() {
    std::string line = "NF_FAULT_COUNT";
    for (unsigned op = 0; op < kOps; ++op)
        line += std::string(" ") + kOpNames[op] + "=" + std::to_string(counts[op].load());
    write_line(STDERR_FILENO, line + "\n");
}

}  // namespace

const Operations* faulty(const std::string& fault_text, const std::string& rank, const std::string& count,
                         const std::string& log) {
    const bool counting = !count.empty() && number("NF_FAULT_COUNT", count, 0, 1) == 1;
    if (!log.empty()) {
        log_fd = static_cast<int>(number("NF_FAULT_LOG", log, 0, std::numeric_limits<int>::max()));
        if (::fcntl(log_fd, F_GETFD) == -1) refuse("NF_FAULT_LOG", "an open descriptor", log);
    }
    watching = counting || log_fd >= 0;
    const uint64_t own_rank = rank.empty() ? 0 : number("RANK", rank, 0, std::numeric_limits<uint32_t>::max());
    if (!fault_text.empty()) parse_fault(fault_text, own_rank);
    if (counting) std::atexit(print_counts);
    return fault_text.empty() && !watching ? &plain : &kFaulty;
}

}  // namespace nf::io
