#include "cache/arena.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "cache/error.h"
#include "io/error.h"
#include "io/file.h"

namespace nf {

Lease::Lease(std::shared_ptr<Arena> arena, size_t offset, size_t stride, size_t count)
    : arena_(std::move(arena)), offset_(offset), stride_(stride), count_(count) {}

Lease::~Lease() {
    const std::lock_guard<std::mutex> lock(arena_->mutex_);
    poison(piece(0), count_ * stride_);
    arena_->lent_.erase(offset_);
}

uint8_t* Lease::piece(size_t i) const { return arena_->data() + offset_ + i * stride_; }

Arena::Arena(size_t bytes, std::shared_ptr<gpu::Gpu> gpu) : gpu_(std::move(gpu)) {
    memory_ = std::make_unique<AlignedBuffer>(bytes);
    if (gpu_ == nullptr) return;
    const gpu::Scope scope(gpu_.get());
    for (size_t tried = bytes; tried >= bytes / 16 && tried >= kPage; tried = tried / 2 / kPage * kPage) {
        if (tried != memory_->size()) memory_ = std::make_unique<AlignedBuffer>(tried);
        memory_->touch();
        if ((pinned_ = gpu_->register_memory(memory_->data(), tried))) break;
    }
    if (!pinned_) memory_ = std::make_unique<AlignedBuffer>(bytes);
    if (pinned() != bytes)
        note_ = "the driver pinned " + std::to_string(pinned()) + " of " + std::to_string(bytes) +
                " bytes of host memory; copies to and from the device may be slower";
}

Arena::~Arena() {
    if (gpu_ == nullptr || !pinned_) return;
    try {
        const gpu::Scope scope(gpu_.get());
        gpu_->unregister_memory(memory_->data());
    } catch (const gpu::DeviceError&) {
        memory_->leak();
    }
    if (gpu_->lost()) memory_->leak();  // a copy may still be under way that nobody can wait for
}

size_t Arena::longest_gap(size_t& offset) const {
    size_t best = 0, end = 0;
    const auto look = [&](size_t begin) {
        if (begin > end && begin - end > best) best = begin - end, offset = end;
    };
    for (const auto& [begin, bytes] : lent_) {
        look(begin);
        end = begin + bytes;
    }
    look(memory_->size());
    return best;
}

std::unique_ptr<Lease> Arena::lend(size_t stride, size_t count, size_t least, const std::string& what) {
    if (!origin_.here()) throw ClosedError(what);  // the memory is not there in a child
    const std::lock_guard<std::mutex> lock(mutex_);
    size_t offset = 0;
    const size_t gap = longest_gap(offset);
    const size_t fits = std::min(count, gap / stride);
    if (fits < least)
        throw MemoryError(what + ": expected room for " + std::to_string(least) + " x " + std::to_string(stride) +
                          " bytes in the cache's host memory, got " + std::to_string(gap) + " of " +
                          std::to_string(memory_->size()) + " bytes; raise pinned_bytes or lower chunk_bytes");
    const auto entry = lent_.emplace(offset, fits * stride).first;
    try {
        return std::make_unique<Lease>(shared_from_this(), offset, stride, fits);
    } catch (...) {  // no memory; a Lease would have taken the lock to give its pieces back
        lent_.erase(entry);
        throw;
    }
}

}  // namespace nf
