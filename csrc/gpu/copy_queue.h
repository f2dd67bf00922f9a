// A stream of copies between pinned memory and the device, and the events that order it with other streams.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "gpu/driver.h"

namespace nf::gpu {

// Events of one Gpu, made together; never recorded means complete.
class Events {
  public:
    Events(std::shared_ptr<Gpu> gpu, size_t count);
    ~Events();
    Events(const Events&) = delete;
    Events& operator=(const Events&) = delete;

    void record(size_t i, Stream stream) { gpu_->record(events_[i], stream); }
    void make_wait(size_t i, Stream stream) { gpu_->wait(stream, events_[i]); }
    void synchronize(size_t i) { gpu_->synchronize(events_[i]); }

  private:
    std::shared_ptr<Gpu> gpu_;
    std::vector<Event> events_;
};

// Non-blocking, at the least priority: a hint only, since priorities reach kernels and not copies.
class CopyQueue {
  public:
    explicit CopyQueue(std::shared_ptr<Gpu> gpu);
    ~CopyQueue();
    CopyQueue(const CopyQueue&) = delete;
    CopyQueue& operator=(const CopyQueue&) = delete;

    Stream stream() const { return stream_; }
    void to_host(void* to, DevicePointer from, size_t bytes) { gpu_->copy_to_host(to, from, bytes, stream_); }
    void to_device(DevicePointer to, const void* from, size_t bytes) { gpu_->copy_to_device(to, from, bytes, stream_); }
    void drain() noexcept;  // waits until every copy has ended; nothing once the device is lost

  private:
    std::shared_ptr<Gpu> gpu_;
    Events end_;
    Stream stream_;
};

}  // namespace nf::gpu
