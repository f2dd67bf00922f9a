#include "cache/samples.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace nf {
namespace {

template <typename Word>
bool all_finite(const uint8_t* data, size_t count, Word exponent) {
    constexpr size_t kBlock = 8192;  // values; no branch inside, so that the compiler vectorises the loop
    for (size_t begin = 0; begin < count; begin += kBlock) {
        const size_t n = std::min(kBlock, count - begin);
        Word found = 0;
        for (size_t i = 0; i < n; ++i) {
            Word word;
            std::memcpy(&word, data + (begin + i) * sizeof word, sizeof word);
            found |= static_cast<Word>((word & exponent) == exponent);
        }
        if (found) return false;
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

bool all_finite16(const uint8_t* data, size_t count, uint16_t exponent) { return all_finite(data, count, exponent); }
bool all_finite32(const uint8_t* data, size_t count, uint32_t exponent) { return all_finite(data, count, exponent); }

}  // namespace nf
