// The engine as storage.py drives it, against the stand-in CUDA driver, injected faults and forks.
//
//   engine_test [--folder DIR] [--seeds N] [--first N] [--part NAME]
//
// Each part prints `name: passed/cases, what it saw`; exits 1 where they differ. A hang ends by SIGALRM and names its
// case. The truth is what the test wrote: every sample and record is compared with its own copy.
#include "cache/engine.h"

#include <dirent.h>
#include <dlfcn.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "cache/error.h"
#include "cache/planner.h"
#include "cache/reader.h"
#include "cache/writer.h"
#include "cache_data.h"
#include "fake_cuda.h"
#include "gpu/driver.h"
#include "io/crc32c.h"
#include "io/error.h"
#include "io/fork.h"
#include "io/io_vtable.h"

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif
const pid_t main_process = ::getpid();

// The engine's own unmapping comes by here: not under a copy, not while it is registered. Hidden, so that the stand-in
// driver, which holds its lock when it unmaps, does not.
extern "C" __attribute__((visibility("hidden"))) int munmap(void* address, size_t bytes) noexcept {
    static const auto real = reinterpret_cast<int (*)(void*, size_t)>(::dlsym(RTLD_NEXT, "munmap"));
    if (::getpid() == main_process) nf_fake_before_unmap(address, bytes);
    return real(address, bytes);
}

namespace {

using Pointer = unsigned long long;
using std::chrono::microseconds;

std::string folder_path = "/dev/shm", under_way;
uint64_t seeds = 1000, first_seed = 0;
bool faulty = false;  // the device fails, and what the engine gave up it leaves as it is
std::atomic<int> wrong{0};

#define EXPECT(condition) expect((condition), #condition, __LINE__)
bool expect(bool good, const std::string& what, int line) {
    if (good) return true;
    if (wrong++ < 5) std::fprintf(stderr, "%s: line %d: %s\n", under_way.c_str(), line, what.c_str());
    return false;
}

// The error's name, "" without one. Errors of any other type are the test's failures.
template <typename Body>
std::string error_of(Body body) {
    try {
        body();
        return "";
    } catch (const nf::ClosedError&) {
        return "closed";
    } catch (const nf::CountError&) {
        return "count";
    } catch (const nf::MemoryError&) {
        return "memory";
    } catch (const nf::gpu::DeviceError& error) {
        EXPECT(!error.call.empty());
        return "device";
    } catch (const nf::SystemError& error) {
        EXPECT(!error.op.empty() && !error.path.empty() && error.code > 0);
        return "system";
    } catch (const nf::CorruptError&) {
        return "corrupt";
    } catch (const nf::TruncatedError&) {
        return "truncated";
    } catch (const nf::IncompleteError&) {
        return "incomplete";
    } catch (const nf::FormatError&) {
        return "format";
    }
}

bool part(
    const std::string& name, uint64_t count, const std::function<void(uint64_t)>& body,
    const std::function<std::string()>& summary = [] { return std::string(); }) {
    uint64_t passed = 0;
    for (uint64_t seed = first_seed; seed < first_seed + count; ++seed) {
        under_way = name + " " + std::to_string(seed);
        ::alarm(120);
        wrong = 0;
        try {
            body(seed);
        } catch (const std::exception& error) {
            EXPECT(!"an exception") || std::fprintf(stderr, "%s\n", error.what());
        }
        passed += wrong == 0;
    }
    ::alarm(0);
    std::printf("%s: %lu/%lu%s\n", name.c_str(), static_cast<unsigned long>(passed), static_cast<unsigned long>(count),
                summary().c_str());
    std::fflush(stdout);
    return passed == count;
}

// --- torch: device memory, a stream with kernels, and a context of its own or none

struct Refused : std::runtime_error {  // a call of the test itself, after an injected fault
    using std::runtime_error::runtime_error;
};

void must(int code) {
    if (code != 0) throw Refused("the stand-in driver gave " + std::to_string(code));
}

class Borrowed {  // the context, for the test's own calls
  public:
    Borrowed() {
        void* context = nullptr;
        must(cuInit(0));
        must(cuCtxGetCurrent(&before_));
        must(cuDevicePrimaryCtxRetain(&context, 0));
        must(cuCtxSetCurrent(context));
    }
    ~Borrowed() { cuCtxSetCurrent(before_); }
    Borrowed(const Borrowed&) = delete;
    Borrowed& operator=(const Borrowed&) = delete;

  private:
    void* before_ = nullptr;
};

nf_fake_report report() {
    nf_fake_report now{};
    nf_fake_get_report(&now);
    return now;
}

// No kernel of the test runs any more; on a lost device too, where the drain is refused.
void settle() {
    nf_fake_drain();
    while (report().pending > 0) std::this_thread::sleep_for(microseconds(50));
}

struct Settled {  // before what its kernels use goes, when an error ends a function
    ~Settled() {
        if (std::uncaught_exceptions() > 0) settle();
    }
};

struct Memory {
    explicit Memory(size_t bytes) {
        const Borrowed context;
        must(cuMemAlloc_v2(&address, bytes));
    }
    ~Memory() {
        if (std::uncaught_exceptions() > 0) settle();
        try {
            const Borrowed context;
            cuMemFree_v2(address);
        } catch (const Refused&) {
            return;  // the device is lost, and forgets all at the end of the case
        }
    }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    Pointer address = 0;
};

class Torch {
  public:
    explicit Torch(Random random) {
        const Borrowed context;
        must(cuEventCreate(&event_, 2));
        if (random.one_in(2)) must(cuStreamCreateWithPriority(&stream, random.below(2), 0));
    }
    ~Torch() {
        settle();
        try {
            const Borrowed context;
            cuEventDestroy_v2(event_);
            if (stream != nullptr) cuStreamDestroy_v2(stream);
        } catch (const Refused&) {
            return;
        }
    }
    Torch(const Torch&) = delete;
    Torch& operator=(const Torch&) = delete;

