#include "fake_cuda.h"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "fake_device.h"

using namespace nf::fake;

namespace {

constexpr int kDriverVersion = 12040, kLeastPriority = 0, kGreatestPriority = -5;
char primary_context;  // its address is the handle
std::atomic<bool> forked{false};

struct ErrorName {
    int code;
    const char* name;
};
constexpr ErrorName kNames[] = {{0, "CUDA_SUCCESS"},
                                {1, "CUDA_ERROR_INVALID_VALUE"},
                                {2, "CUDA_ERROR_OUT_OF_MEMORY"},
                                {3, "CUDA_ERROR_NOT_INITIALIZED"},
                                {4, "CUDA_ERROR_DEINITIALIZED"},
                                {100, "CUDA_ERROR_NO_DEVICE"},
                                {101, "CUDA_ERROR_INVALID_DEVICE"},
                                {201, "CUDA_ERROR_INVALID_CONTEXT"},
                                {214, "CUDA_ERROR_ECC_UNCORRECTABLE"},
                                {400, "CUDA_ERROR_INVALID_HANDLE"},
                                {600, "CUDA_ERROR_NOT_READY"},
                                {700, "CUDA_ERROR_ILLEGAL_ADDRESS"},
                                {712, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED"},
                                {713, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED"},
                                {719, "CUDA_ERROR_LAUNCH_FAILED"},
                                {800, "CUDA_ERROR_NOT_PERMITTED"},
                                {803, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"},
                                {900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"},
                                {901, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"},
                                {999, "CUDA_ERROR_UNKNOWN"}};

template <typename Body>
int call(const char* name, unsigned needs, Body body) {
    if (forked) return kNotInitialized;
    const Unseen unseen;
    Device& device = Device::get();
    Lock lock(device.mutex);
    if ((needs & kContext) != 0) device.advance(lock);
    int code = device.check(name, needs);
    if (code == 0) code = body(device, lock);
    device.fail_later(std::exchange(late_error, 0));  // unless an operation has taken it
    return code;
}

template <typename Body>
int call_on_stream(const char* name, void* handle, Body body) {
    return call(name, kContext | kInit, [&](Device& device, Lock&) {
        const StreamPtr stream = device.find_stream(handle, name);
        return stream == nullptr ? kInvalidHandle : body(device, stream);
    });
}

template <typename Body>
int call_on_event(const char* name, unsigned needs, void* handle, Body body) {
    return call(name, kContext | kInit | needs, [&](Device& device, Lock& lock) {
        const auto event = device.find_event(handle, name);
        return event == nullptr ? kInvalidHandle : body(device, *event, lock);
    });
}

int copy(const char* name, Kind kind, uint8_t* host, uint64_t pointer, size_t bytes, void* handle) {
    return call_on_stream(name, handle, [&](Device& device, const StreamPtr& stream) {
        if (bytes == 0) return 0;
        if (host == nullptr) return kInvalidValue;
        const auto memory = device.find_memory(pointer, bytes, name);
        if (memory == nullptr) return kInvalidValue;
        if (!device.configuration.pageable && !device.is_registered(host, bytes))
            device.violation("unregistered-memory",
                             std::string(name) + " of " + std::to_string(bytes) + " bytes, not in one registration");
        const OpPtr op = device.make_op(kind, name);
        op->host = host;
        op->device = memory->hidden + (pointer - memory->address);
        op->bytes = bytes;
        op->memory = memory;
        device.enqueue(stream, op);
        return 0;
    });
}

// A kernel whose memory is known.
template <typename Body>
int launch_on(const char* name, void* handle, uint64_t pointer, size_t bytes, Body body) {
    return call_on_stream(name, handle, [&](Device& device, const StreamPtr& stream) {
        const auto memory = device.find_memory(pointer, bytes, name);
        if (memory == nullptr) return kInvalidValue;
        const OpPtr op = device.make_op(Kind::kKernel, name);
        op->memory = memory;
        op->kernel = [=, data = memory->hidden + (pointer - memory->address)] { body(data); };
        device.enqueue(stream, op);
        return 0;
    });
}

std::string described(const Op& op) {
    return std::string(op.call) + " number " + std::to_string(op.serial) + " of " + std::to_string(op.bytes) + " bytes";
}

void forbid_pending(Device& device, const OpPtr& op, const char* kind, const char* name) {
    if (op != nullptr)
        device.violation(kind, std::string(name) + " under a pending " + described(*op), &op->trace, "queued");
}

bool is_mapped(const void* host, size_t bytes) {
    const auto begin = reinterpret_cast<uintptr_t>(host) / 4096 * 4096, end = reinterpret_cast<uintptr_t>(host) + bytes;
    std::vector<unsigned char> resident((end - begin + 4095) / 4096);
    return ::mincore(reinterpret_cast<void*>(begin), end - begin, resident.data()) == 0;
}

// A driver without this function: the loader compares the names of symbols with what stands here.
void hide_symbol(const std::string& name) {
    Dl_info info{};
    link_map* library = nullptr;
    if (::dladdr1(reinterpret_cast<void*>(&cuInit), &info, reinterpret_cast<void**>(&library), RTLD_DL_LINKMAP) == 0)
        std::abort();
    char* names = nullptr;
    size_t size = 0;
    for (const ElfW(Dyn)* entry = library->l_ld; entry->d_tag != DT_NULL; ++entry) {
        if (entry->d_tag == DT_STRTAB) names = reinterpret_cast<char*>(entry->d_un.d_ptr);
        if (entry->d_tag == DT_STRSZ) size = entry->d_un.d_val;
    }
    const std::string whole = '\0' + name + '\0';
    auto* found = static_cast<char*>(::memmem(names, size, whole.data(), whole.size()));
    const auto page = reinterpret_cast<uintptr_t>(found) / 4096 * 4096;
    if (found == nullptr || ::mprotect(reinterpret_cast<void*>(page), 8192, PROT_READ | PROT_WRITE) != 0) {
        std::fprintf(stderr, "NF_FAKE_CUDA: cannot hide %s\n", name.c_str());
        std::abort();
    }
    found[1] = '-';
}

Configuration from_environment() {
    const char* text = std::getenv("NF_FAKE_CUDA");
    return Configuration::parse(text != nullptr ? text : "");
}

__attribute__((constructor)) void load() {
    const Unseen unseen;
    Device& device = Device::get();
    Lock lock(device.mutex);
    device.configure(lock, from_environment());
    ::pthread_atfork(nullptr, nullptr, [] { forked = true; });  // a child has no context, and no threads
    if (!device.configuration.missing.empty()) hide_symbol(device.configuration.missing);
}

void unload() {
    if (forked) return;
    const Unseen unseen;
    const Lock lock(Device::get().mutex);
    Device::get().lose(kDeinitialized);
}

}  // namespace

int cuInit(unsigned flags) {
    return call("cuInit", kNothing, [&](Device& device, Lock&) {
        if (device.lost != 0) return device.lost;
        if (flags != 0) return kInvalidValue;
        if (!std::exchange(device.initialized, true)) std::atexit(unload);
        return 0;
    });
}

int cuDriverGetVersion(int* version) {
    return call("cuDriverGetVersion", kNothing, [&](Device&, Lock&) {
        if (version == nullptr) return kInvalidValue;
        *version = kDriverVersion;
        return 0;
    });
}

int cuGetErrorName(int code, const char** name) {
    return call("cuGetErrorName", kNothing, [&](Device&, Lock&) {
        if (name == nullptr) return kInvalidValue;
        const auto known = std::find_if(std::begin(kNames), std::end(kNames), [&](auto& n) { return n.code == code; });
        *name = known != std::end(kNames) ? known->name : nullptr;
        return *name != nullptr ? 0 : kInvalidValue;
    });
}

int cuDeviceGetCount(int* count) {
    return call("cuDeviceGetCount", kInit, [&](Device&, Lock&) {
        if (count == nullptr) return kInvalidValue;
        *count = 1;
        return 0;
    });
}

int cuDeviceGet(int* device_, int ordinal) {
    return call("cuDeviceGet", kInit, [&](Device&, Lock&) {
        if (device_ == nullptr) return kInvalidValue;
        if (ordinal != 0) return kInvalidDevice;
        *device_ = 0;
        return 0;
    });
}

int cuDevicePrimaryCtxRetain(void** context, int device_) {
    return call("cuDevicePrimaryCtxRetain", kInit, [&](Device&, Lock&) {
        if (context == nullptr) return kInvalidValue;
        if (device_ != 0) return kInvalidDevice;
        *context = &primary_context;
        return 0;
    });
}

int cuCtxGetCurrent(void** context) {
    return call("cuCtxGetCurrent", kInit, [&](Device&, Lock&) {
        if (context == nullptr) return kInvalidValue;
        *context = current_context;
        return 0;
    });
}

int cuCtxSetCurrent(void* context) {
    return call("cuCtxSetCurrent", kInit, [&](Device&, Lock&) {
        if (context != nullptr && context != &primary_context) return kInvalidContext;
        current_context = context;
        return 0;
    });
}

int cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    return call("cuCtxGetStreamPriorityRange", kInit | kContext, [&](Device&, Lock&) {
        if (least != nullptr) *least = kLeastPriority;
        if (greatest != nullptr) *greatest = kGreatestPriority;
        return 0;
    });
}

int cuThreadExchangeStreamCaptureMode(int* mode) {
    return call("cuThreadExchangeStreamCaptureMode", kInit | kContext, [&](Device&, Lock&) {
        if (mode == nullptr || *mode < 0 || *mode > 2) return kInvalidValue;
        std::swap(*mode, capture_mode);
        return 0;
    });
}

int cuStreamCreateWithPriority(void** stream, unsigned flags, int priority) {
    return call("cuStreamCreateWithPriority", kInit | kContext, [&](Device& device, Lock&) {
        if (stream == nullptr || flags > 1) return kInvalidValue;
        const uintptr_t handle = device.next_handle += 16;
        device.make_stream(handle, flags == 0, std::clamp(priority, kGreatestPriority, kLeastPriority));
        *stream = reinterpret_cast<void*>(handle);
        return 0;
    });
}

int cuStreamDestroy_v2(void* handle) {
    return call_on_stream("cuStreamDestroy_v2", handle, [&](Device& device, const StreamPtr& stream) {
        if (stream->handle == 0) return kInvalidHandle;
        stream->destroyed = true;  // its queued work still runs
        device.bury(handle);
        device.remove_if_drained(stream);
        device.changed.notify_all();
        return 0;
    });
}

int cuStreamWaitEvent(void* handle, void* event, unsigned flags) {
    return call_on_stream("cuStreamWaitEvent", handle, [&](Device& device, const StreamPtr& stream) {
        const auto found = device.find_event(event, "cuStreamWaitEvent");
        if (found == nullptr) return kInvalidHandle;
        if (flags != 0) return kInvalidValue;
        if (found->mark == nullptr) return 0;
        const OpPtr op = device.make_op(Kind::kMark, "cuStreamWaitEvent");
        op->after.push_back(found->mark);
        device.enqueue(stream, op);
        return 0;
    });
}

int cuStreamQuery(void* handle) {
    return call("cuStreamQuery", kInit | kContext | kUnsafe, [&](Device& device, Lock&) {
        const StreamPtr stream = device.find_stream(handle, "cuStreamQuery");
        if (stream == nullptr) return kInvalidHandle;
        if (!stream->queue.empty()) return kNotReady;
        if (stream->last != nullptr) Device::observe(*stream->last);
        return 0;
    });
}

int cuEventCreate(void** event, unsigned flags) {
    return call("cuEventCreate", kInit | kContext, [&](Device& device, Lock&) {
        const bool interprocess = (flags & 4) != 0, timed = (flags & 2) == 0;
        if (event == nullptr || flags > 7 || (interprocess && timed)) return kInvalidValue;
        const uintptr_t handle = device.next_handle += 16;
        device.events[handle] = std::make_shared<Event>();
        *event = reinterpret_cast<void*>(handle);
        return 0;
    });
}

int cuEventRecord(void* event, void* handle) {
    return call_on_stream("cuEventRecord", handle, [&](Device& device, const StreamPtr& stream) {
        const auto found = device.find_event(event, "cuEventRecord");
        if (found == nullptr) return kInvalidHandle;
        found->mark = device.make_op(Kind::kMark, "cuEventRecord");
        device.enqueue(stream, found->mark);
        return 0;
    });
}

int cuEventQuery(void* handle) {
    return call_on_event("cuEventQuery", kUnsafe, handle, [](Device&, Event& event, Lock&) {
        if (event.mark == nullptr) return 0;
        if (!event.mark->done) return kNotReady;
        Device::observe(*event.mark);
        return 0;
    });
}

int cuEventSynchronize(void* handle) {
    return call_on_event("cuEventSynchronize", kUnsafe, handle, [](Device& device, Event& event, Lock& lock) {
        const OpPtr mark = event.mark;  // a record while we wait does not move it
        return mark == nullptr ? 0 : device.wait(mark, lock);
    });
}

int cuEventDestroy_v2(void* handle) {
    return call_on_event("cuEventDestroy_v2", kNothing, handle, [&](Device& device, Event&, Lock&) {
        device.bury(handle);
        device.events.erase(reinterpret_cast<uintptr_t>(handle));
        return 0;
    });
}

int cuMemAlloc_v2(unsigned long long* pointer, size_t bytes) {
    return call("cuMemAlloc_v2", kInit | kContext | kUnsafe, [&](Device& device, Lock&) {
        if (pointer == nullptr || bytes == 0) return kInvalidValue;
        const auto memory = std::make_shared<Allocation>(bytes);
        if (!memory->good()) return kOutOfMemory;
        for (auto old = device.freed.begin(); old != device.freed.end();) {  // the address is in use again
            const bool reused =
                old->first < memory->address + bytes && memory->address < old->first + old->second.first;
            old = reused ? device.freed.erase(old) : std::next(old);
        }
        device.allocations[memory->address] = memory;
        *pointer = memory->address;
        return 0;
    });
}

int cuMemFree_v2(unsigned long long pointer) {
    return call("cuMemFree_v2", kInit | kContext | kUnsafe, [&](Device& device, Lock&) {
        if (pointer == 0) return 0;
        const auto memory = device.find_memory(pointer, 1, "cuMemFree_v2");
        if (memory == nullptr || memory->address != pointer) return kInvalidValue;
        forbid_pending(device, device.pending_on(*memory), "free-pending", "cuMemFree_v2");
        std::memset(memory->hidden, 0xFF, memory->mapped);
        device.freed[pointer] = {memory->bytes, Trace::here()};
        device.allocations.erase(pointer);
        return 0;
    });
}

int cuMemHostRegister_v2(void* host, size_t bytes, unsigned flags) {
    return call("cuMemHostRegister_v2", kInit | kContext | kUnsafe, [&](Device& device, Lock&) {
        if (host == nullptr || bytes == 0 || flags > 15 || !is_mapped(host, bytes)) return kInvalidValue;
        const auto address = reinterpret_cast<uintptr_t>(host);
        for (const auto& [begin, size] : device.registrations)
            if (begin < address + bytes && address < begin + size) return kAlreadyRegistered;
        device.registrations[address] = bytes;
        return 0;
    });
}

int cuMemHostUnregister(void* host) {
    return call("cuMemHostUnregister", kInit | kContext | kUnsafe, [&](Device& device, Lock&) {
        const auto found = device.registrations.find(reinterpret_cast<uintptr_t>(host));
        if (found == device.registrations.end()) return kNotRegistered;
        forbid_pending(device, device.pending_on(host, found->second), "unregister-pending", "cuMemHostUnregister");
        device.registrations.erase(found);
        return 0;
    });
}

int cuMemcpyDtoHAsync_v2(void* host, unsigned long long device, size_t bytes, void* stream) {
    return copy("cuMemcpyDtoHAsync_v2", Kind::kToHost, static_cast<uint8_t*>(host), device, bytes, stream);
}

int cuMemcpyHtoDAsync_v2(unsigned long long device, const void* host, size_t bytes, void* stream) {
    auto* source = const_cast<uint8_t*>(static_cast<const uint8_t*>(host));
    return copy("cuMemcpyHtoDAsync_v2", Kind::kToDevice, source, device, bytes, stream);
}

int nf_fake_launch(void* handle, void (*fn)(void*), void* user) {
    return call_on_stream("nf_fake_launch", handle, [&](Device& device, const StreamPtr& stream) {
        if (fn == nullptr) return kInvalidValue;
        const OpPtr op = device.make_op(Kind::kKernel, "nf_fake_launch");
        op->kernel = [=] { fn(user); };
        device.enqueue(stream, op);
        return 0;
    });
}

void* nf_fake_host(unsigned long long pointer) {
    const Unseen unseen;
    Device& device = Device::get();
    const Lock lock(device.mutex);
    if (!in_kernel && !device.idle()) device.violation("host-access", "nf_fake_host on the host while work is queued");
    const auto memory = device.find_memory(pointer, 1, "nf_fake_host");
    return memory == nullptr ? nullptr : memory->hidden + (pointer - memory->address);
}

int nf_fake_launch_fill(void* stream, unsigned long long pointer, size_t bytes, unsigned long long seed) {
    return launch_on("nf_fake_launch_fill", stream, pointer, bytes, [=](uint8_t* data) {
        for (size_t i = 0; i < bytes; i += 8) {
            const uint64_t word = mix(seed, i / 8);
            move_bytes(data + i, reinterpret_cast<const uint8_t*>(&word), std::min<size_t>(8, bytes - i));
        }
    });
}

int nf_fake_launch_check(void* stream, unsigned long long pointer, size_t bytes, unsigned long long seed,
                         int* mismatches) {
    return launch_on("nf_fake_launch_check", stream, pointer, bytes, [=](const uint8_t* data) {
        int count = 0;
        for (size_t i = 0; i < bytes; i += 8) {
            const uint64_t word = mix(seed, i / 8);
            uint64_t difference = 0;
            move_bytes(reinterpret_cast<uint8_t*>(&difference), data + i, std::min<size_t>(8, bytes - i));
            difference ^= bytes - i < 8 ? word & ((uint64_t{1} << 8 * (bytes - i)) - 1) : word;
            for (; difference != 0; difference >>= 8) count += (difference & 0xFF) != 0;
        }
        *mismatches = count;
    });
}

int nf_fake_launch_sleep(void* handle, long microseconds) {
    return call_on_stream("nf_fake_launch_sleep", handle, [&](Device& device, const StreamPtr& stream) {
        const OpPtr op = device.make_op(Kind::kKernel, "nf_fake_launch_sleep");
        op->kernel = [] {};
        op->duration = std::chrono::microseconds(microseconds);
        device.enqueue(stream, op);
        return 0;
    });
}

int nf_fake_begin_capture(void) {
    return call("nf_fake_begin_capture", kInit | kContext, [](Device& device, Lock&) {
        if (capturing) return kNotPermitted;
        capturing = true;
        ++device.captures;
        return 0;
    });
}

int nf_fake_end_capture(void) {
    return call("nf_fake_end_capture", kInit | kContext, [](Device& device, Lock&) {
        if (!capturing) return kNotPermitted;
        capturing = false;
        const bool broken = device.capture_broken;
        if (--device.captures == 0) device.capture_broken = false;
        return broken ? kCaptureInvalidated : 0;
    });
}

void nf_fake_before_unmap(void* address, size_t bytes) {
    const Unseen unseen;
    Device& device = Device::get();
    const Lock lock(device.mutex);
    const auto begin = reinterpret_cast<uintptr_t>(address);
    forbid_pending(device, device.pending_on(address, bytes), "unmap-pending", "unmap");
    for (const auto& [registered, size] : device.registrations)
        if (registered < begin + bytes && begin < registered + size)
            device.violation("unmap-registered", "unmap of " + std::to_string(size) + " registered bytes");
}

int nf_fake_get_report(nf_fake_report* report) {
    if (report == nullptr) return kInvalidValue;
    const Unseen unseen;
    Device& device = Device::get();
    const Lock lock(device.mutex);
    *report = {};
    for (const auto& [handle, stream] : device.streams) {
        report->streams += handle != 0 && !stream->destroyed;
        report->pending += static_cast<long>(stream->queue.size());
    }
    report->events = static_cast<long>(device.events.size());
    report->registrations = static_cast<long>(device.registrations.size());
    report->allocations = static_cast<long>(device.allocations.size());
    report->violations = device.violations;
    for (const auto& [address, bytes] : device.registrations) report->registered_bytes += static_cast<long>(bytes);
    report->copied_d2h = device.copied_d2h;
    report->copied_h2d = device.copied_h2d;
    device.violation_text.copy(report->text, sizeof report->text - 1);
    return 0;
}

int nf_fake_drain(void) {
    return call("nf_fake_drain", kInit, [](Device& device, Lock& lock) {
        device.drain(lock);
        return device.lost != 0 ? device.lost : std::exchange(device.asynchronous, 0);
    });
}

void nf_fake_configure(const char* text) {
    const Unseen unseen;
    const Configuration wanted = Configuration::parse(text != nullptr ? text : "");
    Device& device = Device::get();
    Lock lock(device.mutex);
    device.configure(lock, wanted);
}

void nf_fake_reset(void) {
    const Unseen unseen;
    const Configuration wanted = from_environment();
    Device& device = Device::get();
    Lock lock(device.mutex);
    device.forget(lock);
    device.configure(lock, wanted);
}
