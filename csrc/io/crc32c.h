// CRC32C (Castagnoli): reflected polynomial 0x82F63B78, initial and final xor ~0, so "123456789" gives e3069283.
#pragma once

#include <cstddef>
#include <cstdint>

namespace nf {

// `crc` continues an earlier result: crc32c(b, crc32c(a)) is the CRC of a followed by b.
uint32_t crc32c(const uint8_t* data, size_t size, uint32_t crc = 0);
uint32_t crc32c_table(const uint8_t* data, size_t size, uint32_t crc = 0);
const char* crc32c_path();

}  // namespace nf
