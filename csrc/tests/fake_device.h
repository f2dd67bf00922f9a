// The device behind the stand-in CUDA driver: streams of operations, memory, faults, and the rules about them.
//
// One mutex guards all of it. ThreadSanitizer must not see that mutex, or its order would stand in for an event wait
// that the program forgot: all bookkeeping runs `Unseen` (neither accesses nor synchronisation are recorded), only the
// moving of bytes and the kernels are seen, and the orders that CUDA gives are told by hand: enqueue -> execution, and
// completion -> event wait, synchronize, successful query. Order within a stream is that of its thread: the scheduler,
// too, has a thread for each stream, and lets one of them move at a time.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace nf::fake {

constexpr int kInvalidValue = 1, kOutOfMemory = 2, kNotInitialized = 3, kDeinitialized = 4, kInvalidDevice = 101,
              kInvalidContext = 201, kInvalidHandle = 400, kNotReady = 600, kAlreadyRegistered = 712,
              kNotRegistered = 713, kNotPermitted = 800, kCaptureUnsupported = 900, kCaptureInvalidated = 901;

using Clock = std::chrono::steady_clock;
using Lock = std::unique_lock<std::mutex>;

struct Unseen {
    Unseen() { hide(); }
    ~Unseen() { show(); }
    Unseen(const Unseen&) = delete;
    Unseen& operator=(const Unseen&) = delete;
    static void hide();
    static void show();
};

struct Trace {  // a call site
    void* frames[16];
    int count = 0;
    static Trace here();
    std::string text() const;
};

class Random {
  public:
    explicit Random(uint64_t key = 0) : key_(key) {}
    uint64_t next();
    uint64_t below(uint64_t n) { return next() % n; }

  private:
    uint64_t key_, count_ = 0;
};

uint64_t mix(uint64_t key, uint64_t i);

// Word by word, volatile so that it stays so: under g++ 12 ThreadSanitizer lost what a memcpy called here had written.
void move_bytes(uint8_t* to, const uint8_t* from, size_t bytes);

// One memfd mapped twice: the address given out cannot be touched, the driver uses the other.
struct Allocation {
    explicit Allocation(size_t bytes);
    ~Allocation();
    Allocation(const Allocation&) = delete;
    Allocation& operator=(const Allocation&) = delete;
    bool good() const { return address != 0; }

    size_t bytes, mapped;
    uint64_t address = 0;
    uint8_t* hidden = nullptr;
};

enum class Kind { kMark, kToHost, kToDevice, kKernel };

struct Op {
    Kind kind = Kind::kMark;
    const char* call = "";
    uint64_t serial = 0;
    Trace trace;
    std::vector<std::shared_ptr<Op>> after;  // of other streams
    uint8_t* host = nullptr;                 // copies
    uint8_t* device = nullptr;               // hidden mapping
    size_t bytes = 0;
    std::shared_ptr<Allocation> memory;
    std::function<void()> kernel;
    Clock::duration duration{0};
    Clock::time_point queued;
    Random random;
    bool garbage_first = false;  // the target gets its 0xA5 when the copy starts: earlier work still uses it
    int error = 0;               // found when it runs
    bool started = false, done = false;
    std::vector<uint32_t> pieces;  // still to be moved
    char queued_token = 0, done_token = 0;
};
using OpPtr = std::shared_ptr<Op>;

struct Stream {
    uintptr_t handle = 0;
    bool blocking = true;  // ordered with handle 0
    int priority = 0;
    std::deque<OpPtr> queue;
    OpPtr last;
    Clock::time_point busy_until{};
    bool running = false, destroyed = false;
    uint64_t turns = 0;  // scheduler: pieces it may still move
};
using StreamPtr = std::shared_ptr<Stream>;

struct Event {
    OpPtr mark;  // the newest record
};

struct Fault {
    std::string call;
    long n = 1, count = 0;
    int error = 0;
    bool sticky = false, late = false;
};

struct Configuration {
    bool scheduler = false, exit_on_violation = false, pageable = false, dry = false;
    uint64_t seed = 0, max_delay_us = 5000;
    double bandwidth = 0;
    std::vector<Fault> faults;
    std::string missing;
    static Configuration parse(const std::string& text);  // prints what is wrong and aborts
};

enum Needs : unsigned { kNothing = 0, kInit = 1, kContext = 2, kUnsafe = 4 };

class Device {
  public:
    static Device& get();

    // What every call begins with: faults, initialisation, context, capture.
    int check(const char* call, unsigned needs);
    int lose(int code);
    void fail_later(int code);
    void violation(const char* kind, const std::string& text, const Trace* other = nullptr, const char* what = "");

    StreamPtr make_stream(uintptr_t handle, bool blocking, int priority);
    StreamPtr find_stream(void* handle, const char* call);
    std::shared_ptr<Event> find_event(void* handle, const char* call);
    void bury(void* handle) { graves[reinterpret_cast<uintptr_t>(handle)] = Trace::here(); }
    std::shared_ptr<Allocation> find_memory(uint64_t address, size_t bytes, const char* call);
    void remove_if_drained(const StreamPtr& stream);
    bool is_registered(const void* host, size_t bytes) const;
    OpPtr pending_on(const void* host, size_t bytes) const;
    OpPtr pending_on(const Allocation& memory) const;

    OpPtr make_op(Kind kind, const char* call);
    void enqueue(const StreamPtr& stream, const OpPtr& op);
    void advance(Lock& lock);               // scheduler: runs some pieces
    int wait(const OpPtr& op, Lock& lock);  // until it is done; 0 or the error of a lost device
    static void observe(Op& op);            // the caller now knows that it is done
    bool idle() const;
    void drain(Lock& lock);
    void configure(Lock& lock, const Configuration& wanted);
    void forget(Lock& lock);  // every object, error and violation

    std::mutex mutex;
    std::condition_variable changed;
    Configuration configuration;
    Random draws;
    uint64_t ranking = 0, laziness = 1;  // scheduler: one call in `laziness` runs something
    bool initialized = false;
    int lost = 0, asynchronous = 0;  // the error of every call from now on; the one of the next call
    int captures = 0;
    bool capture_broken = false;
    uint64_t next_handle = 0x5100000000, serial = 0;
    std::map<uintptr_t, StreamPtr> streams;  // those destroyed with work left, too
    std::map<uintptr_t, std::shared_ptr<Event>> events;
    std::map<uintptr_t, Trace> graves;
    std::map<uint64_t, std::shared_ptr<Allocation>> allocations;
    std::map<uint64_t, std::pair<size_t, Trace>> freed;
    std::map<uintptr_t, size_t> registrations;
    long violations = 0, copied_d2h = 0, copied_h2d = 0;
    std::string violation_text;

  private:
    void close_streams();
    void serve(StreamPtr&& given);
    bool startable(const Stream& stream) const;
    bool step(Lock& lock, uint64_t most);
    void execute(const StreamPtr& stream, Lock& lock, bool one_piece);
    void begin(Op& op) const;
    void finish(const StreamPtr& stream, const OpPtr& op, bool dropped);
};

extern thread_local bool in_kernel, capturing;
extern thread_local void* current_context;
extern thread_local int capture_mode;
extern thread_local int late_error;  // of the call in progress

}  // namespace nf::fake
