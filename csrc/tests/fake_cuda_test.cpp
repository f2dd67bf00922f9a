// The stand-in CUDA driver against programs whose outcome CUDA's rules decide: each rule once kept, once broken.
// Build: this file, linked to libnf_fake_cuda.so. Prints `name: passed/cases`, exits 1 where they differ. Under
// ThreadSanitizer it also runs itself on programs that lack one order, and counts the reports.
#include "fake_cuda.h"

#include <dlfcn.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#define NF_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define NF_TSAN 1
#endif
#endif
#ifndef NF_TSAN
#define NF_TSAN 0
#endif

namespace {

using Pointer = unsigned long long;
constexpr size_t kBytes = 5 * 4096 + 123;
const char* program_path;
bool exits = false;  // as a subprogram
int passed = 0, cases = 0, failures = 0;

#define CHECK(condition) check((condition), #condition, __LINE__)
void check(bool good, const char* what, int line) {
    ++cases;
    passed += good;
    if (!good) std::fprintf(stderr, "line %d: %s\n", line, what);
}

void section(const char* name, const std::function<void()>& body) {
    passed = cases = 0;
    body();
    std::printf("%s: %d/%d\n", name, passed, cases);
    std::fflush(stdout);
    failures += passed != cases;
}

void must(int code) {
    if (code == 0) return;
    std::fprintf(stderr, "unexpected CUDA error %d\n", code);
    std::_Exit(2);
}

void use_context() {
    void* context = nullptr;
    must(cuInit(0));
    must(cuDevicePrimaryCtxRetain(&context, 0));
    must(cuCtxSetCurrent(context));
}

void fresh(const std::string& configuration) {
    nf_fake_reset();
    nf_fake_configure(configuration.c_str());
    use_context();
}

nf_fake_report report() {
    nf_fake_report now;
    nf_fake_get_report(&now);
    return now;
}

void* make_stream(int priority = 0, unsigned flags = 1) {
    void* stream = nullptr;
    must(cuStreamCreateWithPriority(&stream, flags, priority));
    return stream;
}

void* make_event() {
    void* event = nullptr;
    must(cuEventCreate(&event, 3));
    return event;
}

Pointer allocate(size_t bytes = kBytes) {
    Pointer pointer = 0;
    must(cuMemAlloc_v2(&pointer, bytes));
    return pointer;
}

// The pattern of nf_fake_launch_fill, by its definition.
uint8_t pattern(uint64_t seed, size_t i) {
    uint64_t z = seed + (i / 8 + 1) * 0x9E3779B97F4A7C15;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    return static_cast<uint8_t>((z ^ z >> 31) >> (i % 8 * 8));
}

struct Host {  // registered memory
    explicit Host(bool registered = true, size_t bytes = kBytes) : data(bytes) {
        if (registered) must(cuMemHostRegister_v2(data.data(), bytes, 1));
    }
    uint8_t* get() { return data.data(); }
    void set(uint64_t seed) {
        for (size_t i = 0; i < data.size(); ++i) data[i] = pattern(seed, i);
    }
    int mismatches(uint64_t seed) const {
        int count = 0;
        for (size_t i = 0; i < data.size(); ++i) count += data[i] != pattern(seed, i);
        return count;
    }
    bool all(uint8_t value) const {
        for (uint8_t byte : data)
            if (byte != value) return false;
        return true;
    }
    std::vector<uint8_t> data;
};

// A kernel that holds its stream until opened: what is queued behind it is certainly pending.
struct Gate {
    explicit Gate(void* stream) { must(nf_fake_launch(stream, hold, this)); }
    void open() { opened = true; }
    static void hold(void* self) {
        while (!static_cast<Gate*>(self)->opened) std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
    std::atomic<bool> opened{false};
};

// Out through two slabs and back through one piece, as the cache does. Each order may be left out; 0 leaves out none.
constexpr int kOrders = 6;
int round_trip(int left_out, bool tidy = true) {
    constexpr int kBatches = 6;
    void *compute = make_stream(-1), *d2h = make_stream(), *h2d = make_stream();
    void *produced = make_event(), *copied[2] = {make_event(), make_event()}, *moved = make_event(),
         *consumed = make_event();
    const Pointer staging = allocate(), slot = allocate();
    Host slabs[2], piece;
    int bad[kBatches] = {}, mismatches = 0;
    for (int k = 0; k <= kBatches; ++k) {
        if (k < kBatches) {
            if (k > 0 && left_out != 1) must(cuStreamWaitEvent(compute, copied[(k - 1) % 2], 0));
            must(nf_fake_launch_fill(compute, staging, kBytes, k));
            must(cuEventRecord(produced, compute));
            if (left_out != 2) must(cuStreamWaitEvent(d2h, produced, 0));
            must(cuMemcpyDtoHAsync_v2(slabs[k % 2].get(), staging, kBytes, d2h));
            must(cuEventRecord(copied[k % 2], d2h));
        }
        if (k == 0) continue;
        const int j = k - 1;
        if (left_out != 3) must(cuEventSynchronize(copied[j % 2]));
        mismatches += slabs[j % 2].mismatches(j);
        if (left_out != 4) must(cuEventSynchronize(moved));
        std::memcpy(piece.get(), slabs[j % 2].get(), kBytes);
        if (left_out != 5) must(cuStreamWaitEvent(h2d, consumed, 0));
        must(cuMemcpyHtoDAsync_v2(slot, piece.get(), kBytes, h2d));
        must(cuEventRecord(moved, h2d));
        if (left_out != 6) must(cuStreamWaitEvent(compute, moved, 0));
        must(nf_fake_launch_check(compute, slot, kBytes, j, &bad[j]));
        must(cuEventRecord(consumed, compute));
    }
    must(nf_fake_drain());
    for (int count : bad) mismatches += count;
    if (!tidy) return mismatches;
    for (Host* host : {&slabs[0], &slabs[1], &piece}) must(cuMemHostUnregister(host->get()));
    for (Pointer pointer : {staging, slot}) must(cuMemFree_v2(pointer));
    for (void* event : {produced, copied[0], copied[1], moved, consumed}) must(cuEventDestroy_v2(event));
    for (void* stream : {compute, d2h, h2d}) must(cuStreamDestroy_v2(stream));
    return mismatches;
}

std::string scheduler(int seed) { return "mode=scheduler; seed=" + std::to_string(seed); }
std::string threads(int seed) { return "mode=threads; max_delay_us=500; seed=" + std::to_string(seed); }
const std::string kThreads = "mode=threads; max_delay_us=0";
const std::string kExit = "; exit_on_violation=1";

// This program again, as `name argument`: exit status (128 + signal) and how often `word` stands in what it wrote.
std::pair<int, int> again(const std::string& arguments, const std::string& environment, const std::string& word = "") {
    const std::string command = "NF_FAKE_CUDA='" + environment + "' '" + program_path + "' " + arguments + " 2>&1";
    FILE* pipe = ::popen(command.c_str(), "r");
    std::string output;
    char buffer[4096];
    for (size_t n; (n = std::fread(buffer, 1, sizeof buffer, pipe)) > 0;) output.append(buffer, n);
    const int status = ::pclose(pipe);
    int found = 0;
    for (size_t at = output.find(word); !word.empty() && at != std::string::npos; at = output.find(word, at + 1))
        ++found;
    return {WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status), found};
}

void initialisation() {
    int number = 0;
    void* context = nullptr;
    CHECK(cuDeviceGetCount(&number) == 3);
    CHECK(cuCtxGetCurrent(&context) == 3);
    CHECK(cuDriverGetVersion(&number) == 0 && number == 12040);
    for (int code : {100, 803, 999}) {
        nf_fake_configure(("call=cuInit; error=" + std::to_string(code)).c_str());
        CHECK(cuInit(0) == code);
        CHECK(cuDeviceGetCount(&number) == 3);
    }
    CHECK(cuInit(1) == 1);
    CHECK(cuInit(0) == 0 && cuInit(0) == 0);
    CHECK(cuDeviceGetCount(&number) == 0 && number == 1);
    CHECK(cuDeviceGet(&number, 1) == 101);
    CHECK(cuDeviceGet(&number, 0) == 0 && number == 0);
    CHECK(cuDevicePrimaryCtxRetain(&context, 1) == 101);
    const char* name = nullptr;
    CHECK(cuGetErrorName(700, &name) == 0 && std::strcmp(name, "CUDA_ERROR_ILLEGAL_ADDRESS") == 0);
    CHECK(cuGetErrorName(12345, &name) == 1 && name == nullptr);
}

void contexts() {
    use_context();
    int codes[4] = {}, least = 1, greatest = 1;
    std::thread other([&] {  // a new thread has none, whatever the others have
        void *stream = nullptr, *context = &stream;
        codes[0] = cuStreamCreateWithPriority(&stream, 1, 0);
        codes[1] = cuCtxGetCurrent(&context) == 0 && context == nullptr ? 0 : 1;
        codes[2] = cuCtxSetCurrent(&stream);
        must(cuDevicePrimaryCtxRetain(&context, 0));
        must(cuCtxSetCurrent(context));
        codes[3] = cuStreamCreateWithPriority(&stream, 1, 0);
    });
    other.join();
    CHECK(codes[0] == 201 && codes[1] == 0 && codes[2] == 201 && codes[3] == 0);
    CHECK(cuCtxGetStreamPriorityRange(&least, &greatest) == 0 && least == 0 && greatest == -5);
    must(cuCtxSetCurrent(nullptr));
    CHECK(cuCtxGetStreamPriorityRange(&least, &greatest) == 201);
    use_context();
}

void orders(const std::function<std::string(int)>& configuration, int seeds) {
    int right = 0;
    for (int seed = 0; seed < seeds; ++seed) {
        fresh(configuration(seed));
        const int mismatches = round_trip(0);
        const nf_fake_report end = report();
        right += mismatches == 0 && end.violations == 0 && end.streams + end.events + end.registrations == 0 &&
                 end.allocations + end.pending == 0 && end.copied_d2h == end.copied_h2d &&
                 end.copied_d2h == 6 * long{kBytes};
    }
    CHECK(right == seeds);
    if (NF_TSAN) return;  // these race; `races` runs them
    for (int left_out = 1; left_out <= kOrders; ++left_out) {
        int seen = 0;
        for (int seed = 0; seed < seeds; ++seed) {
            fresh(configuration(seed));
            seen += round_trip(left_out) > 0;
        }
        std::printf("  order %d left out: wrong bytes in %d of %d seeds\n", left_out, seen, seeds);
        CHECK(seen > 0);
    }
}

void several_threads(const std::function<std::string(int)>& configuration) {
    for (int seed = 0; seed < 5; ++seed) {
        fresh(configuration(seed));
        int mismatches[3] = {-1, -1, -1};
        std::vector<std::thread> hosts;
        for (int& mine : mismatches)
            hosts.emplace_back([&mine] {
                use_context();
                mine = round_trip(0);
            });
        for (std::thread& host : hosts) host.join();
        CHECK(mismatches[0] == 0 && mismatches[1] == 0 && mismatches[2] == 0);
        CHECK(report().violations == 0 && report().pending == 0 && report().streams == 0);
    }
}

// Kernels that write down their number; atomic, since nothing orders streams.
struct Log {
    static constexpr int kLength = 12;
    void launch(void* stream, int id) {
        entries[id] = {this, id};
        must(nf_fake_launch(stream, write, &entries[id]));
    }
    std::vector<int> order() const { return {std::begin(ids), std::begin(ids) + count}; }

