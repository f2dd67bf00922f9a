// libFuzzer target for the parser of .nfc files. Input: header page, footer page, table; checksums and derived fields
// are mostly made good after a mutation, because random bytes would never pass the first CRC.
//
//     clang++ -std=c++17 -g -O2 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -Icsrc
//         csrc/tests/fuzz_format.cpp csrc/cache/format.cpp csrc/io/crc32c.cpp -o fuzz_format
//     ./fuzz_format -max_len=20480 -max_total_time=300
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <random>
#include <string>

#include "cache/format.h"
#include "io/crc32c.h"

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

namespace {

using nf::kPage;
using Wide = unsigned __int128;
const std::string kPath = "fuzz.nfc";

#define REQUIRE(what) \
    if (!(what)) std::fprintf(stderr, "line %d: expected %s\n", __LINE__, #what), std::abort()

uint64_t get(const uint8_t* page, size_t offset, size_t width) {
    uint64_t value = 0;
    std::memcpy(&value, page + offset, width);
    return value;
}

void put(uint8_t* page, size_t offset, size_t width, uint64_t value) { std::memcpy(page + offset, &value, width); }

// Without coverage, which would count each turn of the loop.
__attribute__((noinline, no_sanitize("coverage"))) bool any(const uint8_t* page, size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i)
        if (page[i]) return true;
    return false;
}

Wide up(Wide value, Wide multiple) { return (value + multiple - 1) / multiple * multiple; }

// The numbers that follow from what a writer chooses, in 128 bits; saturated, so that 2^100 means: far out of range.
struct Derived {
    Wide sample, stride, chunks, table, footer, file;

