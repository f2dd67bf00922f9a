#include "cache/crew.h"

#include <pthread.h>
#include <signal.h>

#include <thread>
#include <utility>

namespace nf {

void Crew::start(const std::string& name, std::function<void()> work) {
    sigset_t all, before;
    ::sigfillset(&all);
    {
        const std::lock_guard<std::mutex> lock(count_->mutex);
        ++count_->alive;
    }
    ::pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
        std::thread([count = count_, name, work = std::move(work)]() mutable {
            ::pthread_setname_np(::pthread_self(), name.substr(0, 15).c_str());
            work();
            work = nullptr;  // lets go of what it holds before it counts as ended
            const std::lock_guard<std::mutex> lock(count->mutex);
            --count->alive;
            count->ended.notify_all();
        }).detach();
    } catch (...) {
        ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
        const std::lock_guard<std::mutex> lock(count_->mutex);
        --count_->alive;
        throw;
    }
    ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

bool Crew::join(std::chrono::milliseconds patience) noexcept {
    std::unique_lock<std::mutex> lock(count_->mutex);
    return count_->ended.wait_for(lock, patience, [&] { return count_->alive == 0; });
}

}  // namespace nf