  private:
    struct Entry {
        Log* log;
        int id;
    };
    static void write(void* user) {
        const Entry& entry = *static_cast<Entry*>(user);
        entry.log->ids[entry.log->count++] = entry.id;
    }
    std::atomic<int> ids[kLength] = {}, count{0};
    Entry entries[kLength];
};

std::vector<int> kernel_order(int seed) {
    fresh(scheduler(seed));
    Log log;
    void* streams[3] = {make_stream(), make_stream(), make_stream()};
    for (int id = 0; id < Log::kLength; ++id) log.launch(streams[id % 3], id);
    must(nf_fake_drain());
    return log.order();
}

void replay() {
    std::set<std::vector<int>> different;
    int same = 0, in_order = 0;
    for (int seed = 0; seed < 20; ++seed) {
        const std::vector<int> order = kernel_order(seed);
        same += order == kernel_order(seed);
        different.insert(order);
        int last[3] = {-1, -1, -1}, sorted = 1;
        for (int id : order) sorted &= id > std::exchange(last[id % 3], id);
        in_order += sorted && order.size() == 12;
    }
    CHECK(same == 20 && in_order == 20);
    CHECK(different.size() >= 10);
    for (int seed = 0; seed < 20 && !NF_TSAN; ++seed) {
        fresh(scheduler(seed));
        const int mismatches = round_trip(2);
        fresh(scheduler(seed));
        CHECK(round_trip(2) == mismatches);
    }
}

void copies() {
    fresh(kThreads);
    void* stream = make_stream();
    const Pointer device = allocate();
    Host host;
    {
        Gate gate(stream);
        host.set(1);
        must(cuMemcpyHtoDAsync_v2(device, host.get(), kBytes, stream));
        host.set(2);  // read only now
        gate.open();
        must(nf_fake_drain());
    }
    int mismatches = -1;
    must(nf_fake_launch_check(stream, device, kBytes, 2, &mismatches));
    must(nf_fake_drain());
    CHECK(mismatches == 0);
    {
        Gate gate(stream);
        must(cuMemcpyDtoHAsync_v2(host.get(), device, kBytes, stream));
        CHECK(host.all(0xA5));
        gate.open();
        must(nf_fake_drain());
    }
    CHECK(host.mismatches(2) == 0);
    {  // to the device and back through the same memory is legal in one stream: the garbage waits for its turn
        Gate gate(stream);
        host.set(3);
        must(cuMemcpyHtoDAsync_v2(device, host.get(), kBytes, stream));
        must(cuMemcpyDtoHAsync_v2(host.get(), device, kBytes, stream));
        gate.open();
        must(nf_fake_drain());
    }
    CHECK(host.mismatches(3) == 0 && report().violations == 0);
    CHECK(cuMemcpyDtoHAsync_v2(host.get(), device, 0, stream) == 0 &&
          cuMemcpyDtoHAsync_v2(nullptr, device, 1, stream) == 1);
    const Pointer untouched = allocate();
    must(cuMemcpyDtoHAsync_v2(host.get(), untouched, kBytes, stream));
    must(nf_fake_drain());
    CHECK(host.all(0xFF));
    if (!NF_TSAN) {  // some moment shows pieces that came out of their order
        bool out_of_order = false;
        for (int seed = 0; seed < 50 && !out_of_order; ++seed) {
            fresh(scheduler(seed));
            void* copying = make_stream();
            const Pointer source = allocate();
            Host target;
            must(cuMemcpyDtoHAsync_v2(target.get(), source, kBytes, copying));
            while (cuStreamQuery(copying) == 600)
                for (size_t i = 4096; i < kBytes; i += 4096)
                    out_of_order |= target.data[i - 4096] == 0xA5 && target.data[i] == 0xFF;
        }
        CHECK(out_of_order);
    }
}

void events() {
    fresh(kThreads);
    void *a = make_stream(), *b = make_stream(), *event = make_event();
    CHECK(cuEventQuery(event) == 0 && cuEventSynchronize(event) == 0);  // never recorded
    static std::atomic<int> ran;
    ran = 0;
    const auto count = [](void*) { ++ran; };
    {
        Gate first(a);
        must(cuStreamWaitEvent(b, event, 0));  // never recorded: nothing to wait for
        must(nf_fake_launch(b, count, nullptr));
        while (ran == 0) std::this_thread::yield();
        must(cuEventRecord(event, a));
        CHECK(cuEventQuery(event) == 600 && cuStreamQuery(a) == 600);
        must(cuStreamWaitEvent(b, event, 0));
        must(nf_fake_launch(b, count, nullptr));
        Gate second(a);
        must(cuEventRecord(event, a));  // moves the event, not the wait
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
        CHECK(ran == 1);
        first.open();
        while (ran == 1) std::this_thread::yield();  // would hang if the wait had moved
        CHECK(cuEventQuery(event) == 600);
        must(cuEventDestroy_v2(event));  // legal while pending
        second.open();
        must(nf_fake_drain());
    }
    CHECK(ran == 2 && cuStreamQuery(a) == 0 && report().violations == 0);
    void* unused = nullptr;
    CHECK(cuEventCreate(&unused, 8) == 1 && cuEventCreate(&unused, 4) == 1 && cuEventCreate(nullptr, 0) == 1);
    CHECK(cuStreamCreateWithPriority(&unused, 2, 0) == 1);
    {  // a destroyed stream ends its work
        Gate gate(a);
        must(nf_fake_launch(a, count, nullptr));
        must(cuStreamDestroy_v2(a));
        CHECK(report().streams == 1 && report().pending >= 1);
        gate.open();
        must(nf_fake_drain());
    }
    CHECK(ran == 3 && report().pending == 0);
}

void default_stream() {
    fresh(kThreads);
    void *blocking = make_stream(0, 0), *free_running = make_stream();
    static std::atomic<int> ran;
    ran = 0;
    const auto count = [](void*) { ++ran; };
    {
        Gate gate(blocking);
        must(nf_fake_launch(nullptr, count, nullptr));
        must(nf_fake_launch(free_running, count, nullptr));
        while (ran == 0) std::this_thread::yield();
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
        CHECK(ran == 1 && cuStreamQuery(nullptr) == 600);  // only the non-blocking one
        gate.open();
        must(nf_fake_drain());
        CHECK(ran == 2);
    }
    {
        Gate gate(nullptr);
        must(nf_fake_launch(blocking, count, nullptr));
        must(nf_fake_launch(free_running, count, nullptr));
        while (ran == 2) std::this_thread::yield();
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
        CHECK(ran == 3);
        gate.open();
        must(nf_fake_drain());
        CHECK(ran == 4);
    }
    CHECK(report().streams == 2 && cuStreamDestroy_v2(nullptr) == 400);
}

void priorities() {
    int as_launched[2] = {};
    for (int seed = 0; seed < 40; ++seed) {
        const int equal = seed % 2;
        fresh(scheduler(seed));
        Log log;
        void *high = make_stream(equal ? 3 : -99), *low = make_stream(3);
        for (int id = 0; id < 6; ++id) log.launch(id < 3 ? high : low, id);
        must(nf_fake_drain());
        as_launched[equal] += log.order() == std::vector<int>({0, 1, 2, 3, 4, 5});
    }
    CHECK(as_launched[0] == 20 && as_launched[1] < 20);
    fresh(kThreads);
    void *low = make_stream(0), *high = make_stream(-5);
    const Pointer device = allocate();
    Host host;
    Gate gate(high);
    must(cuMemcpyDtoHAsync_v2(host.get(), device, kBytes, low));  // a copy does not wait for the kernel
    while (cuStreamQuery(low) == 600) std::this_thread::yield();
    CHECK(host.all(0xFF));
    static std::atomic<bool> ran;
    ran = false;
    must(nf_fake_launch(low, [](void*) { ran = true; }, nullptr));  // a kernel does
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    CHECK(!ran);
    gate.open();
    must(nf_fake_drain());
    CHECK(ran);
}

struct Misuse {
    const char* kind;
    std::function<void(bool right)> program;
};

const std::vector<Misuse>& misuses() {
    static const auto copy_under_gate = [](const std::function<void(Host&, Pointer)>& end, bool right) {
        void* stream = make_stream();
        const Pointer device = allocate();
        Host host;
        Gate gate(stream);
        must(cuMemcpyDtoHAsync_v2(host.get(), device, kBytes, stream));
        if (right) {
            gate.open();
            must(nf_fake_drain());
        }
        end(host, device);
        gate.open();
        must(nf_fake_drain());
    };
    static const std::vector<Misuse> all = {
        {"unregister-pending",
         [](bool right) { copy_under_gate([](Host& host, Pointer) { cuMemHostUnregister(host.get()); }, right); }},
        {"free-pending",
         [](bool right) { copy_under_gate([](Host&, Pointer device) { cuMemFree_v2(device); }, right); }},
        {"unmap-pending",
         [](bool right) {
             void* stream = make_stream();
             const Pointer device = allocate();
             Host host(false);
             nf_fake_configure((kThreads + "; pageable=1" + (exits ? kExit : "")).c_str());
             Gate gate(stream);
             must(cuMemcpyDtoHAsync_v2(host.get(), device, kBytes, stream));
             if (right) gate.open(), must(nf_fake_drain());
             nf_fake_before_unmap(host.get() + 100, 1);
             gate.open();
             must(nf_fake_drain());
         }},
        {"unmap-registered",
         [](bool right) {
             Host host;
             if (right) must(cuMemHostUnregister(host.get()));
             nf_fake_before_unmap(host.get(), 1);
         }},
        {"unregistered-memory",
         [](bool right) {
             void* stream = make_stream();
             const Pointer device = allocate();
             Host host;
             if (!right) must(cuMemHostUnregister(host.get()));
             must(cuMemcpyHtoDAsync_v2(device, host.get(), kBytes, stream));
             must(nf_fake_drain());
         }},
        {"unregistered-memory",
         [](bool right) {  // one byte past the registration
             void* stream = make_stream();
             const Pointer device = allocate();
             Host host(false);
             must(cuMemHostRegister_v2(host.get(), kBytes - 1, 1));
             must(cuMemcpyDtoHAsync_v2(host.get(), device, right ? kBytes - 1 : kBytes, stream));
             must(nf_fake_drain());
         }},
        {"destroyed-handle",
         [](bool right) {
             void* event = make_event();
             if (!right) must(cuEventDestroy_v2(event));
             cuEventRecord(event, make_stream());
             must(nf_fake_drain());
         }},
        {"destroyed-handle",
         [](bool right) {
             void *event = make_event(), *stream = make_stream();
             if (!right) must(cuStreamDestroy_v2(stream));
             cuStreamWaitEvent(stream, event, 0);
         }},
        {"unknown-handle", [](bool right) { cuEventQuery(right ? make_event() : nullptr); }},
        {"freed-device-memory",
         [](bool right) {
             const Pointer device = allocate();
             Host host;
             if (!right) must(cuMemFree_v2(device));
             cuMemcpyHtoDAsync_v2(device + 1, host.get(), 1, make_stream());
             must(nf_fake_drain());
         }},
        {"device-range",
         [](bool right) {
             const Pointer device = allocate();
             Host host;
             cuMemcpyHtoDAsync_v2(device + 1, host.get(), right ? kBytes - 1 : kBytes, make_stream());
             must(nf_fake_drain());
         }},
        {"host-access",
         [](bool right) {
             const Pointer device = allocate();
             Gate gate(make_stream());
             if (right) gate.open(), must(nf_fake_drain());
             nf_fake_host(device);
             gate.open();
             must(nf_fake_drain());
         }},
        {"cuda-in-kernel",
         [](bool right) {
             static Pointer device;
             device = allocate();
             const auto legal = [](void*) { static_cast<uint8_t*>(nf_fake_host(device))[7] = 1; };
             const auto illegal = [](void*) { cuStreamQuery(nullptr); };
             must(nf_fake_launch(make_stream(), right ? legal : static_cast<void (*)(void*)>(illegal), nullptr));
             must(nf_fake_drain());
         }},
    };
    return all;
}

void violations() {
    for (const Misuse& misuse : misuses()) {
        fresh(kThreads);
        misuse.program(true);
        CHECK(report().violations == 0);
        fresh(kThreads);
        misuse.program(false);
        const nf_fake_report wrong = report();
        CHECK(wrong.violations == 1 && std::string(wrong.text).rfind(std::string(misuse.kind) + ": ", 0) == 0);
    }
    for (size_t i = 0; i < misuses().size(); ++i) {
        const auto [status, lines] = again("misuse " + std::to_string(i), kThreads + kExit, "; called at ");
        CHECK(status == 99 && lines == 1);
    }
    const auto [status, sites] = again("misuse 0", kThreads + kExit, "; queued at ");
    CHECK(status == 99 && sites == 1);
    CHECK(again("segv", "").first == 42);
    fresh(kThreads);
    Host host;
    CHECK(cuMemHostRegister_v2(host.get() + 5, 1, 0) == 712 && cuMemHostUnregister(host.get() + 5) == 713);
    CHECK(report().registrations == 1 && report().registered_bytes == long{kBytes});
    CHECK(cuMemHostRegister_v2(nullptr, 1, 0) == 1 && cuMemHostRegister_v2(reinterpret_cast<void*>(4096), 1, 0) == 1);
}

void leaks() {
    fresh(kThreads);
    make_stream();
    make_event();
    make_event();
    allocate();
    const Host host;
    const nf_fake_report now = report();
    CHECK(now.streams == 1 && now.events == 2 && now.allocations == 1 && now.registrations == 1);
    nf_fake_reset();
    CHECK(report().streams + report().events + report().allocations + report().registrations == 0);
}

void capture() {
    for (int mode : {0, 1, 2}) {
        fresh(kThreads);
        void *stream = make_stream(), *event = make_event();
        const Pointer device = allocate();
        Host host, more(false);
        must(nf_fake_begin_capture());
        std::vector<int> codes;
        std::thread other([&] {
            use_context();
            int exchanged = mode;
            must(cuThreadExchangeStreamCaptureMode(&exchanged));
            codes.push_back(exchanged);
            Pointer pointer = 0;
            codes.push_back(cuMemcpyDtoHAsync_v2(host.get(), device, kBytes, stream));
            codes.push_back(cuEventRecord(event, stream));
            codes.push_back(cuStreamWaitEvent(stream, event, 0));
            for (int code : {cuEventSynchronize(event), cuEventQuery(event),
                             cuMemHostRegister_v2(more.get(), kBytes, 0), cuMemAlloc_v2(&pointer, 1)})
                codes.push_back(code);
        });
        other.join();
        const int expected = mode == 0 ? 900 : 0;
        CHECK(codes == std::vector<int>({0, 0, 0, 0, expected, expected, expected, expected}));
        CHECK(nf_fake_end_capture() == (mode == 0 ? 901 : 0));
        must(nf_fake_begin_capture());
        CHECK(cuMemHostUnregister(host.get()) == 900);  // the capturing thread itself
        CHECK(nf_fake_end_capture() == 901 && nf_fake_drain() == 0 && cuMemHostUnregister(host.get()) == 0);
    }
}

using Codes = std::vector<std::pair<std::string, int>>;

// Every function of the driver, twice those that matter last.
Codes every_call() {
    Codes codes;
    int number = 0, least = 0, greatest = 0, mode = 2;
    const char* name = nullptr;
    void *context = nullptr, *stream = nullptr, *event = nullptr;
    Pointer device = 0;
    static std::vector<uint8_t> host(kBytes);
    host.assign(kBytes, 0);
#define RUN(function, ...) codes.emplace_back(#function, function(__VA_ARGS__))
    RUN(cuInit, 0);
    RUN(cuDriverGetVersion, &number);
    RUN(cuGetErrorName, 0, &name);
    RUN(cuDeviceGetCount, &number);
    RUN(cuDeviceGet, &number, 0);
    RUN(cuDevicePrimaryCtxRetain, &context, 0);
    RUN(cuCtxGetCurrent, &context);
    RUN(cuCtxSetCurrent, context);
    RUN(cuThreadExchangeStreamCaptureMode, &mode);
    RUN(cuCtxGetStreamPriorityRange, &least, &greatest);
    RUN(cuStreamCreateWithPriority, &stream, 1, 0);
    RUN(cuEventCreate, &event, 3);
    RUN(cuMemHostRegister_v2, host.data(), kBytes, 1);
    RUN(cuMemAlloc_v2, &device, kBytes);
    RUN(cuMemcpyDtoHAsync_v2, host.data(), device, kBytes, stream);
    RUN(cuMemcpyHtoDAsync_v2, device, host.data(), kBytes, stream);
    RUN(cuEventRecord, event, stream);
    RUN(cuStreamWaitEvent, stream, event, 0);
    RUN(cuEventSynchronize, event);
    RUN(cuEventQuery, event);
    RUN(nf_fake_drain);
    RUN(cuStreamQuery, stream);
    RUN(cuMemHostUnregister, host.data());
    RUN(cuMemFree_v2, device);
    RUN(cuEventDestroy_v2, event);
    RUN(cuStreamDestroy_v2, stream);
    RUN(cuCtxGetCurrent, &context);
    RUN(cuCtxGetCurrent, &context);
#undef RUN
    return codes;
}

bool needs_the_device(const std::string& name) { return name != "cuDriverGetVersion" && name != "cuGetErrorName"; }

void faults() {
    for (const char* mode : {"mode=threads; max_delay_us=0; ", "mode=scheduler; seed=3; "}) {
        fresh(mode);
        const Codes plain = every_call();
        int sum = 0;
        for (const auto& [name, code] : plain) sum += code;
        CHECK(sum == 0 && plain.size() == 28);
        for (size_t i = 0; i + 2 < plain.size(); ++i) {
            const std::string call = plain[i].first;
            for (const auto& [error, late] :
                 {std::pair{2, 0}, {4, 0}, {214, 0}, {700, 0}, {719, 0}, {2, 1}, {700, 1}}) {
                fresh(mode);
                nf_fake_configure((std::string(mode) + "call=" + call + "; error=" + std::to_string(error) +
                                   "; late=" + std::to_string(late))
                                      .c_str());
                const Codes codes = every_call();
                size_t first = 0;
                while (first < codes.size() && codes[first].second != error) ++first;
                bool good = first < codes.size() && (late != 0 ? first > i : first == i);
                for (size_t k = first + 1; k < codes.size(); ++k) {
                    if (error == 2)
                        good = good && codes[k].second != 2;
                    else if (needs_the_device(codes[k].first))
                        good = good && codes[k].second == error;
                }
                if (!good) std::fprintf(stderr, "%s, error %d, late %d\n", call.c_str(), error, late);
                CHECK(good);
            }
        }
    }
    fresh("call=cuEventCreate; n=3; error=2; call=cuMemHostRegister_v2; error=2; sticky=1");
    void* event = nullptr;
    CHECK(cuEventCreate(&event, 0) == 0 && cuEventCreate(&event, 0) == 0 && cuEventCreate(&event, 0) == 2);
    CHECK(cuEventCreate(&event, 0) == 0);
    Host host(false);
    for (int i = 0; i < 5; ++i) CHECK(cuMemHostRegister_v2(host.get(), kBytes, 0) == 2);
    CHECK(report().registrations == 0);
    fresh(kThreads + "; call=cuMemcpyDtoHAsync_v2; error=700; late=1");
    void *stream = make_stream(), *done = make_event();
    const Pointer device = allocate();
    Host target;
    must(cuMemcpyDtoHAsync_v2(target.get(), device, kBytes, stream));
    const int recorded = cuEventRecord(done, stream);
    CHECK((recorded == 0 || recorded == 700) && cuEventSynchronize(done) == 700);
    CHECK(target.all(0xA5) && report().copied_d2h == 0 && report().pending <= 1);
}

void process() {
    CHECK(again("exit", "").first == 4);
    for (const auto& [name, code] : every_call()) {
        if (name.rfind("cu", 0) != 0) continue;
        CHECK(again("missing " + name, "missing=" + name).first == 0);
    }
    CHECK(again("missing cuInit", "").first == 1);
    for (const char* wrong : {"colour=red", "n=1", "seed=x", "mode=both", "bandwidth=0"})
        CHECK(again("exit", wrong).first == 128 + SIGABRT);
    fresh(kThreads);
    const pid_t child = ::fork();
    if (child == 0) {
        void* event = nullptr;
        std::_Exit(cuEventCreate(&event, 0));
    }
    int status = 0;
    ::waitpid(child, &status, 0);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 3);
}

