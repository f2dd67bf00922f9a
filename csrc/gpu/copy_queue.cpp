#include "gpu/copy_queue.h"

namespace nf::gpu {

Events::Events(std::shared_ptr<Gpu> gpu, size_t count) : gpu_(std::move(gpu)) {
    events_.reserve(count);
    const Scope scope(gpu_.get());
    try {
        while (events_.size() < count) events_.push_back(gpu_->make_event());
    } catch (...) {
        for (Event event : events_) gpu_->destroy_event(event);
        throw;
    }
}

Events::~Events() {
    if (gpu_->lost()) return;
    try {
        const Scope scope(gpu_.get());
        for (Event event : events_) gpu_->destroy_event(event);
    } catch (const DeviceError&) {
        return;  // lost just now: what the device holds goes with the process
    }
}

CopyQueue::CopyQueue(std::shared_ptr<Gpu> gpu) : gpu_(std::move(gpu)), end_(gpu_, 1), stream_(nullptr) {
    const Scope scope(gpu_.get());
    stream_ = gpu_->make_stream();
}

CopyQueue::~CopyQueue() {
    if (gpu_->lost()) return;
    try {
        const Scope scope(gpu_.get());
        gpu_->destroy_stream(stream_);
    } catch (const DeviceError&) {
        return;
    }
}

void CopyQueue::drain() noexcept {
    if (gpu_->lost()) return;
    try {
        const Scope scope(gpu_.get());
        end_.record(0, stream_);
        end_.synchronize(0);
    } catch (const DeviceError&) {
        return;  // no copy will end any more; the memory is leaked by its owner
    }
}

}  // namespace nf::gpu
