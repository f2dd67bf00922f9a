// What all caches of one device share: host memory, the device, and the age at which a request counts as hung.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cache/arena.h"
#include "cache/crew.h"
#include "gpu/driver.h"

namespace nf {

// A writer takes half of the arena and never less than 8 slabs while they fit: what a device has computed ahead must
// find room, or the caller waits for the disk before it can start the next batch. The other half is for readers'
// pieces.
constexpr size_t kSlabs = 8, kPieces = 6, kFewest = 2, kPieceBytes = size_t{4} << 20;
constexpr int64_t kReadAhead = 4;  // chunks beyond the window, so that the disk works while the window drains

class Engine {
  public:
    // device -1: none; then the arena is plain memory.
    Engine(size_t pinned_bytes, int device, double io_timeout);

    const std::shared_ptr<Arena> arena;
    const std::chrono::duration<double> io_timeout;
    const std::shared_ptr<gpu::Gpu>& gpu() const { return gpu_; }

  private:
    Engine(size_t pinned_bytes, std::shared_ptr<gpu::Gpu> gpu, double io_timeout);
    std::shared_ptr<gpu::Gpu> gpu_;
};

// Lock, first error and requests under way of one object with I/O threads.
struct Work {
    std::mutex mutex;
    std::condition_variable threads, caller;  // who waits: our threads; Python's
    bool cancelled = false;
    std::exception_ptr error;                                       // the first one
    std::chrono::milliseconds patience = std::chrono::seconds(10);  // of whoever joins the threads
    struct Request {
        int64_t offset = -1;  // -1: none under way
        std::chrono::steady_clock::time_point begun;
    };
    std::vector<Request> requests;  // one a thread

    // The calls below expect the lock to be held.
    void fail(std::exception_ptr what);  // keeps the first, wakes everybody
    void cancel();
    // Until done() or an error, which is thrown; `interrupt` is called without the lock between slices. A request older
    // than `timeout` is an error.
    template <typename Done>
    void wait(std::unique_lock<std::mutex>& lock, const Interrupt& interrupt, const std::string& op,
              const std::string& path, std::chrono::duration<double> timeout, Done done) {
        while (!error && !done()) {
            caller.wait_for(lock, kSlice);
            if (error || done()) break;
            check_age(op, path, timeout);
            if (interrupt) {
                lock.unlock();
                interrupt();
                lock.lock();
            }
        }
        if (error) std::rethrow_exception(error);
    }

  private:
    void check_age(const std::string& op, const std::string& path, std::chrono::duration<double> timeout);
};

}  // namespace nf