    void launch(std::function<void()> kernel) {
        const Borrowed context;
        kernels_.push_back(std::make_unique<std::function<void()>>(std::move(kernel)));
        must(nf_fake_launch(
            stream, [](void* user) { (*static_cast<std::function<void()>*>(user))(); }, kernels_.back().get()));
    }
    void sleep(uint64_t us) {
        const Borrowed context;
        must(nf_fake_launch_sleep(stream, static_cast<long>(us)));
    }
    void fill(Pointer to, const uint8_t* from, size_t bytes) {
        launch([=] { std::memcpy(nf_fake_host(to), from, bytes); });
    }
    void garble(Pointer at, size_t bytes) {
        launch([=] { std::memset(nf_fake_host(at), 0x5C, bytes); });
    }
    void synchronize() {
        const Borrowed context;
        must(cuEventRecord(event_, stream));
        must(cuEventSynchronize(event_));
    }
    void* stream = nullptr;  // null: the default stream

  private:
    void* event_ = nullptr;
    std::deque<std::unique_ptr<std::function<void()>>> kernels_;
};

// The context of this thread, set for its life; the engine must leave it as it was, and must not need it.
class ThreadContext {
  public:
    explicit ThreadContext(bool set) {
        if (!set) return;
        must(cuInit(0));
        must(cuDevicePrimaryCtxRetain(&context_, 0));
        must(cuCtxSetCurrent(context_));
    }
    ~ThreadContext() { cuCtxSetCurrent(nullptr); }
    ThreadContext(const ThreadContext&) = delete;
    ThreadContext& operator=(const ThreadContext&) = delete;
    void check() const {
        void* now = nullptr;
        if (!faulty && cuCtxGetCurrent(&now) == 0) EXPECT(now == context_);
    }

