#include "io/fork.h"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <new>
#include <vector>

#include "io/io_vtable.h"

namespace nf::io {

std::mutex survives_fork;

namespace {

std::atomic<uint64_t> forks{0};
std::vector<int> ours;  // guarded by survives_fork

void before() { survives_fork.lock(); }

void in_parent() { survives_fork.unlock(); }

void in_child() {
    forks.fetch_add(1);
    for (const int fd : ours) ::close(fd);
    ours.clear();
    survives_fork.unlock();
}

}  // namespace

void handle_forks() {
    static const int failed = pthread_atfork(before, in_parent, in_child);
    if (failed) throw std::bad_alloc();
}

Origin::Origin() : forks_(forks.load()) {}

bool Origin::here() const { return forks_ == forks.load(); }

// The lock covers the call as well: a fork between the two would give the child a descriptor that is not in the list.
int open_for_this_process(int folder, const char* name, int flags, mode_t mode) {
    const std::lock_guard<std::mutex> lock(survives_fork);
    ours.reserve(ours.size() + 1);
    const int fd = open(folder, name, flags, mode, name);
    if (fd >= 0) ours.push_back(fd);
    return fd;
}

int close_for_this_process(int fd, const char* name) {
    const std::lock_guard<std::mutex> lock(survives_fork);
    ours.erase(std::remove(ours.begin(), ours.end(), fd), ours.end());
    return close(fd, name);
}

}  // namespace nf::io
