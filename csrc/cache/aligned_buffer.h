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

  private:
    uint8_t* data_;
    size_t size_;
    int owner_;  // process that mapped it
};

}  // namespace nf