  private:
    void* context_ = nullptr;
};

void expect_nothing_left() {
    const nf_fake_report left = report();
    EXPECT(left.streams == 0 && left.events == 0 && left.registrations == 0 && left.allocations == 0);
    EXPECT(left.violations == 0) || std::fprintf(stderr, "%s", left.text);
}

// --- one cache written, one pass read

struct Place {
    std::shared_ptr<nf::Engine> engine;
    std::shared_ptr<nf::Folder> folder;
    std::string name;
    bool exists(const std::string& ending = "") const {
        return ::access((folder->path() + "/" + name + ending).c_str(), F_OK) == 0;
    }
    void remove() const { ::unlink((folder->path() + "/" + name).c_str()); }
};

// Two staging slots used in turn: a kernel fills one behind its fence, append takes it, the next kernel is queued at
// once. `until` < samples: given up there.
void write(const Place& place, const Data& data, Torch* torch, Random random, size_t until, int threads) {
    const ThreadContext context(torch != nullptr && random.one_in(2));
    const size_t batch = 1 + data.samples / 48 + random.below(data.samples);
    std::deque<Memory> device;
    for (int slot = 0; torch != nullptr && slot < 2; ++slot) device.emplace_back(batch * data.size);
    nf::Writer writer(place.engine, place.folder, place.name, data.header.data(), threads, 2, random.one_in(8));
    Bytes host(batch * data.size);
    for (size_t begin = 0, turn = 0; begin < until; begin += batch, ++turn) {
        const size_t slot = turn % 2, count = std::min(batch, until - begin), bytes = count * data.size;
        const uint8_t* from = &data.truth[begin * data.size];
        if (torch == nullptr || random.one_in(8)) {
            std::memcpy(host.data(), from, bytes);
            writer.append(host.data(), count, &data.records[begin], {});
            std::memset(host.data(), 0x5C, bytes);  // all of it has been copied
        } else {
            writer.fence(slot, torch->stream);
            if (random.one_in(4)) torch->sleep(random.below(500));
            torch->fill(device[slot].address, from, bytes);
            writer.append_device(device[slot].address, count, &data.records[begin], torch->stream, slot, {});
        }
        context.check();
    }
    if (until == data.samples) {
        for (size_t slot = 0; slot < device.size(); ++slot) {
            writer.fence(slot, torch->stream);
            torch->garble(device[slot].address, batch * data.size);
        }
        const Bytes table = writer.finish({});
        EXPECT(place.exists() && !place.exists(".tmp") && writer.appended() == data.samples);
        EXPECT(table.size() == (4 * data.chunks + 4095) / 4096 * 4096);
    } else if (random.one_in(4)) {
        EXPECT(error_of([&] { writer.finish({}); }) == "count");
        writer.abort();
    } else if (random.one_in(2)) {
        writer.abort();
        EXPECT(!place.exists(".tmp") && error_of([&] { writer.finish({}); }) == "closed");
    }
    if (torch != nullptr) torch->synchronize();
    context.check();
}

struct Joined {
    ~Joined() { join(); }
    void join() {
        if (thread.joinable()) thread.join();
    }
    std::thread thread;
};

std::mutex starting;  // a Reader is one thread's, its passes may be anybody's

void read(nf::Reader& reader, const Data& data, Torch* torch, Random random, int threads) {
    const ThreadContext context(torch != nullptr && random.one_in(2));
    nf::EpochOptions options;
    options.key = random.next();
    options.batch = 1 + data.samples / 48 + random.below(data.samples + 2);
    options.window_chunks = static_cast<int64_t>(1 + random.below(data.chunks + 2));
    options.drop_last = random.one_in(4);
    options.threads = threads;
    const uint64_t whole = data.samples / options.batch;
    const uint64_t batches = whole + (!options.drop_last && data.samples % options.batch != 0);
    options.first = random.one_in(3) ? random.below(batches + 1) : 0;
    const uint64_t end = random.one_in(4) ? options.first + random.below(batches - options.first + 1) : batches + 1;
    const size_t slots = 2 + random.one_in(4), bytes = options.batch * data.size;
    const auto order = nf::plan_order(options.key, static_cast<int64_t>(data.samples),
                                      static_cast<int64_t>(data.per_chunk), options.window_chunks);
    std::deque<Memory> device;
    std::deque<Bytes> host;
    for (size_t slot = 0; slot < slots; ++slot) {
        if (torch != nullptr) {
            device.emplace_back(bytes);
            options.ring.push_back(device.back().address);
        } else {
            host.emplace_back(bytes);
            options.ring.push_back(reinterpret_cast<uint64_t>(host.back().data()));
        }
    }
    std::atomic<size_t> bad{0};
    const Settled kernels;
    if (torch != nullptr) {  // work of before that still uses the ring
        options.on_device = true;
        options.stream = torch->stream;
        torch->sleep(random.below(600));
        for (const Memory& slot : device) torch->garble(slot.address, bytes);
    }
    std::shared_ptr<nf::Epoch> epoch;
    {
        const std::lock_guard<std::mutex> lock(starting);
        epoch = reader.start(options);
    }
    context.check();
    Joined stopper;
    const bool stopped = random.one_in(12);
    if (stopped)
        stopper.thread = std::thread([&epoch, us = random.below(1000)] {
            std::this_thread::sleep_for(microseconds(us));
            epoch->stop();
        });
    std::string error;
    for (uint64_t number = options.first; number < end && error.empty(); ++number) {
        nf::Epoch::Batch got{};
        error = error_of([&] { got = epoch->next(torch != nullptr ? torch->stream : nullptr, {}); });
        context.check();
        const size_t begin = std::min<size_t>(number * options.batch, data.samples);
        const size_t count = number >= batches ? 0 : std::min<size_t>(options.batch, data.samples - begin);
        if (!error.empty() || !EXPECT(got.count == count) || count == 0) break;
        EXPECT(got.slot == number % slots);
        const int64_t* positions = &order[begin];
        for (size_t k = 0; k < count; ++k)
            EXPECT(std::memcmp(&got.records[k], &data.records[static_cast<size_t>(positions[k])], 16) == 0);
        if (torch == nullptr) {
            bad += data.compare(host[got.slot].data(), positions, count);
        } else {
            if (random.one_in(3)) torch->sleep(random.below(1000));
            torch->launch([&bad, &data, at = device[got.slot].address, positions, count] {
                bad += data.compare(static_cast<uint8_t*>(nf_fake_host(at)), positions, count);
            });
        }
    }
    stopper.join();
    if (random.one_in(2)) epoch->stop();
    epoch.reset();
    if (error == "device") throw nf::gpu::DeviceError("next", 0, "passed on");
    EXPECT(error.empty() || (stopped && error == "closed"));
    if (torch != nullptr) torch->synchronize();
    EXPECT(bad == 0);
}

size_t piece_bytes(const Data& data) {
    return (std::max<size_t>(1, nf::kPieceBytes / data.size) * data.size + 4095) / 4096 * 4096;
}

void on_threads(std::vector<std::function<void()>> bodies) {
    std::vector<std::thread> threads;
    std::vector<std::exception_ptr> errors(bodies.size());
    for (size_t i = 0; i < bodies.size(); ++i)
        threads.emplace_back([&, i] {
            try {
                bodies[i]();
            } catch (...) {
                errors[i] = std::current_exception();
            }
        });
    for (std::thread& thread : threads) thread.join();
    for (const std::exception_ptr& error : errors)
        if (error) std::rethrow_exception(error);
}

// A cache given up half-way, one written, passes over it alone, two at once, or beside the writing of the next.
void round_trip(uint64_t seed, bool on_device) {
    Random random(seed);
    const Data data = Data::drawn(random.split());
    const int threads = 1 + static_cast<int>(seed % 4);
    const bool at_once = random.one_in(3);
    if (on_device) {
        nf_fake_reset();
        nf_fake_configure(("seed=" + std::to_string(seed) + "; max_delay_us=" + std::to_string(random.below(300)) +
                           (random.one_in(4) ? "; mode=scheduler" : "; mode=threads"))
                              .c_str());
    }
    const auto torch = [&] { return on_device ? std::make_unique<Torch>(random.split()) : nullptr; };
    {
        const size_t slabs = 2 + random.below(7), pieces = 2 + random.below(5);
        const size_t memory = at_once ? 8 * data.stride + 12 * piece_bytes(data)
                                      : std::max(slabs * data.stride, on_device ? pieces * piece_bytes(data) : 0);
        Place place{std::make_shared<nf::Engine>(memory, on_device ? 0 : -1, 60),
                    std::make_shared<nf::Folder>(folder_path), "x000-g0001.nfc"};
        EXPECT(place.engine->arena->pinned() == (on_device ? memory : 0));
        const auto main_stream = torch();
        if (random.one_in(3)) {
            write(place, data, main_stream.get(), random.split(), random.below(data.samples), threads);
            EXPECT(!place.exists() && !place.exists(".tmp"));
        }
        write(place, data, main_stream.get(), random.split(), data.samples, threads);
        {
            nf::Reader reader(place.engine, *place.folder, place.name);
            read(reader, data, main_stream.get(), random.split(), threads);
            if (at_once) {
                const auto a = torch(), b = torch();
                const Random of_a = random.split(), of_b = random.split();
                const Place next{place.engine, place.folder, "x001-g0001.nfc"};
                const auto pass = [&](const auto& stream, Random own) {
                    return [&, own] { read(reader, data, stream.get(), own, threads); };
                };
                if (random.one_in(2)) {
                    on_threads({pass(a, of_a), pass(b, of_b)});
                } else {
                    on_threads({pass(a, of_a), [&] { write(next, data, b.get(), of_b, data.samples, threads); }});
                    nf::Reader of_next(place.engine, *place.folder, next.name);
                    read(of_next, data, main_stream.get(), random.split(), threads);
                    next.remove();
                }
            }
        }
        place.remove();
    }
    if (on_device) expect_nothing_left();
}

bool device_part() {
    bytes_compared = 0;
    return part(
        "device", seeds, [](uint64_t seed) { round_trip(seed, true); },
        [] { return " bit-exact, " + std::to_string(bytes_compared / 1000000) + " MB compared, 0 violations"; });
}

bool cpu_part() {
    bytes_compared = 0;
    return part(
        "cpu", seeds, [](uint64_t seed) { round_trip(seed, false); },
        [] { return " bit-exact, " + std::to_string(bytes_compared / 1000000) + " MB compared"; });
}

// --- faults of the device

constexpr const char* kCalls[] = {"cuDeviceGet",
                                  "cuDevicePrimaryCtxRetain",
                                  "cuCtxGetCurrent",
                                  "cuCtxSetCurrent",
                                  "cuCtxGetStreamPriorityRange",
                                  "cuStreamCreateWithPriority",
                                  "cuStreamDestroy_v2",
                                  "cuStreamWaitEvent",
                                  "cuEventCreate",
                                  "cuEventRecord",
                                  "cuEventSynchronize",
                                  "cuEventDestroy_v2",
                                  "cuMemcpyDtoHAsync_v2",
                                  "cuMemcpyHtoDAsync_v2",
                                  "cuMemHostRegister_v2",
                                  "cuMemHostUnregister",
                                  "cuThreadExchangeStreamCaptureMode"};

struct Outcome {
    bool hit = false;  // an error was seen, or the device is lost
    bool written = false;
};

// Write, one whole pass, one left half-way. What was committed must be right, what was not must leave nothing.
Outcome with_fault(const std::string& fault) {
    const Data data(Random(7), 3000, 40, 9000);
    Outcome outcome;
    nf_fake_reset();
    nf_fake_configure(("max_delay_us=40; pageable=1; " + fault).c_str());
    Place place{nullptr, std::make_shared<nf::Folder>(folder_path), "x000-g0001.nfc"};
    const auto attempt = [&](const std::function<void()>& body) {
        try {
            const std::string error = error_of(body);
            EXPECT(error.empty() || error == "device");
            outcome.hit = outcome.hit || !error.empty();
        } catch (const Refused&) {
            outcome.hit = true;
        }
    };
    attempt([&] {
        place.engine = std::make_shared<nf::Engine>(18 << 20, 0, 60);
        Torch torch(Random(1));
        write(place, data, &torch, Random(2), data.samples, 1);
    });
    outcome.written = place.exists();
    EXPECT(!place.exists(".tmp"));
    attempt([&] {
        if (!outcome.written || outcome.hit) return;
        Torch torch(Random(1));
        nf::Reader reader(place.engine, *place.folder, place.name);
        for (const uint64_t seed : {1, 2, 3, 5}) read(reader, data, &torch, Random(seed), 1);
    });
    place.engine.reset();
    const nf_fake_report now = report();
    EXPECT(now.violations == 0) || std::fprintf(stderr, "%s", now.text);
    outcome.hit = outcome.hit || nf_fake_drain() != 0;
    nf_fake_reset();
    if (outcome.written) {
        place.engine = std::make_shared<nf::Engine>(1 << 20, -1, 60);
        nf::Reader reader(place.engine, *place.folder, place.name);
        read(reader, data, nullptr, Random(3), 1);
    }
    place.remove();
    return outcome;
}

// This program again, in an own process and environment; its exit status and what it printed.
std::pair<int, std::string> run_again(const std::string& part_name,
                                      const std::map<std::string, std::string>& variables) {
    int ends[2];
    if (::pipe(ends) != 0) std::abort();
    const pid_t child = ::fork();
    if (child == 0) {
        ::alarm(0);
        for (const auto& [name, value] : variables) ::setenv(name.c_str(), value.c_str(), 1);
        ::dup2(ends[1], 1);
        ::dup2(ends[1], 2);
        ::close(ends[0]);
        ::close(ends[1]);
        ::execl("/proc/self/exe", "engine_test", "--folder", folder_path.c_str(), "--part", part_name.c_str(), nullptr);
        ::_exit(127);
    }
    ::close(ends[1]);
    std::string text;
    char buffer[4096];
    for (ssize_t n; (n = ::read(ends[0], buffer, sizeof buffer)) > 0;) text.append(buffer, static_cast<size_t>(n));
    ::close(ends[0]);
    int status = 0;
    ::waitpid(child, &status, 0);
    return {WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status), text};
}

