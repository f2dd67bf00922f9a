// The parser of .nfc files against files that this test lays out by itself, byte by byte from the table of the format.
// Build: the sources of nf_cache and this file. Prints `name: passed/cases`, exits 1 where they differ.
#include "cache/format.h"

#include <cstdio>
#include <cstring>
#include <functional>
#include <numeric>
#include <string>
#include <vector>

namespace {

using nf::kPage;
using Bytes = std::vector<uint8_t>;
const std::string kPath = "x004-g0007.nfc";

uint32_t bitwise_crc(const uint8_t* data, size_t size) {
    uint32_t crc = ~0u;
    for (size_t i = 0; i < size; ++i) {
        crc ^= data[i];
        for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0x82F63B78 : 0);
    }
    return ~crc;
}

void put(Bytes& bytes, size_t offset, size_t width, uint64_t value) {
    for (size_t i = 0; i < width; ++i) bytes[offset + i] = static_cast<uint8_t>(value >> (8 * i));
}

uint64_t get(const Bytes& bytes, size_t offset, size_t width) {
    uint64_t value = 0;
    for (size_t i = width; i-- > 0;) value = value << 8 | bytes[offset + i];
    return value;
}

Bytes seal(Bytes page) {
    put(page, 4092, 4, bitwise_crc(page.data(), 4092));
    return page;
}

// What a writer chooses; all else follows, wrapped to the width of its field where it does not fit.
struct Choice {
    uint64_t dtype = 1, codec = 0;
    std::vector<uint64_t> shape = {2, 3};
    uint64_t samples = 5, per_chunk = 2;
};

Bytes header_of(const Choice& choice) {
    const uint64_t itemsize[] = {0, 4, 2, 2, 1};
    const uint64_t numel = std::accumulate(choice.shape.begin(), choice.shape.end(), uint64_t{1}, std::multiplies<>());
    const uint64_t affine = (8 * choice.shape[0] + numel + 15) & ~uint64_t{15};
    const uint64_t bytes = choice.codec ? affine : numel * itemsize[choice.dtype];
    const auto up = [](uint64_t value) { return (value + 4095) & ~uint64_t{4095}; };
    const uint32_t stride = static_cast<uint32_t>(up(choice.per_chunk * (bytes + 16)));
    const uint32_t chunks = static_cast<uint32_t>((choice.samples + choice.per_chunk - 1) / choice.per_chunk);
    const uint64_t table = 4096 + uint64_t{chunks} * stride, footer = table + up(4 * uint64_t{chunks});
    Bytes page(kPage);
    std::memcpy(page.data(), "\x89NFC\r\n\x1a\n", 8);
    put(page, 8, 4, 1);
    put(page, 12, 4, 4096);
    put(page, 16, 4, 0x0A0B0C0D);
    put(page, 24, 2, choice.dtype);
    put(page, 26, 2, choice.codec);
    put(page, 30, 2, choice.shape.size());
    for (size_t i = 0; i < choice.shape.size(); ++i) put(page, 32 + 8 * i, 8, choice.shape[i]);
    put(page, 96, 8, bytes);
    put(page, 104, 8, choice.samples);
    put(page, 112, 4, choice.per_chunk);
    put(page, 116, 4, stride);
    put(page, 120, 4, chunks);
    put(page, 124, 4, 1);  // copies
    put(page, 128, 4, 4);  // block
    put(page, 134, 2, 1);  // world
    put(page, 136, 8, 7);  // generation
    for (int i = 0; i < 32; ++i) page[152 + i] = static_cast<uint8_t>(i);
    put(page, 184, 8, table);
    put(page, 192, 8, footer);
    put(page, 200, 8, footer + 4096);
    return seal(page);
}

// The golden file of the format: 5 samples (2, 3) fp32, byte j of sample i = 24*i + j, id 1000+i, label i.
Bytes golden_chunk(uint64_t chunk) {
    Bytes bytes(kPage);
    for (uint64_t slot = 0; slot < 2 && 2 * chunk + slot < 5; ++slot) {
        const uint64_t i = 2 * chunk + slot;
        for (uint64_t j = 0; j < 24; ++j) bytes[24 * slot + j] = static_cast<uint8_t>(24 * i + j);
        put(bytes, 48 + 16 * slot, 8, 1000 + i);
        put(bytes, 48 + 16 * slot + 8, 4, i);
    }
    return bytes;
}

