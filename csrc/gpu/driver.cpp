#include "gpu/driver.h"

#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <utility>

namespace nf::gpu {
namespace {

constexpr unsigned kStreamNonBlocking = 1, kEventBlockingSync = 1, kEventDisableTiming = 2, kRegisterPortable = 1;
constexpr int kCaptureRelaxed = 2;

struct Driver {
    Api api;
    int devices = 0;
    Status status{false, ""};
};

std::string name_of(const Api& api, Result code) {
    const char* name = nullptr;
    if (api.error_name != nullptr && api.error_name(code, &name) == 0 && name != nullptr) return name;
    return "error " + std::to_string(code);
}

std::string library() {
    const char* testing = std::getenv("NF_TESTING");
    const char* path = std::getenv("NF_LIBCUDA");
    return testing != nullptr && std::strcmp(testing, "1") == 0 && path != nullptr ? path : "libcuda.so.1";
}

Driver open_driver() {
    Driver driver;
    const std::string path = library();
    const auto refuse = [&](const std::string& reason) {
        driver.status = {false, reason};
        return driver;
    };
    // NODELETE: the driver keeps threads of its own, which outlive any handle.
    void* handle = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (handle == nullptr) return refuse("no CUDA driver: " + std::string(::dlerror()));
#define NF_LOOK_UP(method, symbol, ...)                                                     \
    driver.api.method = reinterpret_cast<Result (*)(__VA_ARGS__)>(::dlsym(handle, symbol)); \
    if (driver.api.method == nullptr) return refuse(path + " has no " symbol "; update the driver");
    NF_CUDA_FUNCTIONS(NF_LOOK_UP)
#undef NF_LOOK_UP
    Result code = driver.api.init(0);
    if (code != 0) return refuse("cuInit: " + name_of(driver.api, code));
    int version = 0;
    code = driver.api.driver_version(&version);
    if (code == 0) code = driver.api.device_count(&driver.devices);
    if (code != 0) return refuse("cuDeviceGetCount: " + name_of(driver.api, code));
    if (driver.devices == 0) return refuse("the CUDA driver shows no device");
    driver.status = {true, "CUDA driver " + std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10) +
                               ", " + std::to_string(driver.devices) + " device" + (driver.devices > 1 ? "s" : "")};
    return driver;
}

const Driver& driver() {
    static const Driver opened = open_driver();
    return opened;
}

}  // namespace

DeviceError::DeviceError(std::string call_, Result code_, const std::string& name)
    : std::runtime_error(call_ + " failed: " + name + " (" + std::to_string(code_) +
                         "); the device is taken for lost and nothing more is asked of it; start a new process"),
      call(std::move(call_)),
      code(code_) {}

Status status() { return driver().status; }

std::shared_ptr<Gpu> Gpu::open(int ordinal) {
    const Driver& opened = driver();
    if (!opened.status.available) throw std::runtime_error(opened.status.reason);
    if (ordinal < 0 || ordinal >= opened.devices)
        throw std::invalid_argument("expected a device in 0.." + std::to_string(opened.devices - 1) + ", got " +
                                    std::to_string(ordinal));
    const auto gpu = std::shared_ptr<Gpu>(new Gpu(opened.api, nullptr, 0));
    Device device = 0;
    gpu->check("cuDeviceGet", opened.api.device_get(&device, ordinal));
    gpu->check("cuDevicePrimaryCtxRetain", opened.api.primary_context(&gpu->context_, device));
    const Scope scope(gpu.get());
    int least = 0, greatest = 0;
    gpu->check("cuCtxGetStreamPriorityRange", opened.api.priority_range(&least, &greatest));
    gpu->priority_ = least;
    return gpu;
}

void Gpu::check(const char* call, Result result) {
    if (result == 0) return;
    lost_ = true;
    throw DeviceError(call, result, name_of(api_, result));
}

void Gpu::ready(const char* call) const {
    if (lost()) throw DeviceError(call, 0, "the device was lost before");
}

Stream Gpu::make_stream() {
    ready("cuStreamCreateWithPriority");
    Stream stream = nullptr;
    check("cuStreamCreateWithPriority", api_.stream_create(&stream, kStreamNonBlocking, priority_));
    return stream;
}

Event Gpu::make_event() {
    ready("cuEventCreate");
    Event event = nullptr;
    check("cuEventCreate", api_.event_create(&event, kEventBlockingSync | kEventDisableTiming));
    return event;
}

void Gpu::destroy_stream(Stream stream) noexcept {
    if (!lost() && api_.stream_destroy(stream) != 0) lost_ = true;
}

void Gpu::destroy_event(Event event) noexcept {
    if (!lost() && api_.event_destroy(event) != 0) lost_ = true;
}

void Gpu::wait(Stream stream, Event event) {
    ready("cuStreamWaitEvent");
    check("cuStreamWaitEvent", api_.stream_wait(stream, event, 0));
}

void Gpu::record(Event event, Stream stream) {
    ready("cuEventRecord");
    check("cuEventRecord", api_.event_record(event, stream));
}

void Gpu::synchronize(Event event) {
    ready("cuEventSynchronize");
    check("cuEventSynchronize", api_.event_synchronize(event));
}

void Gpu::copy_to_host(void* to, DevicePointer from, size_t bytes, Stream stream) {
    ready("cuMemcpyDtoHAsync");
    check("cuMemcpyDtoHAsync", api_.copy_to_host(to, from, bytes, stream));
}

void Gpu::copy_to_device(DevicePointer to, const void* from, size_t bytes, Stream stream) {
    ready("cuMemcpyHtoDAsync");
    check("cuMemcpyHtoDAsync", api_.copy_to_device(to, from, bytes, stream));
}

bool Gpu::register_memory(void* data, size_t bytes) {
    return !lost() && api_.host_register(data, bytes, kRegisterPortable) == 0;
}

void Gpu::unregister_memory(void* data) noexcept {
    if (!lost() && api_.host_unregister(data) != 0) lost_ = true;
}

void Gpu::enter_thread() {
    ready("cuCtxSetCurrent");
    check("cuCtxSetCurrent", api_.set_context(context_));
    int mode = kCaptureRelaxed;
    check("cuThreadExchangeStreamCaptureMode", api_.exchange_capture_mode(&mode));
}

Scope::Scope(Gpu* gpu) : gpu_(gpu) {
    if (gpu_ == nullptr || gpu_->lost()) return;
    gpu_->check("cuCtxGetCurrent", gpu_->api_.current_context(&before_));
    gpu_->check("cuCtxSetCurrent", gpu_->api_.set_context(gpu_->context_));
}

Scope::~Scope() {
    if (gpu_ != nullptr && !gpu_->lost() && gpu_->api_.set_context(before_) != 0) gpu_->lost_ = true;
}

}  // namespace nf::gpu
