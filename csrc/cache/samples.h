// What is done to samples in memory: gathered into a batch, and looked at for values that are not finite.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cache/format.h"

namespace nf {

// out[i] = the `size` bytes of `source` at offsets[i].
void gather(const uint8_t* source, size_t source_size, const int64_t* offsets, size_t count, uint8_t* out, size_t size);

// Copies whole samples as they are stored; false where a value is NaN or infinite: of codec affine8, a lo or a step.
// `crc`, where given, is continued over what is copied, for which the bytes need not be fetched again.
bool copy_finite(uint8_t* to, const uint8_t* from, size_t samples, const Header& header, uint32_t* crc = nullptr);

}  // namespace nf
