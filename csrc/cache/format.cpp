#include "cache/format.h"

#include <algorithm>
#include <cstring>

#include "io/crc32c.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "pages are copied from and to structs as they lie");

namespace nf {
namespace {

constexpr uint8_t kHeaderMagic[8] = {0x89, 'N', 'F', 'C', '\r', '\n', 0x1A, '\n'};
constexpr uint8_t kFooterMagic[8] = {0x89, 'N', 'F', 'E', '\r', '\n', 0x1A, '\n'};
constexpr uint32_t kVersion = 1, kByteOrder = 0x0A0B0C0D;
constexpr size_t kSeal = kPage - 4;  // where the CRC32C of the bytes before it lies

constexpr uint64_t kMaxSide = uint64_t{1} << 31, kMaxSampleBytes = uint64_t{1} << 26, kMaxSamples = uint64_t{1} << 40;
constexpr uint64_t kMaxStride = uint64_t{1} << 27, kMaxChunks = uint64_t{1} << 23;

struct Preamble {
    uint8_t magic[8];
    uint32_t version, header_bytes, byte_order, flags;
};
static_assert(sizeof(Preamble) == 24 && offsetof(Header, crc) == 184, "no padding between the fields");
constexpr size_t kHeaderEnd = sizeof(Preamble) + offsetof(Header, crc);

struct Footer {
    uint8_t magic[8];
    uint32_t version, header_crc;
    uint64_t n_samples;
    uint32_t n_chunks, table_crc;
    uint64_t generation, file_bytes;
    std::array<uint8_t, 32> fingerprint;
};
static_assert(sizeof(Footer) == 80, "no padding between the fields");

uint64_t round_up(uint64_t value, uint64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

uint32_t load32(const uint8_t* data) {
    uint32_t value;
    std::memcpy(&value, data, sizeof value);
    return value;
}

bool all_zero(const uint8_t* begin, const uint8_t* end) {
    return begin == end || (*begin == 0 && std::memcmp(begin, begin + 1, end - begin - 1) == 0);
}

// The checks of one part of a file; each names the field, what was expected and what came.
struct Part {
    const std::string& path;
    const char* name;

    [[noreturn]] void refuse(const std::string& why) const {
        throw FormatError(path + ": " + name + ": " + why + "; delete it to rebuild");
    }
    void equal(const std::string& field, uint64_t expected, uint64_t got) const {
        if (got != expected)
            refuse("expected " + field + " " + std::to_string(expected) + ", got " + std::to_string(got));
    }
    void range(const std::string& field, uint64_t low, uint64_t high, uint64_t got) const {
        if (got < low || got > high)
            refuse("expected " + field + " in " + std::to_string(low) + ".." + std::to_string(high) + ", got " +
                   std::to_string(got));
    }
    void zeros(const uint8_t* begin, const uint8_t* end, const std::string& where) const {
        if (!all_zero(begin, end)) refuse("expected zeros behind " + where);
    }
    void checksum(uint32_t expected, uint32_t got) const {
        if (got != expected) refuse("the checksum does not hold");
    }
    void magic(const uint8_t* page, const uint8_t (&expected)[8]) const {
        if (std::memcmp(page, expected, 8) != 0) refuse("expected the magic bytes of a cache file, got others");
    }
    void seal(const uint8_t* page) const { checksum(load32(page + kSeal), crc32c(page, kSeal)); }
};

uint64_t stored_bytes(const Header& h, const Part& part) {
    uint64_t numel = 1;
    for (int i = 0; i < h.ndim; ++i) {
        numel *= h.shape[i];  // <= 2^26 * 2^31
        if (numel > kMaxSampleBytes) part.refuse("expected a shape of at most 67108864 values, got more");
    }
    if (h.codec == kAffine8) return round_up(8 * h.shape[0] + numel, 16);
    return numel * (h.dtype == kFp32 ? 4 : h.dtype == kU8 ? 1 : 2);
}

void check_sample(const Header& h, const Part& part) {
    part.range("dtype", kFp32, kU8, h.dtype);
    part.range("codec", kRaw, kAffine8, h.codec);
    part.range("ndim", 1, 8, h.ndim);
    part.range("layout", kNchw, h.ndim == 3 ? kChannelsLast : kNchw, h.layout);  // channels_last is (C, H, W) only
    for (int i = 0; i < 8; ++i) {
        const bool used = i < h.ndim;
        part.range("shape[" + std::to_string(i) + "]", used ? 1 : 0, used ? kMaxSide : 0, h.shape[i]);
    }
    const uint64_t bytes = stored_bytes(h, part);
    part.equal("sample_bytes", bytes, h.sample_bytes);
    part.range("sample_bytes", 1, kMaxSampleBytes, bytes);
}

// Each bound is checked before the value is used, so that the next line cannot overflow: at most 2^32 * (2^26 + 16)
// here, 2^23 * 2^27 for the chunks.
void check_chunks(const Header& h, const Part& part) {
    part.range("n_samples", 1, kMaxSamples, h.n_samples);
    part.range("samples_per_chunk", 1, h.n_samples, h.samples_per_chunk);
    const uint64_t stride = round_up(h.samples_per_chunk * (h.sample_bytes + sizeof(Record)), kPage);
    part.equal("chunk_stride", stride, h.chunk_stride);
    part.range("chunk_stride", kPage, kMaxStride, stride);
    const uint64_t chunks = (h.n_samples - 1) / h.samples_per_chunk + 1;
    part.equal("n_chunks", chunks, h.n_chunks);
    part.range("n_chunks", 1, kMaxChunks, chunks);
    part.range("copies", 1, 65535, h.copies);
    part.range("block", 0, 65535, h.block);
    part.range("world", 1, 65535, h.world);
    part.range("rank", 0, h.world - 1, h.rank);
    part.equal("table_offset", chunk_offset(h, chunks), h.table_offset);
    part.equal("footer_offset", h.table_offset + table_bytes(h), h.footer_offset);
    part.equal("file_bytes", h.footer_offset + kPage, h.file_bytes);
}

}  // namespace

Header parse_header(const uint8_t* page, const std::string& path) {
    const Part part{path, "header"};
    Preamble preamble;
    std::memcpy(&preamble, page, sizeof preamble);
    part.magic(page, kHeaderMagic);
    part.equal("version", kVersion, preamble.version);  // before the CRC: another version may keep it elsewhere
    part.seal(page);
    part.equal("header_bytes", kPage, preamble.header_bytes);
    part.equal("byte_order", kByteOrder, preamble.byte_order);
    part.equal("flags", 0, preamble.flags);
    Header h;
    std::memcpy(&h, page + sizeof preamble, offsetof(Header, crc));
    h.crc = load32(page + kSeal);
    check_sample(h, part);
    check_chunks(h, part);
    part.zeros(page + kHeaderEnd, page + kSeal, "the fields");
    return h;
}

void check_length(const Header& h, uint64_t file_length, const std::string& path) {
    if (file_length != h.file_bytes)
        throw IncompleteError(path + ": expected " + std::to_string(h.file_bytes) + " bytes, got " +
                              std::to_string(file_length) + "; delete it to rebuild");
}

uint32_t parse_footer(const uint8_t* page, const Header& h, const std::string& path) {
    if (all_zero(page, page + kPage))
        throw IncompleteError(path + ": has no footer, the writing run stopped early; delete it to rebuild");
    const Part part{path, "footer"};
    Footer footer;
    std::memcpy(&footer, page, sizeof footer);
    part.magic(page, kFooterMagic);
    part.equal("version", kVersion, footer.version);
    part.seal(page);
    part.equal("n_samples", h.n_samples, footer.n_samples);
    part.equal("n_chunks", h.n_chunks, footer.n_chunks);
    part.equal("generation", h.generation, footer.generation);
    part.equal("file_bytes", h.file_bytes, footer.file_bytes);
    if (footer.fingerprint != h.fingerprint) part.refuse("expected the fingerprint of the header, got another");
    part.equal("header_crc", h.crc, footer.header_crc);  // last: it differs whenever another field does
    part.zeros(page + sizeof footer, page + kSeal, "the fields");
    return footer.table_crc;
}

void check_table(const uint8_t* table, size_t bytes, const Header& h, uint32_t crc, const std::string& path) {
    const Part part{path, "table"};
    part.equal("bytes", table_bytes(h), bytes);
    part.checksum(crc, crc32c(table, bytes));
    part.zeros(table + 4 * size_t{h.n_chunks}, table + bytes, "the last chunk's checksum");
}

std::array<uint8_t, kPage> pack_footer(const Header& h, uint32_t table_crc) {
    Footer footer{{}, kVersion, h.crc, h.n_samples, h.n_chunks, table_crc, h.generation, h.file_bytes, h.fingerprint};
    std::memcpy(footer.magic, kFooterMagic, sizeof footer.magic);
    std::array<uint8_t, kPage> page{};
    std::memcpy(page.data(), &footer, sizeof footer);
    const uint32_t crc = crc32c(page.data(), kSeal);
    std::memcpy(page.data() + kSeal, &crc, sizeof crc);
    return page;
}

uint64_t chunk_offset(const Header& h, uint64_t chunk) { return kPage + chunk * h.chunk_stride; }

uint64_t chunk_samples(const Header& h, uint64_t chunk) {
    return std::min<uint64_t>(h.samples_per_chunk, h.n_samples - chunk * h.samples_per_chunk);
}

uint64_t table_bytes(const Header& h) { return round_up(4 * uint64_t{h.n_chunks}, kPage); }

}  // namespace nf
