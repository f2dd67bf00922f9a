#include "cache/samples.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "io/crc32c.h"

namespace nf {
namespace {

// Fits the nearest cache, where looking and summing up find what was just copied; three streams of the CRC.
constexpr size_t kBlock = 3 * 4096;

template <typename Word>
bool finite(const uint8_t* data, size_t bytes, Word exponent) {
    Word found = 0;  // no branch inside, so that it vectorises
    for (size_t i = 0; i < bytes; i += sizeof(Word)) {
        Word word;
        std::memcpy(&word, data + i, sizeof word);
        found |= static_cast<Word>((word & exponent) == exponent);
    }
    return found == 0;
}

template <typename Look>
bool copy_blocks(uint8_t* to, const uint8_t* from, size_t bytes, uint32_t* crc, Look look) {
    for (size_t begin = 0; begin < bytes; begin += kBlock) {
        const size_t n = std::min(kBlock, bytes - begin);
        // The next block is fetched while this one is worked on; beyond the end nothing is.
        for (size_t next = begin + n; next < std::min(bytes, begin + n + kBlock); next += 64)
            __builtin_prefetch(from + next, 0, 2);
        std::memcpy(to + begin, from + begin, n);
        if (!look(to + begin, n)) return false;
        if (crc != nullptr) *crc = crc32c(to + begin, n, *crc);
    }
    return true;
}

template <typename Word>
bool copy_words(uint8_t* to, const uint8_t* from, size_t bytes, uint32_t* crc, Word exponent) {
    return copy_blocks(to, from, bytes, crc,
                       [=](const uint8_t* data, size_t n) { return finite<Word>(data, n, exponent); });
}

bool copy_bytes(uint8_t* to, const uint8_t* from, size_t bytes, uint32_t* crc) {
    return copy_blocks(to, from, bytes, crc, [](const uint8_t*, size_t) { return true; });
}

bool copy_affine(uint8_t* to, const uint8_t* from, size_t samples, const Header& header, uint32_t* crc) {
    const size_t pairs = header.shape[0] * 2 * sizeof(float), size = header.sample_bytes;
    for (size_t at = 0; at < samples * size; at += size) {
        if (!copy_words<uint32_t>(to + at, from + at, pairs, crc, 0x7F800000)) return false;
        copy_bytes(to + at + pairs, from + at + pairs, size - pairs, crc);
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

bool copy_finite(uint8_t* to, const uint8_t* from, size_t samples, const Header& header, uint32_t* crc) {
    const size_t bytes = samples * header.sample_bytes;
    if (header.codec == kAffine8) return copy_affine(to, from, samples, header, crc);
    switch (header.dtype) {
        case kFp32:
            return copy_words<uint32_t>(to, from, bytes, crc, 0x7F800000);
        case kFp16:
            return copy_words<uint16_t>(to, from, bytes, crc, 0x7C00);
        case kBf16:
            return copy_words<uint16_t>(to, from, bytes, crc, 0x7F80);
        default:
            return copy_bytes(to, from, bytes, crc);
    }
}

}  // namespace nf