// Prints why there is no driver, or that there is.
bool open_part() {
    const nf::gpu::Status status = nf::gpu::status();
    const std::string error = error_of([] {
        try {
            nf::Engine(1 << 20, 0, 60);
        } catch (const nf::gpu::DeviceError&) {
            throw;
        } catch (const std::runtime_error& refused) {
            EXPECT(nf::gpu::status().reason == refused.what());
        }
    });
    nf::Engine without_device(1 << 20, -1, 60);
    std::printf("%s %s\n", status.available ? "available:" : "refused:", status.reason.c_str());
    return wrong == 0 && (error.empty() || error == "device");
}

bool faults_part() {
    std::vector<std::string> cases;
    Random random(3);
    faulty = true;
    for (const char* call : kCalls) {
        const std::string name = std::string("call=") + call;
        ::alarm(120);
        const auto hit = [&](uint64_t n) { return with_fault(name + "; error=700; n=" + std::to_string(n)).hit; };
        uint64_t made = 0, above = 1;  // calls in a sound run: the last n that hits anything
        while (hit(above)) made = std::exchange(above, 2 * above);
        while (above - made > 1) {
            const uint64_t middle = (made + above) / 2;
            (hit(middle) ? made : above) = middle;
        }
        expect(made > 0, name + " is never called", __LINE__);
        const uint64_t most = std::max<uint64_t>(1, seeds * 22 / 1000);
        for (const std::string error : {"error=2", "error=4", "error=700; late=1", "error=700"})
            for (uint64_t i = 0; i < std::min(made, most); ++i) {
                const uint64_t n = made <= most ? i + 1 : 1 + random.below(made);
                cases.push_back(name + "; n=" + std::to_string(n) + "; " + error);
            }
    }
    uint64_t lost = 0;
    const uint64_t begin = std::exchange(first_seed, 0);
    bool good = part(
        "faults", cases.size(),
        [&](uint64_t i) {
            under_way += " (" + cases[i] + ")";
            lost += with_fault(cases[i]).hit;
        },
        [&] { return " right or DeviceError, " + std::to_string(lost) + " of them DeviceError"; });

    expect(lost * 10 > cases.size() * 8, "most faults are met", __LINE__);
    faulty = false;
    std::vector<std::string> drivers;
    for (const char* call : {"cuInit", "cuDriverGetVersion", "cuDeviceGetCount"})
        for (const char* error : {"2", "4", "100", "700", "803", "999"})
            drivers.push_back(std::string("call=") + call + "; error=" + error);
#define NF_NAME(method, symbol, ...) drivers.push_back("missing=" symbol);
    NF_CUDA_FUNCTIONS(NF_NAME)
#undef NF_NAME
    good &= part(
        "no driver", drivers.size(),
        [&](uint64_t i) {
            under_way += " (" + drivers[i] + ")";
            const auto [status, text] = run_again("open", {{"NF_FAKE_CUDA", drivers[i]}});
            EXPECT(status == 0 && text.rfind("refused: ", 0) == 0) || std::fprintf(stderr, "%s", text.c_str());
        },
        [] { return std::string(" refused with the reason"); });
    first_seed = begin;
    return good;
}

