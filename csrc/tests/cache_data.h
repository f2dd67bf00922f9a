// The content of a cache as the tests write it, and their random numbers.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cache/format.h"
#include "cache/planner.h"
#include "io/crc32c.h"

namespace {

using Bytes = std::vector<uint8_t>;
std::atomic<long> bytes_compared{0};

class Random {
  public:
    explicit Random(uint64_t key) : key_(key) {}
    uint64_t next() { return nf::mix(key_, count_++); }
    uint64_t below(uint64_t n) { return next() % n; }
    bool one_in(uint64_t n) { return below(n) == 0; }
    uint64_t scaled(uint64_t most) { return 1 + next() % (1 + (most >> below(18))); }  // 1..most + 1, mostly small
    Random split() { return Random(next()); }

  private:
    uint64_t key_, count_ = 0;
};

void put(Bytes& page, size_t offset, size_t width, uint64_t value) {
    for (size_t i = 0; i < width; ++i) page[offset + i] = static_cast<uint8_t>(value >> (8 * i));
}

// The content of one cache: u8 samples of one dimension, in the order of writing.
struct Data {
    Data(Random random, size_t sample_bytes, size_t count, size_t chunk_bytes)
        : size(sample_bytes),
          samples(count),
          per_chunk(std::min(count, std::max<size_t>(1, chunk_bytes / std::max<size_t>(size, 64)))),
          truth(size * samples + 8),
          records(samples) {
        for (size_t i = 0; i < size * samples; i += 8) {
            const uint64_t word = random.next();
            std::memcpy(&truth[i], &word, 8);
        }
        for (nf::Record& record : records)
            record = {random.next(), static_cast<int32_t>(random.below(11)) - 1,
                      static_cast<uint32_t>(random.below(3))};
        make_header();
    }
    static Data drawn(Random random) {
        const size_t size = random.scaled(200 << 10), most = random.one_in(16) ? 12 << 20 : 1 << 20;
        const size_t count = 1 + random.below(std::min<size_t>(400, 1 + most / size));
        return Data(random.split(), size, count, random.scaled(1 << 20));
    }

    void make_header() {
        stride = (per_chunk * (size + sizeof(nf::Record)) + 4095) / 4096 * 4096;
        chunks = (samples + per_chunk - 1) / per_chunk;
        const uint64_t table = 4096 + chunks * stride, footer = table + (4 * chunks + 4095) / 4096 * 4096;
        header.assign(4096, 0);
        std::memcpy(header.data(), "\x89NFC\r\n\x1a\n", 8);
        const struct {
            size_t offset, width;
            uint64_t value;
        } fields[] = {{8, 4, 1},
                      {12, 4, 4096},
                      {16, 4, 0x0A0B0C0D},
                      {24, 2, nf::kU8},
                      {30, 2, 1},
                      {32, 8, size},
                      {96, 8, size},
                      {104, 8, samples},
                      {112, 4, per_chunk},
                      {116, 4, stride},
                      {120, 4, chunks},
                      {124, 4, 3},
                      {134, 2, 1},
                      {136, 8, 1},
                      {184, 8, table},
                      {192, 8, footer},
                      {200, 8, footer + 4096}};
        for (const auto& field : fields) put(header, field.offset, field.width, field.value);
        put(header, 4092, 4, nf::crc32c(header.data(), 4092));
    }

    // Bytes that a batch at `at` has wrong; the batch is destroyed, as its owner may.
    size_t compare(uint8_t* at, const int64_t* positions, size_t count) const {
        size_t bad = 0;
        for (size_t k = 0; k < count; ++k) {
            const uint8_t* expected = &truth[static_cast<size_t>(positions[k]) * size];
            if (std::memcmp(at + k * size, expected, size) != 0) bad += size;
        }
        std::memset(at, 0x5C, count * size);
        bytes_compared += static_cast<long>(count * size);
        return bad;
    }

    size_t size, samples, per_chunk, stride = 0, chunks = 0;
    Bytes truth;
    std::vector<nf::Record> records;
    Bytes header;
};

}  // namespace