void timed() {
    fresh(kThreads + "; bandwidth=1e9");
    void* stream = make_stream();
    constexpr size_t kCopy = 1 << 20;
    const Pointer device = allocate(kCopy);
    Host host(true, kCopy);
    const auto begin = std::chrono::steady_clock::now();
    for (int i = 0; i < 40; ++i) must(cuMemcpyHtoDAsync_v2(device, host.get(), kCopy, stream));
    must(nf_fake_launch_sleep(stream, 20000));
    CHECK(std::chrono::steady_clock::now() - begin < std::chrono::milliseconds(30));  // the calls do not wait
    must(nf_fake_drain());
    const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - begin;
    std::printf("  40 x 1 MiB at 1 GB/s and 20 ms of sleep: %.1f ms, expected 61.9\n", took.count());
    CHECK(took.count() >= 61.9 && took.count() < 619);  // a busy machine is late, not wrong
}

void races() {
    if (!NF_TSAN) return;
    for (const std::string& mode : {scheduler(1), threads(1), kThreads}) {
        for (int left_out = 0; left_out <= kOrders; ++left_out) {
            const auto [status, reports] = again("races " + std::to_string(left_out), mode, "WARNING: ThreadSanitizer");
            if (left_out > 0) std::printf("  %s, order %d left out: %d reports\n", mode.c_str(), left_out, reports);
            CHECK(left_out == 0 ? status == 0 && reports == 0 : status == 66 && reports >= 1);
        }
    }
}