// --- faults of the disk

// In a process of its own, whose environment says what fails: a named error or the right bytes, and no .tmp.
bool io_case() {
    under_way = std::getenv("NF_FAULT");
    ::alarm(60);
    nf::io::configure();
    const Data data(Random(7), 3000, 10, 9000);
    const std::string name = "x" + std::to_string(::getpid()) + ".nfc";
    Place place{std::make_shared<nf::Engine>(4 << 20, -1, 60), nullptr, name};
    std::string error = error_of([&] { place.folder = std::make_shared<nf::Folder>(folder_path); });
    if (!error.empty()) {
        std::printf("%s\n", error.c_str());
        return wrong == 0;
    }
    error = error_of([&] {
        nf::Writer writer(place.engine, place.folder, name, data.header.data(), 1, 2, true);
        writer.append(data.truth.data(), data.samples, data.records.data(), {});
        writer.finish({});
    });
    EXPECT(!place.exists(".tmp") && (error.empty() || error == "system"));
    // Only the folder's own fsync comes after the rename.
    if (!error.empty() && under_way.find("fsyncdir") == std::string::npos) EXPECT(!place.exists());
    if (error.empty()) {
        error = error_of([&] {
            nf::Reader reader(place.engine, *place.folder, name);
            nf::EpochOptions options;
            Bytes ring(2 * 4 * data.size);
            options.batch = 4;
            options.threads = 1;
            options.ring = {reinterpret_cast<uint64_t>(ring.data()), reinterpret_cast<uint64_t>(&ring[4 * data.size])};
            const auto order = nf::plan_order(0, 10, 3, 2);
            const auto epoch = reader.start(options);
            size_t seen = 0;
            for (nf::Epoch::Batch got; (got = epoch->next(nullptr, {})).count > 0; seen += got.count)
                EXPECT(data.compare(&ring[got.slot * 4 * data.size], &order[seen], got.count) == 0);
            EXPECT(seen == data.samples);
        });
    }
    std::printf("%s\n", error.empty() ? "right" : error.c_str());
    place.remove();
    return wrong == 0;
}

// A disk that hangs for longer than anybody waits: the caller gets its error within a second, the end is bounded.
bool stuck_case() {
    under_way = std::getenv("NF_FAULT");
    ::alarm(60);
    using Clock = std::chrono::steady_clock;
    const auto seconds_since = [](Clock::time_point begun) {
        return std::chrono::duration<double>(Clock::now() - begun).count();
    };
    nf::io::configure();
    const bool writing = under_way.find("pwrite") != std::string::npos;
    const Data data(Random(7), 3000, 10, 9000);
    const Place place{std::make_shared<nf::Engine>(4 << 20, -1, 0.5), std::make_shared<nf::Folder>(folder_path),
                      "stuck-" + std::to_string(::getpid()) + ".nfc"};
    auto writer = std::make_unique<nf::Writer>(place.engine, place.folder, place.name, data.header.data(), 1, 2, false);
    writer->append(data.truth.data(), data.samples, data.records.data(), {});
    auto begun = Clock::now();
    std::string error = error_of([&] { writer->finish({}); });
    if (writing) {
        EXPECT(error == "system" && seconds_since(begun) < 1.5);
        begun = Clock::now();
        writer->abort();
        EXPECT(!place.exists(".tmp"));
    } else {
        nf::Reader reader(place.engine, *place.folder, place.name);
        nf::EpochOptions options;
        Bytes ring(2 * data.size);
        options.ring = {reinterpret_cast<uint64_t>(ring.data()), reinterpret_cast<uint64_t>(&ring[data.size])};
        auto epoch = reader.start(options);
        begun = Clock::now();
        error = error_of([&] {
            while (epoch->next(nullptr, {}).count > 0) continue;  // first what is there
        });
        EXPECT(error == "system" && seconds_since(begun) < 1.5);
        begun = Clock::now();
        epoch.reset();
        reader.close();
        place.remove();
    }
    writer.reset();
    EXPECT(seconds_since(begun) < 13);                     // one patience of 10 s
    std::this_thread::sleep_for(std::chrono::seconds(8));  // the request ends, its memory is still there
    return wrong == 0;
}