Bytes golden_table() {
    Bytes table(kPage);
    for (uint64_t chunk = 0; chunk < 3; ++chunk)
        put(table, 4 * chunk, 4, bitwise_crc(golden_chunk(chunk).data(), kPage));
    return table;
}

Bytes golden_footer(const Bytes& header, const Bytes& table) {
    Bytes page(kPage);
    std::memcpy(page.data(), "\x89NFE\r\n\x1a\n", 8);
    put(page, 8, 4, 1);
    put(page, 12, 4, get(header, 4092, 4));
    put(page, 16, 8, 5);
    put(page, 24, 4, 3);
    put(page, 28, 4, bitwise_crc(table.data(), kPage));
    put(page, 32, 8, 7);
    put(page, 40, 8, 24576);
    std::memcpy(&page[48], &header[152], 32);
    return seal(page);
}

struct Parts {
    Bytes header, footer, table;
};

Parts golden() {
    const Bytes header = header_of({}), table = golden_table();
    return {header, golden_footer(header, table), table};
}

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

enum Verdict { kSound, kCorrupt, kIncomplete };

Verdict verdict(const std::function<void()>& check, std::string* message = nullptr) {
    try {
        check();
        return kSound;
    } catch (const nf::FormatError& error) {
        if (message) *message = error.what();
        return kCorrupt;
    } catch (const nf::IncompleteError& error) {
        if (message) *message = error.what();
        return kIncomplete;
    }
}

void check_parts(const Parts& parts) {
    const nf::Header header = nf::parse_header(parts.header.data(), kPath);
    const uint32_t crc = nf::parse_footer(parts.footer.data(), header, kPath);
    nf::check_table(parts.table.data(), parts.table.size(), header, crc, kPath);
}

bool refused(const Parts& parts) {
    return verdict([&] { check_parts(parts); }) == kCorrupt;
}

struct Count {
    const char* name;
    long passed = 0, cases = 0;
    void operator()(bool ok, const std::string& what) {
        ++cases;
        passed += ok;
        if (!ok && cases - passed <= 5) std::printf("  %s: wrong for %s\n", name, what.c_str());
    }
    bool report() const {
        std::printf("%s: %ld/%ld\n", name, passed, cases);
        return passed == cases;
    }
};

bool golden_values() {
    Count count{"golden file"};
    const Parts parts = golden();
    const auto crc_is = [&](const Bytes& bytes, size_t size, uint32_t expected, const char* what) {
        count(bitwise_crc(bytes.data(), size) == expected, what);
    };
    crc_is(parts.header, 4092, 0x3205D95B, "header");
    crc_is(golden_chunk(0), kPage, 0xB740062C, "chunk 0");
    crc_is(golden_chunk(1), kPage, 0x4D9329AB, "chunk 1");
    crc_is(golden_chunk(2), kPage, 0x41F6A3A3, "chunk 2");
    crc_is(parts.table, kPage, 0x292D47FD, "table");
    crc_is(parts.footer, 4092, 0x8D955FF3, "footer");
    count(verdict([&] { check_parts(parts); }) == kSound, "the parts are accepted");

    const nf::Header h = nf::parse_header(parts.header.data(), kPath);
    count(h.dtype == 1 && h.codec == 0 && h.layout == 0 && h.ndim == 2, "dtype, codec, layout, ndim");
    count(h.shape[0] == 2 && h.shape[1] == 3 && h.shape[2] == 0 && h.shape[7] == 0, "shape");
    count(h.sample_bytes == 24 && h.n_samples == 5, "sample_bytes, n_samples");
    count(h.samples_per_chunk == 2 && h.chunk_stride == 4096 && h.n_chunks == 3, "chunks");
    count(h.copies == 1 && h.block == 4 && h.rank == 0 && h.world == 1, "copies, block, rank, world");
    count(h.generation == 7 && h.order_key == 0 && h.fingerprint[31] == 31, "generation, order_key, fingerprint");
    count(h.table_offset == 16384 && h.footer_offset == 20480 && h.file_bytes == 24576, "offsets");
    count(h.crc == 0x3205D95B, "crc");
    count(nf::parse_footer(parts.footer.data(), h, kPath) == 0x292D47FD, "parse_footer");
    const auto packed = nf::pack_footer(h, 0x292D47FD);
    count(Bytes(packed.begin(), packed.end()) == parts.footer, "pack_footer");
    count(nf::chunk_offset(h, 0) == 4096 && nf::chunk_offset(h, 2) == 12288, "chunk_offset");
    count(nf::chunk_samples(h, 1) == 2 && nf::chunk_samples(h, 2) == 1, "chunk_samples");
    count(nf::table_bytes(h) == 4096, "table_bytes");
    return count.report();
}

