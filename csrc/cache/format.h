// The layout of a .nfc file, version 1, and the checks of all but its chunks; nothing is believed that can be
// recomputed.
//
// Little endian, every part at a multiple of 4096 bytes, so that O_DIRECT accepts it:
//     header 4096 | chunks, n_chunks x chunk_stride | table, CRC32C of each chunk | footer 4096
// Chunk: samples_per_chunk samples back to back, as many records, zeros up to chunk_stride. The last chunk keeps these
// offsets, what it does not use is zero.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "io/file.h"  // kPage

namespace nf {

struct FormatError : std::runtime_error {  // not the bytes of a sound file
    using std::runtime_error::runtime_error;
};

struct IncompleteError : std::runtime_error {  // the writing run stopped early
    using std::runtime_error::runtime_error;
};

enum Dtype : uint16_t { kFp32 = 1, kFp16, kBf16, kU8 };
enum Codec : uint16_t { kRaw, kAffine8 };  // affine8: {f32 lo, f32 step} of each channel, one u8 a value, zeros
enum Layout : uint16_t { kNchw, kChannelsLast };

// Bytes 24..207 of the header page as they lie there, then the CRC32C from its end.
struct Header {
    uint16_t dtype, codec, layout, ndim;  // dtype: that given back, also with affine8
    uint64_t shape[8];                    // of one sample, (C, H, W); zeros behind the first ndim
    uint64_t sample_bytes, n_samples;     // n_samples: all copies together
    uint32_t samples_per_chunk, chunk_stride, n_chunks, copies, block;
    uint16_t rank, world;
    uint64_t generation, order_key;
    std::array<uint8_t, 32> fingerprint;
    uint64_t table_offset, footer_offset, file_bytes;
    uint32_t crc;
};

struct Record {
    uint64_t id;
    int32_t label;  // -1: none
    uint32_t copy;
};
static_assert(sizeof(Record) == 16);

// In the order of use; each throws FormatError, where nothing else is said. A header that parse_header returned obeys
// every rule of the format: no arithmetic on it can overflow, the table has at most 32 MiB, file_bytes is below 2^51.
Header parse_header(const uint8_t* page, const std::string& path);
void check_length(const Header&, uint64_t file_length, const std::string& path);  // IncompleteError
// Returns the CRC32C of the table; IncompleteError for a page of zeros.
uint32_t parse_footer(const uint8_t* page, const Header&, const std::string& path);
void check_table(const uint8_t* table, size_t bytes, const Header&, uint32_t crc, const std::string& path);

std::array<uint8_t, kPage> pack_footer(const Header&, uint32_t table_crc);

uint64_t chunk_offset(const Header&, uint64_t chunk);   // chunk < n_chunks, here and below
uint64_t chunk_samples(const Header&, uint64_t chunk);  // samples_per_chunk, fewer in the last chunk
uint64_t table_bytes(const Header&);

}  // namespace nf