int subprogram(const std::string& name, const std::string& argument) {
    if (name == "missing") {
        Dl_info info{};
        ::dladdr(reinterpret_cast<void*>(&nf_fake_reset), &info);
        void* library = ::dlopen(info.dli_fname, RTLD_NOW | RTLD_LOCAL);
        const bool rest = ::dlsym(library, argument == "cuInit" ? "cuEventQuery" : "cuInit") != nullptr;
        return rest && ::dlsym(library, argument.c_str()) == nullptr ? 0 : 1;
    }
    if (name == "exit") {  // registered before cuInit's own, so it runs after it
        std::atexit([] {
            void* context = nullptr;
            std::_Exit(cuCtxGetCurrent(&context));
        });
        use_context();
        std::exit(0);
    }
    use_context();
    exits = true;
    if (name == "misuse") misuses().at(std::stoul(argument)).program(false);
    if (name == "races") round_trip(std::stoi(argument));
    if (name == "segv") {
        std::signal(SIGSEGV, [](int) { std::_Exit(42); });
        std::printf("%d\n", *reinterpret_cast<volatile char*>(allocate()));
    }
    return 0;
}

}  // namespace

int main(int count, char** arguments) {
    program_path = arguments[0];
    if (count > 1) return subprogram(arguments[1], count > 2 ? arguments[2] : "");
    section("initialisation", initialisation);
    section("contexts", contexts);
    section("orders, scheduler", [] { orders(scheduler, 100); });
    section("orders, threads", [] { orders(threads, 20); });
    section("several host threads, scheduler", [] { several_threads(scheduler); });
    section("several host threads, threads", [] { several_threads(threads); });
    section("replay", replay);
    section("copies", copies);
    section("events", events);
    section("default stream", default_stream);
    section("priorities", priorities);
    section("violations", violations);
    section("leaks", leaks);
    section("capture", capture);
    section("faults", faults);
    section("process", process);
    section("timed stream", timed);
    if (NF_TSAN) section("races", races);
    nf_fake_reset();
    return failures > 0 ? 1 : 0;
}