std::map<std::string, int> io_counts() {
    const auto counted = run_again("io-case", {{"NF_TESTING", "1"}, {"NF_FAULT", "op=any"}, {"NF_FAULT_COUNT", "1"}});
    EXPECT(counted.first == 0) || std::fprintf(stderr, "%s", counted.second.c_str());
    std::map<std::string, int> counts;
    for (const char* op : {"open", "pread", "pwrite", "fsync", "fsyncdir", "close", "rename", "fallocate"}) {
        const size_t at = counted.second.find(std::string(" ") + op + "=");
        if (EXPECT(at != std::string::npos)) counts[op] = std::atoi(&counted.second[at + std::strlen(op) + 2]);
    }
    return counts;
}

bool io_part() {
    std::vector<std::string> cases;
    wrong = 0;
    for (const auto& [op, count] : io_counts())
        for (const std::string mode : {"errno:5", "errno:28", "delay:5", "short:1000", "flip:12345", "lie_write"}) {
            if (mode == "short:1000" && op != "pread" && op != "pwrite") continue;
            if ((mode == "flip:12345" && op != "pread") || (mode == "lie_write" && op != "pwrite")) continue;
            for (int n = 1; n <= count; ++n)
                for (const char* sticky : {"0", "1"})
                    cases.push_back("op=" + op + "; n=" + std::to_string(n) + "; sticky=" + sticky + "; mode=" + mode);
        }
    EXPECT(cases.size() > 100);
    bool good = wrong == 0;
    std::map<std::string, int> outcomes;
    const uint64_t begin = std::exchange(first_seed, 0);
    std::string stuck[2];
    std::vector<std::thread> slow;
    for (const size_t i : {0, 1})
        slow.emplace_back([&stuck, i] {
            const std::string fault =
                std::string("op=") + (i == 0 ? "pwrite; n=2" : "pread; n=4") + "; mode=delay:16000";
            const auto [status, text] = run_again("stuck-case", {{"NF_TESTING", "1"}, {"NF_FAULT", fault}});
            if (status != 0) stuck[i] = fault + ": " + text + " exit " + std::to_string(status);
        });
    const auto run_one = [&](uint64_t i) {
        under_way += " (" + cases[i] + ")";
        const auto [status, text] = run_again("io-case", {{"NF_TESTING", "1"}, {"NF_FAULT", cases[i]}});
        EXPECT(status == 0) || std::fprintf(stderr, "exit %d %s", status, text.c_str());
        ++outcomes[text.substr(0, text.find('\n'))];
    };
    good &= part("io", cases.size(), run_one, [&] {
        std::string text = " raised or right:";
        for (const auto& [outcome, count] : outcomes) text += " " + std::to_string(count) + " " + outcome;
        return text;
    });
    good &= part("stuck disk", 2, [&](uint64_t i) {
        if (slow[i].joinable()) slow[i].join();
        EXPECT(stuck[i].empty()) || std::fprintf(stderr, "%s\n", stuck[i].c_str());
    });
    first_seed = begin;
    return good;
}

// --- a graph captured while the engine's threads work

void capture(uint64_t seed) {
    nf_fake_reset();
    nf_fake_configure(("mode=threads; max_delay_us=200; seed=" + std::to_string(seed)).c_str());
    const Data data(Random(seed), 5000, 24, 15000);
    const Place place{std::make_shared<nf::Engine>(16 << 20, 0, 60), std::make_shared<nf::Folder>(folder_path),
                      "x000-g0001.nfc"};
    const auto captured = [](const std::function<bool()>& progress) {
        const Borrowed context;
        must(nf_fake_begin_capture());
        for (int slices = 0; slices < 2000 && !progress(); ++slices) std::this_thread::sleep_for(microseconds(100));
        EXPECT(progress() && nf_fake_end_capture() == 0);
    };
    Torch torch{Random(seed)};
    Memory memory(data.samples * data.size);
    {
        nf::Writer writer(place.engine, place.folder, place.name, data.header.data(), 1 + seed % 2, 1, false);
        torch.sleep(2000);
        torch.fill(memory.address, data.truth.data(), data.samples * data.size);
        writer.append_device(memory.address, data.samples, data.records.data(), torch.stream, 0, {});
        captured([&] { return writer.stats().bytes_written == data.chunks * data.stride; });
        writer.finish({});
    }
    {
        nf::Reader reader(place.engine, *place.folder, place.name);
        nf::EpochOptions options;
        options.ring = {memory.address, memory.address + data.size};
        options.on_device = true;
        options.stream = torch.stream;
        const auto epoch = reader.start(options);
        for (int i = 0; i < 4; ++i) {
            epoch->next(torch.stream, {});
            int slices = 0;
            captured([&] { return ++slices > 5; });  // the gather thread fills the slot that came back
        }
    }
    nf::Reader reader(place.engine, *place.folder, place.name);
    read(reader, data, &torch, Random(seed), 1);
    place.remove();
}

bool capture_part() {
    return part("capture", std::max<uint64_t>(10, seeds / 10), capture,
                [] { return std::string(" captures survived"); });
}

// --- lives in any order

size_t entries(const char* path) {
    DIR* folder = ::opendir(path);
    size_t count = 0;
    while (::readdir(folder) != nullptr) ++count;
    ::closedir(folder);
    return count;
}

size_t resident_bytes() {
    long pages = 0, resident = 0;
    FILE* file = std::fopen("/proc/self/statm", "r");
    if (std::fscanf(file, "%ld %ld", &pages, &resident) != 2) resident = 0;
    std::fclose(file);
    return static_cast<size_t>(resident) * 4096;
}