struct Field {
    const char* name;
    size_t offset, width;
    std::vector<uint64_t> wrong;
};

// Each field of the golden header, and values out of its range.
std::vector<Field> header_fields() {
    const uint64_t max64 = ~uint64_t{0}, max32 = ~uint32_t{0}, side = (uint64_t{1} << 31) + 1;
    std::vector<Field> fields = {
        {"magic", 0, 8, {0, 0x0A1A0A0D43464E88, 0x0A1A0A0D45464E89, max64}},  // one bit, the footer's
        {"version", 8, 4, {0, 2, max32}},
        {"header_bytes", 12, 4, {0, 4095, 8192, max32}},
        {"byte_order", 16, 4, {0, 0x0D0C0B0A, max32}},
        {"flags", 20, 4, {1, 1u << 31, max32}},
        {"dtype", 24, 2, {0, 5, 65535}},
        {"codec", 26, 2, {2, 65535}},
        {"layout", 28, 2, {1, 2, 65535}},  // 1, channels_last, expects three sizes
        {"ndim", 30, 2, {0, 9, 65535}},
        {"shape[0]", 32, 8, {0, side, max64}},
        {"shape[1]", 40, 8, {0, side, max64}},
        {"sample_bytes", 96, 8, {0, 16, 23, 25, 32, max64}},
        {"n_samples", 104, 8, {0, (uint64_t{1} << 40) + 1, max64}},
        {"samples_per_chunk", 112, 4, {0, 6, max32}},
        {"chunk_stride", 116, 4, {0, 4095, 4097, 8192, max32}},
        {"n_chunks", 120, 4, {0, 2, 4, max32}},
        {"copies", 124, 4, {0, 65536, max32}},
        {"block", 128, 4, {65536, max32}},
        {"rank", 132, 2, {1, 65535}},
        {"world", 134, 2, {0}},
        {"table_offset", 184, 8, {0, 12288, 16383, 16385, 20480, max64}},
        {"footer_offset", 192, 8, {0, 16384, 20479, 20481, 24576, max64}},
        {"file_bytes", 200, 8, {0, 20480, 24575, 24577, 28672, max64}},
    };
    static const char* const unused[] = {"shape[2]", "shape[3]", "shape[4]", "shape[5]", "shape[6]", "shape[7]"};
    for (size_t i = 0; i < 6; ++i) fields.push_back({unused[i], 48 + 8 * i, 8, {1, max64}});
    return fields;
}

bool header_out_of_range() {
    Count count{"header fields out of range, resealed: refused and named"};
    for (const Field& field : header_fields())
        for (const uint64_t value : field.wrong) {
            Bytes page = header_of({});
            put(page, field.offset, field.width, value);
            page = seal(page);
            std::string message;
            const Verdict found = verdict([&] { nf::parse_header(page.data(), kPath); }, &message);
            const std::string what = field.name + std::string(" ") + std::to_string(value) + ": " + message;
            // A wrong magic is not printed; the others are named with what came.
            const bool named = field.offset == 0 || (contains(message, std::string("expected ") + field.name + ' ') &&
                                                     contains(message, "got " + std::to_string(value)));
            count(found == kCorrupt && named && contains(message, kPath + ": header: expected") &&
                      contains(message, "; delete it to rebuild"),
                  what);
        }
    return count.report();
}

bool footer_fields() {
    Count count{"footer fields that differ, resealed: refused and named"};
    const std::vector<Field> fields = {
        {"magic", 0, 8, {0x0A1A0A0D43464E89, 1}},  {"version", 8, 4, {0, 2}},
        {"header_crc", 12, 4, {0, 0x3205D95A}},    {"n_samples", 16, 8, {0, 4, 6, ~uint64_t{0}}},
        {"n_chunks", 24, 4, {0, 2, 4, ~0u}},       {"generation", 32, 8, {0, 6, 8, ~uint64_t{0}}},
        {"file_bytes", 40, 8, {0, 20480, 28672}},  {"fingerprint", 48, 8, {0}},
        {"fingerprint", 72, 8, {~uint64_t{0}, 1}},
    };
    for (const Field& field : fields)
        for (const uint64_t value : field.wrong) {
            Parts parts = golden();
            put(parts.footer, field.offset, field.width, value);
            parts.footer = seal(parts.footer);
            std::string message;
            const Verdict found = verdict([&] { check_parts(parts); }, &message);
            count(found == kCorrupt && contains(message, kPath + ": footer: expected") &&
                      contains(message, field.name) && contains(message, "; delete it to rebuild"),
                  field.name + (": " + message));
        }
    return count.report();
}

