// Memory of the kernel's pages: O_DIRECT takes no other (torch's CPU tensors lie at address % 512 = 64).
#pragma once

#include <cstddef>
#include <cstdint>

namespace nf {

class AlignedBuffer {
  public:
    explicit AlignedBuffer(size_t bytes);  // zero-filled
    ~AlignedBuffer();
    AlignedBuffer(const AlignedBuffer&) = delete;
    AlignedBuffer& operator=(const AlignedBuffer&) = delete;

    uint8_t* data() const { return data_; }
    size_t size() const { return size_; }
    void touch();                // every page is there afterwards
    void leak() { owner_ = 0; }  // on purpose: somebody may write to it for ever

  private:
    uint8_t* data_;
    size_t size_;
    int owner_;  // process that mapped it
};

// Fills memory that nobody may read any more with 0xA5 where NF_DEBUG_POISON=1, so that a late reader is seen.
void poison(uint8_t* data, size_t bytes);

}  // namespace nf
