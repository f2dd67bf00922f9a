// The host memory of all copies to and from a device and of all writes: one mapping, registered once, lent in pieces.
//
// Its size is the bound on pinned bytes. Writers borrow slabs and readers borrow pieces; a lease is taken whole before
// any work, so that nothing ever waits for memory that somebody else holds.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "cache/aligned_buffer.h"
#include "gpu/driver.h"
#include "io/fork.h"

namespace nf {

class Arena;

// `count` pieces of `stride` bytes, back to back; given back at the end.
class Lease {
  public:
    Lease(std::shared_ptr<Arena> arena, size_t offset, size_t stride, size_t count);
    ~Lease();
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    uint8_t* piece(size_t i) const;
    size_t count() const { return count_; }

  private:
    std::shared_ptr<Arena> arena_;
    size_t offset_, stride_, count_;
};

class Arena : public std::enable_shared_from_this<Arena> {
  public:
    // With a gpu the memory is registered; where that is refused, half as much is tried, down to a sixteenth, then the
    // memory stays unpinned, which costs speed only. note() then says so.
    Arena(size_t bytes, std::shared_ptr<gpu::Gpu> gpu);
    ~Arena();

    // Up to `count` pieces, at least `least`. Throws MemoryError where not even those are free, ClosedError in a child.
    std::unique_ptr<Lease> lend(size_t stride, size_t count, size_t least, const std::string& what);

    uint8_t* data() const { return memory_->data(); }
    size_t size() const { return memory_->size(); }
    size_t pinned() const { return pinned_ ? memory_->size() : 0; }
    const std::string& note() const { return note_; }

  private:
    friend class Lease;
    size_t longest_gap(size_t& offset) const;

    const io::Origin origin_;
    std::shared_ptr<gpu::Gpu> gpu_;
    std::unique_ptr<AlignedBuffer> memory_;
    bool pinned_ = false;
    std::string note_;
    std::mutex mutex_;
    std::map<size_t, size_t> lent_;  // offset -> bytes
};

}  // namespace nf