    explicit Derived(const uint8_t* page) {
        const Wide cap = Wide{1} << 100;
        const uint64_t ndim = get(page, 30, 2), per_chunk = get(page, 112, 4), dtype = get(page, 24, 2);
        Wide numel = 1;
        for (uint64_t i = 0; i < ndim && i < 8; ++i) numel = numel >> 64 ? cap : numel * get(page, 32 + 8 * i, 8);
        numel = numel > cap >> 20 ? cap >> 20 : numel;
        sample = get(page, 26, 2) ? up(8 * Wide{get(page, 32, 8)} + numel, 16)
                                  : numel * (dtype == 1  ? 4
                                             : dtype < 4 ? 2
                                                         : 1);
        stride = up((sample >> 80 ? Wide{1} << 80 : sample + 16) * per_chunk, kPage);
        stride = stride >> 60 ? Wide{1} << 60 : stride;
        chunks = per_chunk ? (Wide{get(page, 104, 8)} + per_chunk - 1) / per_chunk : 0;
        table = kPage + chunks * stride;
        footer = table + up(4 * chunks, kPage);
        file = footer + kPage;
    }
};

// The rules of the format, once more.
bool sound(const uint8_t* page) {
    const Derived d(page);
    const uint64_t ndim = get(page, 30, 2), samples = get(page, 104, 8), per_chunk = get(page, 112, 4);
    bool ok = std::memcmp(page, "\x89NFC\r\n\x1a\n\1\0\0\0\0\x10\0\0\x0D\x0C\x0B\x0A\0\0\0\0", 24) == 0;
    ok = ok && get(page, 24, 2) - 1 < 4 && get(page, 26, 2) < 2 && get(page, 28, 2) < 2 && ndim - 1 < 8;
    ok = ok && (get(page, 28, 2) == 0 || ndim == 3);
    for (size_t i = 0; i < 8; ++i) {
        const uint64_t size = get(page, 32 + 8 * i, 8);
        ok = ok && (i < ndim ? size - 1 < uint64_t{1} << 31 : size == 0);
    }
    ok = ok && d.sample <= 1 << 26 && get(page, 96, 8) == d.sample && samples - 1 < uint64_t{1} << 40;
    ok = ok && per_chunk && per_chunk <= samples && d.stride <= 1 << 27 && get(page, 116, 4) == d.stride;
    ok = ok && d.chunks <= 1 << 23 && get(page, 120, 4) == d.chunks && get(page, 124, 4) - 1 < 65535;
    ok = ok && get(page, 128, 4) < 65536 && get(page, 132, 2) < get(page, 134, 2) && get(page, 184, 8) == d.table;
    ok = ok && get(page, 192, 8) == d.footer && get(page, 200, 8) == d.file && !any(page, 208, 4092);
    return ok && get(page, 4092, 4) == nf::crc32c(page, 4092);
}

void repack(const nf::Header& h, uint8_t* page) {
    std::memset(page, 0, kPage);
    std::memcpy(page, "\x89NFC\r\n\x1a\n", 8);
    const uint32_t fixed[] = {1, 4096, 0x0A0B0C0D, 0};
    for (size_t i = 0; i < 4; ++i) put(page, 8 + 4 * i, 4, fixed[i]);
    const uint16_t codes[] = {h.dtype, h.codec, h.layout, h.ndim};
    for (size_t i = 0; i < 4; ++i) put(page, 24 + 2 * i, 2, codes[i]);
    for (size_t i = 0; i < 8; ++i) put(page, 32 + 8 * i, 8, h.shape[i]);
    put(page, 96, 8, h.sample_bytes);
    put(page, 104, 8, h.n_samples);
    const uint32_t counts[] = {h.samples_per_chunk, h.chunk_stride, h.n_chunks, h.copies, h.block};
    for (size_t i = 0; i < 5; ++i) put(page, 112 + 4 * i, 4, counts[i]);
    put(page, 132, 2, h.rank);
    put(page, 134, 2, h.world);
    put(page, 136, 8, h.generation);
    put(page, 144, 8, h.order_key);
    std::memcpy(page + 152, h.fingerprint.data(), 32);
    put(page, 184, 8, h.table_offset);
    put(page, 192, 8, h.footer_offset);
    put(page, 200, 8, h.file_bytes);
    put(page, 4092, 4, h.crc);
}

bool parsed(const uint8_t* page, nf::Header& header) {
    try {
        header = nf::parse_header(page, kPath);
        return true;
    } catch (const nf::FormatError&) {
        return false;
    }
}

void check_header(const uint8_t* page, const nf::Header& h) {
    uint8_t again[kPage];
    repack(h, again);
    REQUIRE(std::memcmp(page, again, kPage) == 0);
    const uint64_t last = h.n_chunks - 1;
    REQUIRE(nf::chunk_offset(h, 0) == kPage);
    REQUIRE(Wide{nf::chunk_offset(h, last)} + h.chunk_stride == h.table_offset);
    REQUIRE(Wide{last} * h.samples_per_chunk + nf::chunk_samples(h, last) == h.n_samples);
    REQUIRE(nf::chunk_samples(h, 0) * (h.sample_bytes + sizeof(nf::Record)) <= h.chunk_stride);
    REQUIRE(nf::table_bytes(h) <= size_t{32} << 20 && nf::table_bytes(h) >= 4 * Wide{h.n_chunks});
    nf::check_length(h, h.file_bytes, kPath);
}

void check_table(const uint8_t* table, size_t bytes, const nf::Header& h, uint32_t crc) {
    bool accepted = true;
    try {
        nf::check_table(table, bytes, h, crc, kPath);
    } catch (const nf::FormatError&) {
        accepted = false;
    }
    REQUIRE(accepted == (bytes == up(4 * Wide{h.n_chunks}, kPage) && nf::crc32c(table, bytes) == crc &&
                         !any(table, 4 * size_t{h.n_chunks}, bytes)));
}

// ---- Mutation ----------------------------------------------------------------------------------------------------

void seal(uint8_t* page) { put(page, 4092, 4, nf::crc32c(page, 4092)); }

void derive(uint8_t* page) {
    const Derived d(page);
    put(page, 96, 8, static_cast<uint64_t>(d.sample));
    put(page, 116, 4, static_cast<uint64_t>(d.stride));
    put(page, 120, 4, static_cast<uint64_t>(d.chunks));
    put(page, 184, 8, static_cast<uint64_t>(d.table));
    put(page, 192, 8, static_cast<uint64_t>(d.footer));
    put(page, 200, 8, static_cast<uint64_t>(d.file));
}

void golden_header(uint8_t* page) {
    nf::Header h{};
    h.dtype = h.world = 1;
    h.ndim = 2;
    h.shape[0] = 2;
    h.shape[1] = 3;
    h.n_samples = 5;
    h.samples_per_chunk = 2;
    h.copies = 1;
    repack(h, page);
    derive(page);
    seal(page);
}

struct Field {
    size_t offset, width;
};
constexpr Field kFields[] = {{0, 8},   {8, 4},   {12, 4},  {16, 4},  {20, 4},  {24, 2},  {26, 2},  {28, 2},  {30, 2},
                             {32, 8},  {40, 8},  {48, 8},  {56, 8},  {64, 8},  {72, 8},  {80, 8},  {88, 8},  {96, 8},
                             {104, 8}, {112, 4}, {116, 4}, {120, 4}, {124, 4}, {128, 4}, {132, 2}, {134, 2}, {136, 8},
                             {144, 8}, {152, 8}, {184, 8}, {192, 8}, {200, 8}, {208, 8}};

// A field becomes a small number, a power of two, or one beside it: the bounds of the format are such.
void mutate_header(uint8_t* page, std::minstd_rand& random) {
    const Field field = kFields[random() % std::size(kFields)];
    const uint64_t power = uint64_t{1} << random() % (8 * field.width);
    const uint64_t values[] = {random() % 9,
                               power - 1,
                               power,
                               power + 1,
                               get(page, field.offset, field.width) + 1,
                               get(page, field.offset, field.width) - 1,
                               random()};
    if (random() % 2)
        put(page, field.offset, field.width, values[random() % std::size(values)]);
    else
        LLVMFuzzerMutate(page, 208, 208);
    // A shape of all its sizes and zeros behind them, else few mutations of ndim would survive.
    if (random() % 2)
        for (size_t i = 0; i < 8; ++i) {
            uint64_t size = get(page, 32 + 8 * i, 8);
            if (i >= get(page, 30, 2)) size = 0;
            if (i < get(page, 30, 2) && size == 0) size = 1;
            put(page, 32 + 8 * i, 8, size);
        }
}

}  // namespace

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned seed) {
    if (max_size < 3 * kPage) return LLVMFuzzerMutate(data, size, max_size);
    std::minstd_rand random(seed);
    uint8_t* const header = data;
    uint8_t* const footer = data + kPage;
    uint8_t* const table = data + 2 * kPage;
    if (size < 3 * kPage) {
        size = 3 * kPage;
        std::memset(data, 0, size);
        golden_header(header);
    }
    if (random() % 16 == 0) return LLVMFuzzerMutate(data, size, max_size);  // nothing made good
    mutate_header(header, random);
    if (random() % 4) derive(header);
    seal(header);

    if (!sound(header)) return size;
    const nf::Header h = nf::parse_header(header, kPath);
    const size_t bytes = nf::table_bytes(h);
    if (random() % 8 && bytes <= max_size - 2 * kPage) {
        if (bytes + 2 * kPage > size) std::memset(data + size, 0, bytes + 2 * kPage - size);
        size = bytes + 2 * kPage;
        if (random() % 4) std::memset(table + 4 * size_t{h.n_chunks}, 0, bytes - 4 * size_t{h.n_chunks});
    }
    if (random() % 4 == 0) LLVMFuzzerMutate(table, size - 2 * kPage, size - 2 * kPage);
    std::memcpy(footer, nf::pack_footer(h, nf::crc32c(table, size - 2 * kPage)).data(), kPage);
    if (random() % 4 == 0) LLVMFuzzerMutate(footer, random() % 2 ? 80 : kPage, random() % 2 ? 80 : kPage);
    if (random() % 2) seal(footer);
    if (random() % 64 == 0) std::memset(footer, 0, kPage);
    return size;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    if (size < 2 * kPage) return 0;
    nf::Header header;
    const bool accepted = parsed(data, header);
    REQUIRE(accepted == sound(data));
    if (!accepted) return 0;
    check_header(data, header);
    const uint8_t* footer = data + kPage;
    try {
        const uint32_t table_crc = nf::parse_footer(footer, header, kPath);
        REQUIRE(std::memcmp(nf::pack_footer(header, table_crc).data(), footer, kPage) == 0);
        check_table(data + 2 * kPage, size - 2 * kPage, header, table_crc);
    } catch (const nf::FormatError&) {
        REQUIRE(any(footer, 0, kPage));
        REQUIRE(std::memcmp(nf::pack_footer(header, get(footer, 28, 4)).data(), footer, kPage) != 0);
    } catch (const nf::IncompleteError&) {
        REQUIRE(!any(footer, 0, kPage));
    }
    return 0;
}
