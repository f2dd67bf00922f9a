#include "cache/samples.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace nf {
namespace {

// Small enough to stay in the nearest cache between the look and the copy; no branch inside, so that it vectorises.
constexpr size_t kBlock = 16384;

template <typename Word>
bool copy_finite(uint8_t* to, const uint8_t* from, size_t bytes, Word exponent) {
    for (size_t begin = 0; begin < bytes; begin += kBlock) {
        const size_t n = std::min(kBlock, bytes - begin);
        Word found = 0;
        for (size_t i = 0; i < n; i += sizeof(Word)) {
            Word word;
            std::memcpy(&word, from + begin + i, sizeof word);
            found |= static_cast<Word>((word & exponent) == exponent);
        }
        if (found) return false;
        std::memcpy(to + begin, from + begin, n);
    }
    return true;
}

bool copy_affine(uint8_t* to, const uint8_t* from, size_t samples, const Header& header) {
    const size_t pairs = header.shape[0] * 2 * sizeof(float), size = header.sample_bytes;
    for (size_t i = 0; i < samples; ++i) {
        if (!copy_finite<uint32_t>(to + i * size, from + i * size, pairs, 0x7F800000)) return false;
        std::memcpy(to + i * size + pairs, from + i * size + pairs, size - pairs);
    }
    return true;
}

}  // namespace

void gather(const uint8_t* source, size_t source_size, const int64_t* offsets, size_t count, uint8_t* out,
            size_t size) {
    for (size_t i = 0; i < count; ++i)
        if (size > source_size || static_cast<uint64_t>(offsets[i]) > source_size - size)  // also the negative ones
            throw std::out_of_range("expected offsets within " + std::to_string(source_size) + " bytes less " +
                                    std::to_string(size) + ", got " + std::to_string(offsets[i]));
    for (size_t i = 0; i < count; ++i) std::memcpy(out + i * size, source + offsets[i], size);
}

bool copy_finite(uint8_t* to, const uint8_t* from, size_t samples, const Header& header) {
    const size_t bytes = samples * header.sample_bytes;
    if (header.codec == kAffine8) return copy_affine(to, from, samples, header);
    switch (header.dtype) {
        case kFp32:
            return copy_finite<uint32_t>(to, from, bytes, 0x7F800000);
        case kFp16:
            return copy_finite<uint16_t>(to, from, bytes, 0x7C00);
        case kBf16:
            return copy_finite<uint16_t>(to, from, bytes, 0x7F80);
        default:
            std::memcpy(to, from, bytes);
            return true;
    }
}

}  // namespace nf
