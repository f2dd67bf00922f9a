// The CUDA driver, opened at run time: one binary serves machines with and without a GPU, and every CUDA version.
//
// Own prototypes, `dlsym` with explicit names, `dlopen` on the first request for a GPU and never at import. What is
// missing (library, symbol, device) leaves the CPU path, and says why. Source: the CUDA driver API.
#pragma once

#include <atomic>
#include <cstddef>
#include <memory>
#include <stdexcept>
#include <string>

#include "io/fork.h"

namespace nf::gpu {

using Result = int;  // CUresult, 0 is success
using Device = int;
using Context = void*;
using Stream = void*;  // null: torch's default stream
using Event = void*;
using DevicePointer = unsigned long long;

// X(method, symbol, parameters)
#define NF_CUDA_FUNCTIONS(X)                                                              \
    X(init, "cuInit", unsigned)                                                           \
    X(driver_version, "cuDriverGetVersion", int*)                                         \
    X(error_name, "cuGetErrorName", Result, const char**)                                 \
    X(device_count, "cuDeviceGetCount", int*)                                             \
    X(device_get, "cuDeviceGet", Device*, int)                                            \
    X(primary_context, "cuDevicePrimaryCtxRetain", Context*, Device)                      \
    X(current_context, "cuCtxGetCurrent", Context*)                                       \
    X(set_context, "cuCtxSetCurrent", Context)                                            \
    X(priority_range, "cuCtxGetStreamPriorityRange", int*, int*)                          \
    X(stream_create, "cuStreamCreateWithPriority", Stream*, unsigned, int)                \
    X(stream_destroy, "cuStreamDestroy_v2", Stream)                                       \
    X(stream_wait, "cuStreamWaitEvent", Stream, Event, unsigned)                          \
    X(event_create, "cuEventCreate", Event*, unsigned)                                    \
    X(event_record, "cuEventRecord", Event, Stream)                                       \
    X(event_synchronize, "cuEventSynchronize", Event)                                     \
    X(event_destroy, "cuEventDestroy_v2", Event)                                          \
    X(copy_to_host, "cuMemcpyDtoHAsync_v2", void*, DevicePointer, size_t, Stream)         \
    X(copy_to_device, "cuMemcpyHtoDAsync_v2", DevicePointer, const void*, size_t, Stream) \
    X(host_register, "cuMemHostRegister_v2", void*, size_t, unsigned)                     \
    X(host_unregister, "cuMemHostUnregister", void*)                                      \
    X(exchange_capture_mode, "cuThreadExchangeStreamCaptureMode", int*)

struct Api {
#define NF_MEMBER(method, symbol, ...) Result (*method)(__VA_ARGS__) = nullptr;
    NF_CUDA_FUNCTIONS(NF_MEMBER)
#undef NF_MEMBER
};

// A CUDA call failed: the context is taken for lost.
struct DeviceError : std::runtime_error {
    DeviceError(std::string call, Result code, const std::string& name);
    std::string call;
    Result code;
};

struct Status {
    bool available;
    std::string reason;  // driver version and number of devices, or what is missing
};

// Opens the driver on the first call; NF_TESTING=1 NF_LIBCUDA=path names another library.
Status status();

// One device's primary context, which torch made. After its first error no call reaches the driver again, nor does one
// from the child of a fork, which has no context.
class Gpu {
  public:
    static std::shared_ptr<Gpu> open(int ordinal);  // throws std::runtime_error with the reason where there is none

    // Each call throws DeviceError.
    Stream make_stream();
    Event make_event();
    void destroy_stream(Stream stream) noexcept;
    void destroy_event(Event event) noexcept;
    void wait(Stream stream, Event event);
    void record(Event event, Stream stream);
    void synchronize(Event event);
    void copy_to_host(void* to, DevicePointer from, size_t bytes, Stream stream);
    void copy_to_device(DevicePointer to, const void* from, size_t bytes, Stream stream);
    bool register_memory(void* data, size_t bytes);  // false: refused
    void unregister_memory(void* data) noexcept;

    void enter_thread();  // of our own threads, once: the context, and calls that no graph capture elsewhere forbids
    bool lost() const { return lost_.load() || !origin_.here(); }

  private:
    friend class Scope;
    Gpu(const Api& api, Context context, int priority) : api_(api), context_(context), priority_(priority) {}
    void check(const char* call, Result result);
    void ready(const char* call) const;

    const io::Origin origin_;
    const Api& api_;
    Context context_;
    int priority_;
    std::atomic<bool> lost_{false};
};

// Sets the context on a thread that is not ours, and puts the thread's own one back. Nothing for a null Gpu.
class Scope {
  public:
    explicit Scope(Gpu* gpu);
    ~Scope();
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

  private:
    Gpu* gpu_;
    Context before_ = nullptr;
};

}  // namespace nf::gpu
