// A stand-in for the CUDA driver: libnf_fake_cuda.so exports what the engine calls, runs it on host threads, and is at
// least as asynchronous as the real driver and never more forgiving. See fake_device.h for how.
//
//   NF_TESTING=1 NF_LIBCUDA=libnf_fake_cuda.so NF_FAKE_CUDA='mode=scheduler; seed=5' ...
//
// NF_FAKE_CUDA (read when the library is loaded) and nf_fake_configure() take `key=value` pairs, separated by `;`:
//
//   mode=threads          each stream has a thread (default)
//   mode=scheduler        what is queued moves on only while the host is in a CUDA call, one stream at a time, in an
//                         order drawn from the seed; a program of one host thread replays exactly
//   seed=N                of the order of pieces, the delays, the scheduler
//   max_delay_us=N        threads: each copy and kernel starts 0..N us late (default 5000)
//   bandwidth=B           threads: a copy of n bytes keeps its stream busy for n / B seconds (with max_delay_us=0)
//   dry=1                 copies take that time and move nothing: for benches, which would else measure the host
//   call=NAME             a fault, said by the pairs that follow; there may be several
//     n=N error=E           the N-th call of NAME (default 1) gives E
//     late=1                ... it succeeds, its work is lost, and a later call gives E
//     sticky=1              every later call of NAME gives E too
//   exit_on_violation=1   print the violation and leave with status 99
//   pageable=1            copies from and to unregistered memory are no violation, and as asynchronous as others
//   missing=NAME          NF_FAKE_CUDA only: dlsym does not find NAME
//
// Errors 4, 214, 700 and 719 lose the context: every call after them gives the same, and queued work is dropped.
//
// A violation is what CUDA leaves undefined. Its text gives the kind, what was called, and both call sites, each as
// module+offset. Kinds: destroyed-handle, unknown-handle, unregistered-memory, unregister-pending, unmap-pending,
// unmap-registered, free-pending, freed-device-memory, device-range, host-access, cuda-in-kernel.
#pragma once

#include <cstddef>

#define NF_FAKE_API __attribute__((visibility("default")))

extern "C" {

// As in cuda.h, with CUresult = int, CUdeviceptr = unsigned long long and every handle a void*.
NF_FAKE_API int cuInit(unsigned flags);
NF_FAKE_API int cuDriverGetVersion(int* version);
NF_FAKE_API int cuGetErrorName(int code, const char** name);
NF_FAKE_API int cuDeviceGetCount(int* count);
NF_FAKE_API int cuDeviceGet(int* device, int ordinal);
NF_FAKE_API int cuDevicePrimaryCtxRetain(void** context, int device);
NF_FAKE_API int cuCtxGetCurrent(void** context);
NF_FAKE_API int cuCtxSetCurrent(void* context);
NF_FAKE_API int cuCtxGetStreamPriorityRange(int* least, int* greatest);
NF_FAKE_API int cuThreadExchangeStreamCaptureMode(int* mode);
NF_FAKE_API int cuStreamCreateWithPriority(void** stream, unsigned flags, int priority);
NF_FAKE_API int cuStreamDestroy_v2(void* stream);
NF_FAKE_API int cuStreamWaitEvent(void* stream, void* event, unsigned flags);
NF_FAKE_API int cuStreamQuery(void* stream);
NF_FAKE_API int cuEventCreate(void** event, unsigned flags);
NF_FAKE_API int cuEventRecord(void* event, void* stream);
NF_FAKE_API int cuEventQuery(void* event);
NF_FAKE_API int cuEventSynchronize(void* event);
NF_FAKE_API int cuEventDestroy_v2(void* event);
NF_FAKE_API int cuMemAlloc_v2(unsigned long long* pointer, size_t bytes);
NF_FAKE_API int cuMemFree_v2(unsigned long long pointer);
NF_FAKE_API int cuMemHostRegister_v2(void* host, size_t bytes, unsigned flags);
NF_FAKE_API int cuMemHostUnregister(void* host);
NF_FAKE_API int cuMemcpyDtoHAsync_v2(void* host, unsigned long long device, size_t bytes, void* stream);
NF_FAKE_API int cuMemcpyHtoDAsync_v2(unsigned long long device, const void* host, size_t bytes, void* stream);

// Kernels: fn(user) runs in stream order and may make no CUDA call. Results are CUDA's.
NF_FAKE_API int nf_fake_launch(void* stream, void (*fn)(void*), void* user);
// The bytes behind a device pointer: inside a launched fn, or while the device is idle. Null outside any allocation.
NF_FAKE_API void* nf_fake_host(unsigned long long pointer);
// Word i (8 bytes, little endian, the last one cut) of the pattern is SplitMix64: mix(seed, i) of cache/planner.h.
NF_FAKE_API int nf_fake_launch_fill(void* stream, unsigned long long pointer, size_t bytes, unsigned long long seed);
// Counts the bytes that differ into *mismatches, host memory, when it runs.
NF_FAKE_API int nf_fake_launch_check(void* stream, unsigned long long pointer, size_t bytes, unsigned long long seed,
                                     int* mismatches);
NF_FAKE_API int nf_fake_launch_sleep(void* stream, long microseconds);  // scheduler: only its place in the order

// The calling thread captures a graph in global mode: until it ends, query, synchronize, register, unregister, alloc
// and free give 900 on every thread that is not RELAXED, and break the capture: its end gives 901.
NF_FAKE_API int nf_fake_begin_capture(void);
NF_FAKE_API int nf_fake_end_capture(void);

// To be called by whoever unmaps memory that was registered.
NF_FAKE_API void nf_fake_before_unmap(void* address, size_t bytes);

struct nf_fake_report {
    long streams, events, registrations, allocations;  // alive
    long pending;                                      // operations not complete
    long violations;
    long registered_bytes;
    long copied_d2h, copied_h2d;  // bytes that arrived
    char text[8192];              // the first violations, a line each
};
NF_FAKE_API int nf_fake_get_report(struct nf_fake_report* report);
// Runs, or waits for, all that is queued, like cuCtxSynchronize.
NF_FAKE_API int nf_fake_drain(void);
// Replaces the whole configuration, after a drain. The mode changes only while there are no streams.
NF_FAKE_API void nf_fake_configure(const char* text);
// Drains; forgets every object, error and violation; configures as NF_FAKE_CUDA says.
NF_FAKE_API void nf_fake_reset(void);
}