// Geometries at the bounds; each is accepted, and one step further, as consistent as its fields can be, is not.
bool bounds() {
    Count count{"geometries at a bound accepted, past it refused"};
    const uint64_t mib = 1 << 20, two40 = uint64_t{1} << 40;
    const auto accepted = [](const Choice& choice) {
        const Bytes page = header_of(choice);
        return verdict([&] { nf::parse_header(page.data(), kPath); }) == kSound;
    };
    const auto edge = [&](const Choice& inside, const Choice& outside, const char* what) {
        count(accepted(inside), std::string(what) + ", inside");
        count(!accepted(outside), std::string(what) + ", outside");
    };
    edge({4, 0, {64 * mib}, 1, 1}, {4, 0, {64 * mib + 1}, 1, 1}, "64 MiB of u8");
    edge({1, 0, {16 * mib}, 1, 1}, {1, 0, {16 * mib + 1}, 1, 1}, "64 MiB of fp32");
    edge({2, 0, {2, 16 * mib}, 1, 1}, {2, 0, {3, 16 * mib}, 1, 1}, "64 MiB of fp16");
    edge({3, 0, {32 * mib}, 1, 1}, {3, 0, {33 * mib}, 1, 1}, "64 MiB of bf16");
    edge({2, 1, {64, mib - 8}, 1, 1}, {2, 1, {64, mib - 7}, 1, 1}, "64 MiB of affine8");
    edge({4, 0, {64, 64, 64, 16, 1, 1, 1, 1}, 1, 1}, {4, 0, {64, 64, 64, 16, 17, 1, 1, 1}, 1, 1}, "eight sizes");
    edge({4, 0, {64 * mib - 16}, 2, 2}, {4, 0, {64 * mib - 15}, 2, 2}, "a chunk of 128 MiB");
    edge({4, 0, {48}, 2 * mib, 2 * mib}, {4, 0, {48}, 2 * mib + 1, 2 * mib + 1}, "2^21 samples a chunk");
    edge({4, 0, {1}, 8 * mib, 1}, {4, 0, {1}, 8 * mib + 1, 1}, "2^23 chunks");
    edge({4, 0, {1}, two40, 1 << 17}, {4, 0, {1}, two40 + 1, 1 << 18}, "2^40 samples");
    edge({1, 0, {2, 3}, 5, 5}, {1, 0, {2, 3}, 5, 6}, "all samples in a chunk");
    const auto with = [](Choice choice, size_t offset, size_t width, uint64_t value) {
        Bytes page = header_of(choice);
        put(page, offset, width, value);
        page = seal(page);
        return verdict([&] { nf::parse_header(page.data(), kPath); }) == kSound;
    };
    for (const size_t sizes : {1, 2, 3, 4, 8})
        count(with({1, 0, std::vector<uint64_t>(sizes, 2)}, 28, 2, 1) == (sizes == 3), "channels_last");
    count(with({}, 124, 4, 65535), "copies 65535");
    count(with({}, 128, 4, 0) && with({}, 128, 4, 65535), "block 0 and 65535");
    count(with({}, 132, 4, 0xFFFFFFFE) && !with({}, 132, 4, 0xFFFFFFFF), "rank 65534 and 65535 of 65535");
    for (const size_t offset : {136, 144, 152, 176})
        count(with({}, offset, 8, ~uint64_t{0}), "generation to fingerprint");
    for (uint64_t channels : {1, 2, 3, 16})
        for (uint64_t side : {1, 7, 8, 15}) count(accepted({2, 1, {channels, side, side}, 9, 4}), "affine8");
    return count.report();
}

