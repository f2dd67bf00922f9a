#include "cache/engine.h"

#include <cerrno>
#include <utility>

#include "io/error.h"

namespace nf {

Engine::Engine(size_t pinned_bytes, int device, double timeout)
    : Engine(pinned_bytes, device < 0 ? nullptr : gpu::Gpu::open(device), timeout) {}

Engine::Engine(size_t pinned_bytes, std::shared_ptr<gpu::Gpu> gpu, double timeout)
    : arena(std::make_shared<Arena>(pinned_bytes, gpu)), io_timeout(timeout), gpu_(std::move(gpu)) {}

void Work::fail(std::exception_ptr what) {
    if (!error) error = std::move(what);
    cancel();
}

void Work::cancel() {
    cancelled = true;
    threads.notify_all();
    caller.notify_all();
}

void Work::check_age(const std::string& op, const std::string& path, std::chrono::duration<double> timeout) {
    const auto now = std::chrono::steady_clock::now();
    for (const Request& request : requests)
        if (request.offset >= 0 && now - request.begun > timeout) {
            patience = kSlice;  // this one has been waited for long enough
            return fail(std::make_exception_ptr(SystemError(op, path, request.offset, ETIMEDOUT, 0, 0)));
        }
}

}  // namespace nf
