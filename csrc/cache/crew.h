// Threads of one object, and its shutdown: they never touch Python, block all signals, and are joined for a bounded
// time.
#pragma once

#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>

namespace nf {

constexpr std::chrono::milliseconds kSlice{100};  // of a wait, between two looks at pending signals

// Called between two slices of a wait without any lock; may throw to end it.
using Interrupt = std::function<void()>;

class Crew {
  public:
    // `work` must end soon after the caller's own "stop" was set, and must not throw.
    void start(const std::string& name, std::function<void()> work);
    // Waits for all of them. False: some are stuck in a system call after `patience`, and everything that they use must
    // be left alone for ever.
    bool join(std::chrono::milliseconds patience) noexcept;

  private:
    struct Count {
        std::mutex mutex;
        std::condition_variable ended;
        int alive = 0;
    };
    std::shared_ptr<Count> count_ = std::make_shared<Count>();
};

}  // namespace nf
