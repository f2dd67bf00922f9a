// What is done to samples in memory: gathered into a batch, and looked at for values that are not finite.
#pragma once

#include <cstddef>
#include <cstdint>

namespace nf {

// out[i] = the `size` bytes of `source` at offsets[i].
void gather(const uint8_t* source, size_t source_size, const int64_t* offsets, size_t count, uint8_t* out, size_t size);

// Whether no value is NaN or infinite, that is, whether no value has all of `exponent` set.
bool all_finite16(const uint8_t* data, size_t count, uint16_t exponent);
bool all_finite32(const uint8_t* data, size_t count, uint32_t exponent);

}  // namespace nf
