// Write-behind: samples go into slabs of one chunk each, threads check-sum and write the slabs, the caller computes on.
//
// Back-pressure is the pool of slabs: append() waits only where all of them are full. From a device the copies run on
// their own stream into pinned slabs. The first error is latched: what is queued is dropped, every later call throws
// it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cache/crew.h"
#include "cache/engine.h"
#include "cache/format.h"
#include "cache/stats.h"
#include "gpu/copy_queue.h"
#include "io/file.h"
#include "io/fork.h"

namespace nf {

class Writer {
  public:
    // Creates <name>.tmp in full size. `staging`: device slots that append() reads from, each fenced by its own event.
    Writer(std::shared_ptr<Engine> engine, std::shared_ptr<Folder> folder, const std::string& name,
           const uint8_t* header, int threads, size_t staging, bool durable);
    ~Writer();
    Writer(const Writer&) = delete;
    Writer& operator=(const Writer&) = delete;

    // From host memory: everything is copied before the return. Throws NonFinite where a value is.
    void append(const uint8_t* samples, size_t count, const Record* records, const Interrupt& interrupt);
    // From device memory, as the work on `stream` leaves it; it may be overwritten by work that follows fence(slot).
    void append_device(gpu::DevicePointer samples, size_t count, const Record* records, gpu::Stream stream, size_t slot,
                       const Interrupt& interrupt);
    void fence(size_t slot, gpu::Stream stream);
    // Drains, writes table and footer, closes and renames. Returns the table, padded to a page.
    std::vector<uint8_t> finish(const Interrupt& interrupt);
    void abort();  // gives up and removes the .tmp; nothing after finish()

    const Stats& stats() const;
    bool direct() const;
    uint64_t appended() const;

  private:
    struct State;
    struct Slab;
    static void write_slabs(const std::shared_ptr<State>& state, size_t thread);
    Slab& current(const Interrupt& interrupt);
    void enqueue();
    void check_room(size_t count) const;
    void usable() const;
    template <typename Copy>
    void fill(size_t count, const Record* records, const Interrupt& interrupt, Copy copy);
    bool release() noexcept;

    const io::Origin origin_;
    std::shared_ptr<Engine> engine_;
    std::shared_ptr<Folder> folder_;
    std::string name_, temporary_;  // made early: giving up asks for no memory
    bool durable_;
    std::shared_ptr<State> state_;
    Crew crew_;
    std::unique_ptr<gpu::CopyQueue> copies_;
    std::unique_ptr<gpu::Events> produced_, fences_;
    Slab* filling_ = nullptr;
    uint64_t appended_ = 0;
    bool ended_ = false;
    bool unfinished_ = false;  // there is a .tmp, ours to remove
};

}  // namespace nf