void live(uint64_t seed) {
    Random random(seed);
    const bool on_device = random.one_in(2);
    const Data data(random.split(), 1 + random.below(3000), 1 + random.below(40), 4096);
    std::deque<Memory> rings;
    std::unique_ptr<Torch> torch;
    if (on_device) torch = std::make_unique<Torch>(random.split());
    std::vector<Bytes> host_rings(32, Bytes(2 * 4 * data.size));
    auto engine = std::make_shared<nf::Engine>(32 << 20, on_device ? 0 : -1, 60);
    auto folder = std::make_shared<nf::Folder>(folder_path);
    void* stream = on_device ? torch->stream : nullptr;
    std::vector<std::unique_ptr<nf::Writer>> writers(3);
    std::vector<std::unique_ptr<nf::Reader>> readers(2);
    std::vector<std::shared_ptr<nf::Epoch>> epochs(3);
    const auto name = [](size_t i) { return "x00" + std::to_string(i) + "-g0001.nfc"; };
    const auto start = [&](size_t reader, size_t epoch) {
        nf::EpochOptions options;
        options.batch = 1 + random.below(4);
        options.on_device = on_device;
        options.stream = stream;
        if (on_device) rings.emplace_back(2 * 4 * data.size);
        const uint64_t at =
            on_device ? rings.back().address : reinterpret_cast<uint64_t>(host_rings[rings.size()].data());
        options.ring = {at, at + 4 * data.size};
        epochs[epoch] = readers[reader]->start(options);
    };
    const auto append = [&](nf::Writer& writer) {
        const size_t begin = writer.appended(), count = std::min<size_t>(data.samples - begin, 1 + random.below(20));
        writer.append(&data.truth[begin * data.size], count, data.records.data(), {});
    };
    for (int step = 0; step < 30; ++step) {
        const size_t w = random.below(writers.size()), r = random.below(readers.size()),
                     e = random.below(epochs.size());
        const std::string error = error_of([&] {
            switch (random.below(12)) {
                case 0:
                case 1:
                    writers[w].reset();
                    ::unlink((folder_path + "/" + name(w)).c_str());
                    if (engine && folder)
                        writers[w] =
                            std::make_unique<nf::Writer>(engine, folder, name(w), data.header.data(), 2, 2, false);
                    break;
                case 2:
                case 3:
                    if (writers[w]) append(*writers[w]);
                    break;
                case 4:
                    while (writers[w] && writers[w]->appended() < data.samples) append(*writers[w]);
                    if (writers[w]) writers[w]->finish({});
                    break;
                case 5:
                    if (writers[w]) writers[w]->abort();
                    break;
                case 6:
                    readers[r].reset();
                    if (engine && folder) readers[r] = std::make_unique<nf::Reader>(engine, *folder, name(w));
                    break;
                case 7:
                    epochs[e].reset();  // before the new one may take its memory
                    if (readers[r] && on_device) start(r, e);
                    break;
                case 8:
                    if (epochs[e]) epochs[e]->next(stream, {});
                    break;
                case 9:
                    if (epochs[e]) epochs[e]->stop();
                    break;
                case 10:
                    if (readers[r]) readers[r]->close();
                    break;
                default:
                    random.one_in(2) ? writers[w].reset() : epochs[e].reset();
                    break;
            }
        });
        EXPECT(error.empty() || error == "closed" || error == "count" || error == "system" || error == "memory") ||
            std::fprintf(stderr, "%s\n", error.c_str());
        if (random.one_in(20)) engine.reset();
        if (random.one_in(40) && folder) folder->close();
    }
    std::vector<std::function<void()>> drops;
    for (auto& writer : writers) drops.push_back([&] { writer.reset(); });
    for (auto& reader : readers) drops.push_back([&] { reader.reset(); });
    for (auto& epoch : epochs) drops.push_back([&] { epoch.reset(); });
    drops.push_back([&] { engine.reset(); });
    drops.push_back([&] { folder.reset(); });
    for (size_t i = drops.size(); i > 1; --i) std::swap(drops[i - 1], drops[random.below(i)]);
    for (const auto& drop : drops) drop();
    for (size_t i = 0; i < writers.size(); ++i) {
        ::unlink((folder_path + "/" + name(i)).c_str());
        ::unlink((folder_path + "/" + name(i) + ".tmp").c_str());
    }
}

bool life_part() {
    nf_fake_reset();
    nf_fake_configure("mode=threads; max_delay_us=50");
    const auto one = [](uint64_t seed) {
        live(seed);
        expect_nothing_left();
        if (seed % 50 == 49) nf_fake_reset();  // it remembers every handle
    };
    for (uint64_t seed = 0; seed < 20; ++seed) one(seed);  // what is made once and kept
    const size_t threads = entries("/proc/self/task"), fds = entries("/proc/self/fd"), resident = resident_bytes();
    const uint64_t begin = std::exchange(first_seed, 0);
    long grown = 0;
    bool good = part("life", seeds, one, [&] {
        grown = (static_cast<long>(resident_bytes()) - static_cast<long>(resident)) / 1024;
        return " orders, RSS " + std::to_string(grown) + " KiB";
    });
    good &= part("left over", 1, [&](uint64_t) {
        for (int i = 0; i < 200 && entries("/proc/self/task") > threads; ++i)
            std::this_thread::sleep_for(std::chrono::milliseconds(10));  // threads end a little after they are joined
        EXPECT(entries("/proc/self/task") <= threads && entries("/proc/self/fd") == fds);
        EXPECT(kSanitized || grown < 4096);
    });
    first_seed = begin;
    return good;
}

// --- forks while writing and reading

// Everything from before is dead and can be dropped; something new works.
int child_of_a_fork(std::shared_ptr<nf::Engine>& engine, std::shared_ptr<nf::Folder>& folder,
                    std::unique_ptr<nf::Writer>& writer, std::unique_ptr<nf::Reader>& reader,
                    std::shared_ptr<nf::Epoch>& epoch, const Data& data) {
    ::alarm(30);
    wrong = 0;
    under_way += ", child";
    const auto closed = [](auto body) { EXPECT(error_of(body) == "closed"); };
    closed([&] { writer->append(data.truth.data(), 1, data.records.data(), {}); });
    closed([&] { writer->append_device(1, 1, data.records.data(), nullptr, 0, {}); });
    closed([&] { writer->fence(0, nullptr); });
    closed([&] { writer->finish({}); });
    closed([&] { epoch->next(nullptr, {}); });
    closed([&] { reader->start({}); });
    const auto new_folder = std::make_shared<nf::Folder>(folder_path);
    closed([&] { nf::Writer(engine, new_folder, "x.nfc", data.header.data(), 1, 2, false); });
    closed([&] { nf::Writer(engine, folder, "x.nfc", data.header.data(), 1, 2, false); });
    closed([&] { nf::Reader(engine, *folder, "x000-g0001.nfc"); });
    writer->abort();
    epoch->stop();
    reader->take_notes();
    reader->close();
    writer.reset();
    epoch.reset();
    reader.reset();
    engine.reset();
    folder.reset();
    const Place place{std::make_shared<nf::Engine>(4 << 20, -1, 60), new_folder, "child.nfc"};
    write(place, data, nullptr, Random(1), data.samples, 2);
    nf::Reader again(place.engine, *new_folder, place.name);
    read(again, data, nullptr, Random(4), 2);
    place.remove();
    return wrong == 0 ? 0 : 1;
}

