// CRC32C (Castagnoli): reflected polynomial 0x82F63B78, initial and final xor ~0, so "123456789" gives e3069283.
//
// Three codes: "table" (any machine), "serial" (CRC instructions, each waiting for the one before) and "streams" (three
// independent chains of them, joined every 12 KiB). The fastest that the processor has is used, or the one NF_CRC
// names.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace nf {

// `crc` continues an earlier result: crc32c(b, crc32c(a)) is the CRC of a followed by b.
uint32_t crc32c(const uint8_t* data, size_t size, uint32_t crc = 0);
// By the code of that name; std::invalid_argument where it is unknown or not supported here.
uint32_t crc32c_by(const std::string& code, const uint8_t* data, size_t size, uint32_t crc = 0);
void choose_crc32c(const std::string& code);  // empty: the fastest; std::invalid_argument as above
const char* crc32c_path();                    // the name of the chosen one

}  // namespace nf
