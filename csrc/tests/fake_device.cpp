#include "fake_device.h"

#include <dlfcn.h>
#include <execinfo.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <utility>

// Weak: there where the process runs ThreadSanitizer, null elsewhere.
extern "C" {
__attribute__((weak)) void AnnotateIgnoreSyncBegin(const char*, int);
__attribute__((weak)) void AnnotateIgnoreSyncEnd(const char*, int);
__attribute__((weak)) void AnnotateIgnoreReadsBegin(const char*, int);
__attribute__((weak)) void AnnotateIgnoreReadsEnd(const char*, int);
__attribute__((weak)) void AnnotateIgnoreWritesBegin(const char*, int);
__attribute__((weak)) void AnnotateIgnoreWritesEnd(const char*, int);
__attribute__((weak)) void __tsan_acquire(void*);
__attribute__((weak)) void __tsan_release(void*);
}

namespace nf::fake {
namespace {

struct __attribute__((packed, may_alias)) Word {
    uint64_t value;
};

constexpr size_t kPiece = 4096;
constexpr uint8_t kGarbage = 0xA5, kNan = 0xFF;
constexpr size_t kTextLimit = 8191;

void tell_release(void* token) {
    if (__tsan_release != nullptr) __tsan_release(token);
}

void tell_acquire(void* token) {
    if (__tsan_acquire != nullptr) __tsan_acquire(token);
}

std::string trimmed(const std::string& text) {
    const size_t begin = text.find_first_not_of(" \t\n"), end = text.find_last_not_of(" \t\n");
    return begin == std::string::npos ? "" : text.substr(begin, end - begin + 1);
}

[[noreturn]] void refuse(const std::string& pair) {
    std::fprintf(stderr, "NF_FAKE_CUDA: \"%s\" is not understood; the keys are in fake_cuda.h\n", pair.c_str());
    std::abort();
}

uint64_t number(const std::string& pair, const std::string& value) {
    char* end = nullptr;
    const uint64_t parsed = std::strtoull(value.c_str(), &end, 10);
    if (value.empty() || *end != '\0') refuse(pair);
    return parsed;
}

void move_piece(Op& op) {
    const size_t begin = op.pieces.back() * kPiece, size = std::min(kPiece, op.bytes - begin);
    op.pieces.pop_back();
    if (op.kind == Kind::kToHost)
        move_bytes(op.host + begin, op.device + begin, size);
    else
        move_bytes(op.device + begin, op.host + begin, size);
}

void shuffle_pieces(Op& op) {
    op.pieces.resize((op.bytes + kPiece - 1) / kPiece);
    for (size_t i = 0; i < op.pieces.size(); ++i) op.pieces[i] = static_cast<uint32_t>(i);
    for (size_t i = op.pieces.size(); i > 1; --i) std::swap(op.pieces[i - 1], op.pieces[op.random.below(i)]);
}

// Seen by ThreadSanitizer. True when nothing is left to do.
bool run(Op& op, bool one_piece) {
    if (op.kind == Kind::kKernel) {
        in_kernel = true;
        op.kernel();
        in_kernel = false;
    }
    while (!op.pieces.empty()) {
        move_piece(op);
        if (one_piece) break;
    }
    return op.pieces.empty();
}

bool overlap(const void* a, size_t a_bytes, const void* b, size_t b_bytes) {
    const auto x = reinterpret_cast<uintptr_t>(a), y = reinterpret_cast<uintptr_t>(b);
    return x < y + b_bytes && y < x + a_bytes;
}

bool fatal(int code) { return code == kDeinitialized || code == 214 || code == 700 || code == 719; }

bool ready(const Op& op) {
    return std::all_of(op.after.begin(), op.after.end(), [](const OpPtr& other) { return other->done; });
}

}  // namespace

thread_local bool in_kernel = false, capturing = false;
thread_local void* current_context = nullptr;
thread_local int capture_mode = 0;  // global
thread_local int late_error = 0;

void Unseen::hide() {
    if (AnnotateIgnoreSyncBegin == nullptr) return;
    AnnotateIgnoreSyncBegin(__FILE__, __LINE__);
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
}

void Unseen::show() {
    if (AnnotateIgnoreSyncEnd == nullptr) return;
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
    AnnotateIgnoreSyncEnd(__FILE__, __LINE__);
}

uint64_t mix(uint64_t key, uint64_t i) {
    uint64_t z = key + (i + 1) * 0x9E3779B97F4A7C15;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    return z ^ z >> 31;
}

// Word by word, volatile so that it stays so: g++ 12's ThreadSanitizer loses what a memcpy called from here has
// written.
void move_bytes(uint8_t* to, const uint8_t* from, size_t bytes) {
    size_t i = 0;
    for (; i + 8 <= bytes; i += 8)
        reinterpret_cast<volatile Word*>(to + i)->value = reinterpret_cast<const volatile Word*>(from + i)->value;
    for (; i < bytes; ++i) const_cast<volatile uint8_t*>(to)[i] = const_cast<const volatile uint8_t*>(from)[i];
}

uint64_t Random::next() { return mix(key_, count_++); }

Trace Trace::here() {
    Trace trace;
    trace.count = ::backtrace(trace.frames, static_cast<int>(std::size(trace.frames)));
    return trace;
}

std::string Trace::text() const {
    std::string text;
    for (int i = 0; i < count; ++i) {
        Dl_info info{};
        char frame[256];
        if (::dladdr(frames[i], &info) == 0 || info.dli_fname == nullptr) {
            std::snprintf(frame, sizeof frame, " %p", frames[i]);
        } else {
            const char* slash = std::strrchr(info.dli_fname, '/');
            std::snprintf(frame, sizeof frame, " %s+0x%zx", slash != nullptr ? slash + 1 : info.dli_fname,
                          reinterpret_cast<size_t>(frames[i]) - reinterpret_cast<size_t>(info.dli_fbase));
        }
        text += frame;
    }
    return text;
}

Allocation::Allocation(size_t size) : bytes(size), mapped((size + 4095) / 4096 * 4096) {
    const int fd = ::memfd_create("nf-fake-device", MFD_CLOEXEC);
    if (fd < 0) return;
    if (::ftruncate(fd, static_cast<off_t>(mapped)) == 0) {
        void* given = ::mmap(nullptr, mapped, PROT_NONE, MAP_SHARED, fd, 0);
        void* used = ::mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (given != MAP_FAILED && used != MAP_FAILED) {
            hidden = static_cast<uint8_t*>(used);
            address = reinterpret_cast<uint64_t>(given);
            std::memset(hidden, kNan, mapped);
        } else {
            if (given != MAP_FAILED) ::munmap(given, mapped);
            if (used != MAP_FAILED) ::munmap(used, mapped);
        }
    }
    ::close(fd);
}

Allocation::~Allocation() {
    if (!good()) return;
    ::munmap(reinterpret_cast<void*>(address), mapped);
    ::munmap(hidden, mapped);
}

Configuration Configuration::parse(const std::string& text) {
    Configuration c;
    for (size_t begin = 0; begin < text.size();) {
        const size_t end = std::min(text.find(';', begin), text.size());
        const std::string pair = trimmed(text.substr(begin, end - begin));
        begin = end + 1;
        if (pair.empty()) continue;
        const size_t equal = std::min(pair.find('='), pair.size() - 1);
        const std::string key = trimmed(pair.substr(0, equal)), value = trimmed(pair.substr(equal + 1));
        const bool of_a_call = key == "n" || key == "error" || key == "sticky" || key == "late";
        if (of_a_call && c.faults.empty()) refuse(pair);
        if (key == "call") {
            c.faults.emplace_back().call = value;
        } else if (key == "n") {
            c.faults.back().n = static_cast<long>(number(pair, value));
        } else if (key == "error") {
            c.faults.back().error = static_cast<int>(number(pair, value));
        } else if (key == "sticky") {
            c.faults.back().sticky = number(pair, value) != 0;
        } else if (key == "late") {
            c.faults.back().late = number(pair, value) != 0;
        } else if (key == "mode" && (value == "threads" || value == "scheduler")) {
            c.scheduler = value == "scheduler";
        } else if (key == "seed") {
            c.seed = number(pair, value);
        } else if (key == "max_delay_us") {
            c.max_delay_us = number(pair, value);
        } else if (key == "exit_on_violation") {
            c.exit_on_violation = number(pair, value) != 0;
        } else if (key == "dry") {
            c.dry = number(pair, value) != 0;
        } else if (key == "pageable") {
            c.pageable = number(pair, value) != 0;
        } else if (key == "missing") {
            c.missing = value;
        } else if (key == "bandwidth") {
            char* rest = nullptr;
            c.bandwidth = std::strtod(value.c_str(), &rest);
            if (!(c.bandwidth > 0) || *rest != '\0') refuse(pair);
        } else {
            refuse(pair);
        }
    }
    return c;
}

// Never destroyed: the threads of the streams outlive main().
Device& Device::get() {
    static Device& device = *new Device;
    return device;
}

int Device::lose(int code) {
    lost = code;
    changed.notify_all();
    return code;
}

void Device::fail_later(int code) {
    if (lost != 0 || code == 0) return;
    if (fatal(code))
        lose(code);
    else
        asynchronous = code;
}

int Device::check(const char* call, unsigned needs) {
    int injected = 0;
    late_error = 0;
    for (Fault& fault : configuration.faults) {
        if (fault.call != call) continue;
        const bool hit = ++fault.count == fault.n;
        if (hit && fault.late) late_error = fault.error;
        if ((hit && !fault.late) || (fault.sticky && fault.count > fault.n)) injected = fault.error;
    }
    if (lost != 0 && needs != kNothing) return lost;
    if (injected != 0) return fatal(injected) ? lose(injected) : injected;
    if (in_kernel) {
        violation("cuda-in-kernel", std::string(call) + " called by a kernel");
        return kNotPermitted;
    }
    if (needs == kNothing) return 0;
    if (!initialized) return kNotInitialized;
    if (asynchronous != 0) return std::exchange(asynchronous, 0);
    if ((needs & kContext) != 0 && current_context == nullptr) return kInvalidContext;
    // Relaxed 2 may do all; thread-local 1 only minds its own capture; global 0 minds every one.
    if ((needs & kUnsafe) != 0 && (capture_mode == 0 ? captures > 0 : capture_mode == 1 && capturing)) {
        capture_broken = true;
        return kCaptureUnsupported;
    }
    return 0;
}

void Device::violation(const char* kind, const std::string& text, const Trace* other, const char* what) {
    ++violations;
    std::string line = std::string(kind) + ": " + text + "; called at" + Trace::here().text();
    if (other != nullptr) line += "; " + std::string(what) + " at" + other->text();
    line += '\n';
    if (configuration.exit_on_violation) {
        std::fputs(("violation: " + line).c_str(), stderr);
        std::fflush(stderr);
        Unseen::show();  // or ThreadSanitizer replaces the status
        ::_exit(99);
    }
    violation_text = (violation_text + line).substr(0, kTextLimit);
}

StreamPtr Device::make_stream(uintptr_t handle, bool blocking, int priority) {
    auto stream = std::make_shared<Stream>();
    stream->handle = handle;
    stream->blocking = blocking;
    stream->priority = priority;
    streams[handle] = stream;
    Unseen::show();  // what its creator did before is known to the stream
    std::thread([this, stream]() mutable { serve(std::move(stream)); }).detach();
    Unseen::hide();
    return stream;
}

StreamPtr Device::find_stream(void* handle, const char* call) {
    auto key = reinterpret_cast<uintptr_t>(handle);
    if (key == 1) key = 0;  // CU_STREAM_LEGACY
    const auto found = streams.find(key);
    if (found != streams.end() && !found->second->destroyed) return found->second;
    if (key == 0) return make_stream(0, true, 0);
    const auto grave = graves.find(key);
    if (grave != graves.end())
        violation("destroyed-handle", std::string(call) + " of a stream", &grave->second, "destroyed");
    else
        violation("unknown-handle", std::string(call) + " of no stream");
    return nullptr;
}

std::shared_ptr<Event> Device::find_event(void* handle, const char* call) {
    const auto key = reinterpret_cast<uintptr_t>(handle);
    const auto found = events.find(key);
    if (found != events.end()) return found->second;
    const auto grave = graves.find(key);
    if (grave != graves.end())
        violation("destroyed-handle", std::string(call) + " of an event", &grave->second, "destroyed");
    else
        violation("unknown-handle", std::string(call) + " of no event");
    return nullptr;
}

std::shared_ptr<Allocation> Device::find_memory(uint64_t address, size_t bytes, const char* call) {
    auto next = allocations.upper_bound(address);
    if (next != allocations.begin()) {
        const auto& memory = std::prev(next)->second;
        const uint64_t offset = address - memory->address;
        if (offset < memory->bytes && bytes <= memory->bytes - offset) return memory;
    }
    const auto gone = freed.upper_bound(address);
    const auto* grave = gone != freed.begin() ? &*std::prev(gone) : nullptr;
    if (grave != nullptr && address - grave->first < grave->second.first)
        violation("freed-device-memory", std::string(call) + " of " + std::to_string(bytes) + " bytes",
                  &grave->second.second, "freed");
    else
        violation("device-range", std::string(call) + " of " + std::to_string(bytes) + " bytes not in one allocation");
    return nullptr;
}

void Device::remove_if_drained(const StreamPtr& stream) {
    if (stream->destroyed && stream->queue.empty()) streams.erase(stream->handle);
}

bool Device::is_registered(const void* host, size_t bytes) const {
    const auto address = reinterpret_cast<uintptr_t>(host);
    const auto next = registrations.upper_bound(address);
    if (next == registrations.begin()) return false;
    const auto& [begin, size] = *std::prev(next);
    return address - begin < size && bytes <= size - (address - begin);
}

OpPtr Device::pending_on(const void* host, size_t bytes) const {
    for (const auto& [handle, stream] : streams)
        for (const OpPtr& op : stream->queue)
            if (op->host != nullptr && overlap(op->host, op->bytes, host, bytes)) return op;
    return nullptr;
}

OpPtr Device::pending_on(const Allocation& memory) const {
    for (const auto& [handle, stream] : streams)
        for (const OpPtr& op : stream->queue)
            if (op->memory.get() == &memory) return op;
    return nullptr;
}

OpPtr Device::make_op(Kind kind, const char* call) {
    auto op = std::make_shared<Op>();
    op->kind = kind;
    op->call = call;
    op->serial = serial++;
    op->trace = Trace::here();
    op->random = Random(mix(configuration.seed, op->serial));
    return op;
}

void Device::enqueue(const StreamPtr& stream, const OpPtr& op) {
    for (const auto& [handle, other] : streams)  // the default stream and the blocking ones wait for each other
        if (other != stream && other->blocking && stream->blocking && (handle == 0 || stream->handle == 0) &&
            other->last != nullptr)
            op->after.push_back(other->last);
    if ((op->kind == Kind::kToHost || op->kind == Kind::kToDevice) && configuration.bandwidth > 0) {
        const std::chrono::duration<double> busy(static_cast<double>(op->bytes) / configuration.bandwidth);
        op->duration = std::chrono::duration_cast<Clock::duration>(busy);
    }
    op->error = std::exchange(late_error, 0);
    op->queued = Clock::now();
    op->garbage_first = op->kind == Kind::kToHost && !configuration.dry && pending_on(op->host, op->bytes) != nullptr;
    const bool fill = op->kind == Kind::kToHost && !op->garbage_first && !configuration.dry;
    uint8_t* const target = fill ? op->host : nullptr;
    const size_t bytes = op->bytes;
    void* const token = &op->queued_token;
    Unseen::show();
    if (target != nullptr) std::memset(target, kGarbage, bytes);
    tell_release(token);
    Unseen::hide();
    stream->queue.push_back(op);
    stream->last = op;
    changed.notify_all();
}

bool Device::startable(const Stream& stream) const {
    if (stream.running || stream.queue.empty() || !ready(*stream.queue.front())) return false;
    if (stream.queue.front()->kind != Kind::kKernel) return true;
    return std::none_of(streams.begin(), streams.end(), [&](const auto& entry) {
        const Stream& other = *entry.second;
        return other.priority < stream.priority && !other.queue.empty() && other.queue.front()->kind == Kind::kKernel &&
               ready(*other.queue.front());
    });
}

// What comes before the first piece, seen by ThreadSanitizer.
void Device::begin(Op& op) const {
    tell_acquire(&op.queued_token);
    for (const OpPtr& other : op.after) tell_acquire(&other->done_token);
    if (op.kind == Kind::kMark || (op.kind == Kind::kKernel && op.duration.count() > 0)) return;
    const uint64_t delay_us = op.random.below(configuration.max_delay_us + 1);
    if (!configuration.scheduler && delay_us > 0) std::this_thread::sleep_for(std::chrono::microseconds(delay_us));
    if (op.kind == Kind::kKernel || configuration.dry) return;
    if (op.garbage_first) std::memset(op.host, kGarbage, op.bytes);
    shuffle_pieces(op);
}

void Device::execute(const StreamPtr& stream, Lock& lock, bool one_piece) {
    const OpPtr op = stream->queue.front();
    const bool dropped = lost != 0 || op->error != 0, first = !std::exchange(op->started, true);
    stream->running = true;
    lock.unlock();
    Unseen::show();
    const auto start = op->after.empty() ? std::max(op->queued, stream->busy_until) : Clock::now();
    if (first && !dropped) begin(*op);
    const bool finished = dropped || run(*op, one_piece);
    if (!configuration.scheduler && !dropped && (op->kind != Kind::kMark || !op->after.empty())) {
        const auto now = Clock::now(), end = start + op->duration;
        if (now < end) std::this_thread::sleep_until(end);
        stream->busy_until = std::max(now, end);  // not the time of waking: late wakes must not add up
    }
    if (finished) tell_release(&op->done_token);
    Unseen::hide();
    lock.lock();
    stream->running = false;
    if (finished) finish(stream, op, dropped);
}

void Device::finish(const StreamPtr& stream, const OpPtr& op, bool dropped) {
    op->done = true;
    op->after.clear();
    op->memory.reset();
    op->kernel = nullptr;
    op->pieces.clear();
    stream->queue.pop_front();
    if (!dropped && op->kind == Kind::kToHost) copied_d2h += static_cast<long>(op->bytes);
    if (!dropped && op->kind == Kind::kToDevice) copied_h2d += static_cast<long>(op->bytes);
    fail_later(op->error);
    remove_if_drained(stream);
}

void Device::serve(StreamPtr&& given) {
    sigset_t all;
    ::sigfillset(&all);
    ::pthread_sigmask(SIG_SETMASK, &all, nullptr);
    ::pthread_setname_np(::pthread_self(), "nf-fake-stream");
    const Unseen unseen;
    const StreamPtr stream = std::move(given);  // freed unseen
    Lock lock(mutex);
    const bool scheduled = configuration.scheduler;
    const auto over = [&] { return stream->destroyed && stream->queue.empty() && stream->turns == 0; };
    for (;;) {
        changed.wait(lock, [&] { return scheduled ? stream->turns > 0 || over() : startable(*stream) || over(); });
        if (over()) return;
        execute(stream, lock, scheduled);
        if (scheduled) stream->turns = startable(*stream) ? stream->turns - 1 : 0;
        changed.notify_all();
    }
}

// The first in a random ranking of the streams that can go on does so, for up to `most` pieces; false if there is none.
// A ranking lasts for some steps: a stream that is always last shows more than streams that go on side by side.
bool Device::step(Lock& lock, uint64_t most) {
    if (draws.below(8) == 0) ranking = draws.next();
    StreamPtr stream;
    uint64_t position = 0, best = 0;
    for (const auto& [handle, other] : streams) {
        const uint64_t rank = mix(ranking, position++);
        if (other->turns > 0 || !startable(*other) || (stream != nullptr && rank >= best)) continue;
        stream = other;
        best = rank;
    }
    if (stream == nullptr) return false;
    stream->turns = most;
    changed.notify_all();
    changed.wait(lock, [&] { return stream->turns == 0; });
    return true;
}

void Device::advance(Lock& lock) {
    if (!configuration.scheduler || in_kernel || draws.below(laziness) != 0) return;
    step(lock, uint64_t{1} << draws.below(12));
}

int Device::wait(const OpPtr& op, Lock& lock) {
    while (!op->done && lost == 0)
        if (!configuration.scheduler || !step(lock, uint64_t{1} << draws.below(12))) changed.wait(lock);
    if (lost != 0) return lost;
    observe(*op);
    return std::exchange(asynchronous, 0);
}

void Device::observe(Op& op) {
    Unseen::show();
    tell_acquire(&op.done_token);
    Unseen::hide();
}

bool Device::idle() const {
    return std::all_of(streams.begin(), streams.end(), [](const auto& entry) { return entry.second->queue.empty(); });
}

void Device::drain(Lock& lock) {
    while (!idle())
        if (!configuration.scheduler || !step(lock, 1)) changed.wait(lock);
    for (const auto& [handle, stream] : streams)
        if (stream->last != nullptr) observe(*stream->last);
}

void Device::configure(Lock& lock, const Configuration& wanted) {
    drain(lock);
    const bool only_default = std::all_of(streams.begin(), streams.end(), [](auto& entry) { return entry.first == 0; });
    if (wanted.scheduler != configuration.scheduler) {
        if (!only_default) {
            std::fputs("NF_FAKE_CUDA: the mode cannot change while there are streams\n", stderr);
            std::abort();
        }
        close_streams();
    }
    configuration = wanted;
    draws = Random(wanted.seed);
    ranking = draws.next();
    laziness = uint64_t{1} << draws.below(6);
    serial = 0;
}

void Device::close_streams() {
    for (auto& [handle, stream] : streams) stream->destroyed = true;
    streams.clear();
    changed.notify_all();
}

void Device::forget(Lock& lock) {
    drain(lock);
    close_streams();
    events.clear();
    graves.clear();
    allocations.clear();
    freed.clear();
    registrations.clear();
    lost = asynchronous = captures = 0;
    capture_broken = capturing = false;
    violations = copied_d2h = copied_h2d = 0;
    violation_text.clear();
}

}  // namespace nf::fake