void fork_once(uint64_t seed) {
    Random random(seed);
    const bool on_device = random.one_in(2);
    nf_fake_reset();
    nf_fake_configure("max_delay_us=100");
    const Data data(random.split(), 1 + random.below(4000), 200, 12000);
    auto engine = std::make_shared<nf::Engine>(32 << 20, on_device ? 0 : -1, 60);
    auto folder = std::make_shared<nf::Folder>(folder_path);
    std::unique_ptr<Torch> torch;
    if (on_device) torch = std::make_unique<Torch>(random.split());
    const Place first{engine, folder, "x000-g0001.nfc"}, second{engine, folder, "x001-g0001.nfc"};
    write(first, data, torch.get(), random.split(), data.samples, 2);
    auto reader = std::make_unique<nf::Reader>(engine, *folder, first.name);
    nf::EpochOptions options;
    Bytes ring(2 * 8 * data.size);
    std::deque<Memory> device;
    if (on_device) device.emplace_back(ring.size());
    const uint64_t at = on_device ? device[0].address : reinterpret_cast<uint64_t>(ring.data());
    options.batch = 8;
    options.ring = {at, at + 8 * data.size};
    options.on_device = on_device;
    options.stream = on_device ? torch->stream : nullptr;
    auto epoch = reader->start(options);
    auto writer = std::make_unique<nf::Writer>(engine, folder, second.name, data.header.data(), 2, 2, false);
    const size_t fork_at = random.below(24);
    pid_t child = -1;
    for (size_t number = 0; number < 25; ++number) {
        writer->append(&data.truth[8 * number * data.size], 8, &data.records[8 * number], {});
        EXPECT(epoch->next(options.stream, {}).count == 8);
        if (number != fork_at) continue;
        std::this_thread::sleep_for(microseconds(random.below(200)));
        child = ::fork();
        if (child == 0) ::_exit(child_of_a_fork(engine, folder, writer, reader, epoch, data));
    }
    writer->finish({});
    epoch.reset();
    int status = -1;
    EXPECT(::waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    nf::Reader of_second(engine, *folder, second.name);
    for (int pass = 0; pass < 3; ++pass) read(of_second, data, torch.get(), random.split(), 2);
    first.remove();
    second.remove();
}

bool forks_part() {
    if (kSanitized) {  // their runtimes take the stacks and locks of the parent's threads along
        std::printf("forks: left to the plain build\n");
        return true;
    }
    return part("forks", std::max<uint64_t>(5, seeds / 5), fork_once,
                [] { return std::string(" in child and parent"); });
}

void on_alarm(int) {
    constexpr char text[] = "hang: ";
    (void)!::write(2, text, sizeof text - 1);
    (void)!::write(2, under_way.data(), under_way.size());
    (void)!::write(2, "\n", 1);
    ::_exit(1);
}

const std::map<std::string, bool (*)()> kParts = {{"device", device_part},   {"cpu", cpu_part},
                                                  {"faults", faults_part},   {"io", io_part},
                                                  {"capture", capture_part}, {"life", life_part},
                                                  {"forks", forks_part}},
                                        kSubparts = {
                                            {"open", open_part}, {"io-case", io_case}, {"stuck-case", stuck_case}};

int usage() {
    std::string names;
    for (const auto& [name, body] : kParts) names += " " + name;
    std::fprintf(stderr, "engine_test [--folder DIR] [--seeds N] [--first N] [--part NAME], of%s\n", names.c_str());
    return 2;
}

}  // namespace

int main(int count, char** arguments) {
    std::string only;
    for (int i = 1; i < count; i += 2) {
        const std::string option = arguments[i];
        if (i + 1 == count) return usage();
        if (option == "--folder")
            folder_path = arguments[i + 1];
        else if (option == "--seeds")
            seeds = std::strtoull(arguments[i + 1], nullptr, 10);
        else if (option == "--first")
            first_seed = std::strtoull(arguments[i + 1], nullptr, 10);
        else if (option == "--part")
            only = arguments[i + 1];
        else
            return usage();
    }
    Dl_info driver{};
    ::dladdr(reinterpret_cast<void*>(&cuInit), &driver);
    ::setenv("NF_TESTING", "1", 1);
    ::setenv("NF_LIBCUDA", driver.dli_fname, 1);
    ::signal(SIGALRM, on_alarm);
    ::signal(SIGXFSZ, SIG_IGN);  // as Python does
    if (kSubparts.count(only) != 0) return kSubparts.at(only)() ? 0 : 1;
    if (!only.empty() && kParts.count(only) == 0) return usage();
    nf::io::configure();
    std::string own = folder_path + "/engine_test-XXXXXX";
    if (::mkdtemp(own.data()) == nullptr) {
        std::perror(own.c_str());
        return 2;
    }
    folder_path = own;
    bool good = true;
    for (const auto& [name, body] : kParts)
        if (only.empty() || only == name) good = body() && good;
    if (::rmdir(own.c_str()) != 0) {
        std::fprintf(stderr, "something was left in %s\n", own.c_str());
        good = false;
    }
    return good ? 0 : 1;
}