// Values whose products wrap to those of a sound file: whoever multiplies first and compares then accepts them.
bool overflows() {
    Count count{"overflows that wrap to a sound file: refused"};
    const uint64_t two31 = uint64_t{1} << 31, two32 = uint64_t{1} << 32;
    const std::vector<Choice> choices = {
        {1, 0, {2112351278, 998034439, 35}, 5, 2},      // 2^66 + 6 values
        {4, 0, {2112351278, 998034439, 35}, 5, 2},      //
        {2, 1, {2112351278, 998034439, 35}, 5, 2},      //
        {1, 0, {two31, two31, 1}, 5, 2},                // 2^64 bytes
        {1, 0, {two31, two31, two31, two31}, 5, 2},     // 2^124 values
        {4, 0, {two31, two31, 4}, 5, 2},                // 2^64 values
        {1, 0, std::vector<uint64_t>(8, two31), 5, 2},  //
        {4, 0, {1}, two32 + 5, 1},                      // 2^32 + 5 chunks
        {4, 0, {(1 << 20) - 16}, 10000, 4096 + 1},      // a stride of 2^32 + 2^20 bytes
        {4, 0, {1}, ~uint64_t{0}, 2},                   // n_samples + samples_per_chunk wraps
        {4, 0, {1}, ~uint64_t{0}, ~uint32_t{0}},        //
    };
    for (size_t i = 0; i < choices.size(); ++i) {
        const Bytes page = header_of(choices[i]);
        count(verdict([&] { nf::parse_header(page.data(), kPath); }) == kCorrupt, "case " + std::to_string(i));
    }
    return count.report();
}

bool every_byte() {
    Count count{"byte changes and bit flips of header, footer, table: refused"};
    const Parts sound = golden();
    for (Bytes Parts::* const part : {&Parts::header, &Parts::footer, &Parts::table})
        for (size_t i = 0; i < kPage; ++i)
            for (int flip = 0; flip < 9; ++flip) {
                Parts parts = sound;
                (parts.*part)[i] ^= static_cast<uint8_t>(flip < 8 ? 1 << flip : 0xFF);
                count(refused(parts), "byte " + std::to_string(i));
            }
    return count.report();
}

// The CRC of the page, and of the table in the footer, made good again: the rules and the copies must find the change.
// Table entries are left out, only a chunk can prove them wrong.
bool every_resealed_byte() {
    Count count{"byte changes with the checksums made good: refused"};
    const Parts sound = golden();
    for (size_t i = 0; i < 4092; ++i) {
        Parts header = sound, footer = sound, table = sound;
        header.header[i] ^= 0x41;
        header.header = seal(header.header);
        count(refused(header), "header byte " + std::to_string(i));
        if (i >= 208)  // by the header's own rule; the footer would find it, too
            count(verdict([&] { nf::parse_header(header.header.data(), kPath); }) == kCorrupt, "zeros of the header");
        footer.footer[i] ^= 0x41;
        footer.footer = seal(footer.footer);
        count(refused(footer), "footer byte " + std::to_string(i));
        table.table[i + 4] ^= 0x41;
        table.footer = golden_footer(table.header, table.table);
        if (i + 4 >= 12) count(refused(table), "table byte " + std::to_string(i + 4));
    }
    return count.report();
}

bool unfinished() {
    Count count{"wrong lengths, a missing footer: incomplete, not corrupt"};
    const Parts parts = golden();
    const nf::Header h = nf::parse_header(parts.header.data(), kPath);
    count(verdict([&] { nf::check_length(h, 24576, kPath); }) == kSound, "24576");
    for (uint64_t length = 0; length <= 24576 + 4096; ++length) {
        if (length == 24576) continue;
        std::string message;
        const Verdict found = verdict([&] { nf::check_length(h, length, kPath); }, &message);
        count(found == kIncomplete &&
                  message == kPath + ": expected 24576 bytes, got " + std::to_string(length) + "; delete it to rebuild",
              message);
    }
    std::string message;
    const Bytes zeros(kPage);
    count(verdict([&] { nf::parse_footer(zeros.data(), h, kPath); }, &message) == kIncomplete, message);
    count(message == kPath + ": has no footer, the writing run stopped early; delete it to rebuild", message);
    for (size_t i = 0; i < kPage; ++i) {
        Bytes page = zeros;
        page[i] = 1;
        count(verdict([&] { nf::parse_footer(page.data(), h, kPath); }) == kCorrupt, "zeros but for one byte");
    }
    for (size_t size : {size_t{0}, kPage - 1, kPage + 1, 2 * kPage}) {
        Bytes table = parts.table;
        table.resize(size);
        const uint32_t crc = bitwise_crc(table.data(), size);
        count(verdict([&] { nf::check_table(table.data(), size, h, crc, kPath); }) == kCorrupt, "size of the table");
    }
    return count.report();
}

}  // namespace

int main() {
    bool ok = true;
    for (const auto test : {golden_values, header_out_of_range, footer_fields, bounds, overflows, every_byte,
                            every_resealed_byte, unfinished})
        ok = test() && ok;
    return ok ? 0 : 1;
}
