// Counts of one cache, from its creation or opening on; read while the threads go on.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace nf {

struct Stats {
    std::atomic<uint64_t> bytes_written{0}, bytes_read{0}, rereads{0};
    std::atomic<uint64_t> write_busy_ns{0}, read_busy_ns{0};    // threads inside the disk's system calls, summed
    std::atomic<uint64_t> write_stall_ns{0}, read_stall_ns{0};  // the caller waited for a free slab, for a batch
    std::atomic<uint64_t> peak_slabs{0};
};

// Adds the time until its end to a counter.
class Timed {
  public:
    explicit Timed(std::atomic<uint64_t>& counter) : counter_(counter), begun_(std::chrono::steady_clock::now()) {}
    ~Timed() {
        const auto passed = std::chrono::steady_clock::now() - begun_;
        counter_ += static_cast<uint64_t>(std::chrono::nanoseconds(passed).count());
    }
    Timed(const Timed&) = delete;
    Timed& operator=(const Timed&) = delete;

  private:
    std::atomic<uint64_t>& counter_;
    std::chrono::steady_clock::time_point begun_;
};

}  // namespace nf
