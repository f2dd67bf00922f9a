#include "io/crc32c.h"

#include <array>
#include <cstring>
#include <stdexcept>

#if defined(__x86_64__)
#include <nmmintrin.h>
#define NF_CRC_TARGET __attribute__((target("sse4.2")))
#elif defined(__aarch64__)
#include <arm_acle.h>
#include <asm/hwcap.h>
#include <sys/auxv.h>
#define NF_CRC_TARGET __attribute__((target("+crc")))
#endif

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the file format and these loads are little endian");

namespace nf {
namespace {

constexpr uint32_t kPolynomial = 0x82F63B78;
constexpr size_t kStream = 4096;

uint64_t load64(const uint8_t* data) {
    uint64_t value;
    std::memcpy(&value, data, sizeof value);
    return value;
}

// byte[k][b]: the register after byte b and k zero bytes. shift[k][b]: what byte k of a register, of value b, becomes
// after kStream zero bytes; the map is linear over GF(2), so a whole register is the xor of its four bytes' entries.
struct Tables {
    std::array<std::array<uint32_t, 256>, 8> byte;
    std::array<std::array<uint32_t, 256>, 4> shift;

    Tables() {
        for (uint32_t b = 0; b < 256; ++b) {
            uint32_t value = b;
            for (int bit = 0; bit < 8; ++bit) value = (value >> 1) ^ (value & 1 ? kPolynomial : 0);
            byte[0][b] = value;
        }
        for (size_t k = 1; k < 8; ++k)
            for (size_t b = 0; b < 256; ++b) byte[k][b] = zero_byte(byte[k - 1][b]);
        for (size_t k = 0; k < 4; ++k) fill_shift(k);
    }

    uint32_t zero_byte(uint32_t value) const { return (value >> 8) ^ byte[0][value & 255]; }

    void fill_shift(size_t k) {
        shift[k][0] = 0;
        for (uint32_t bit = 1; bit < 256; bit <<= 1) {
            uint32_t value = bit << (8 * k);
            for (size_t i = 0; i < kStream; ++i) value = zero_byte(value);
            for (uint32_t low = 0; low < bit; ++low) shift[k][bit + low] = value ^ shift[k][low];
        }
    }

    uint32_t skip_stream(uint32_t value) const {
        return shift[0][value & 255] ^ shift[1][value >> 8 & 255] ^ shift[2][value >> 16 & 255] ^ shift[3][value >> 24];
    }
};

const Tables table;

uint32_t by_table(const uint8_t* data, size_t size, uint32_t crc) {
    uint32_t value = ~crc;
    for (; size >= 8; data += 8, size -= 8) {
        const uint64_t word = load64(data) ^ value;
        value = 0;
        for (int k = 0; k < 8; ++k) value ^= table.byte[7 - k][word >> (8 * k) & 255];
    }
    for (; size; ++data, --size) value = table.zero_byte(value ^ *data);
    return ~value;
}

#ifdef NF_CRC_TARGET
#if defined(__x86_64__)
NF_CRC_TARGET inline uint32_t step64(uint32_t crc, uint64_t value) {
    return static_cast<uint32_t>(_mm_crc32_u64(crc, value));
}
NF_CRC_TARGET inline uint32_t step8(uint32_t crc, uint8_t value) { return _mm_crc32_u8(crc, value); }
bool supported() {
    __builtin_cpu_init();  // this runs before main()
    return __builtin_cpu_supports("sse4.2");
}
#else
NF_CRC_TARGET inline uint32_t step64(uint32_t crc, uint64_t value) { return __crc32cd(crc, value); }
NF_CRC_TARGET inline uint32_t step8(uint32_t crc, uint8_t value) { return __crc32cb(crc, value); }
bool supported() { return getauxval(AT_HWCAP) & HWCAP_CRC32; }
#endif

NF_CRC_TARGET inline uint32_t serial(const uint8_t* data, size_t size, uint32_t value) {
    for (; size >= 8; data += 8, size -= 8) value = step64(value, load64(data));
    for (; size; ++data, --size) value = step8(value, *data);
    return value;
}

NF_CRC_TARGET uint32_t by_serial(const uint8_t* data, size_t size, uint32_t crc) { return ~serial(data, size, ~crc); }

// One CRC instruction waits 3 cycles for the one before it, and one can start each cycle: three independent streams.
NF_CRC_TARGET uint32_t by_streams(const uint8_t* data, size_t size, uint32_t crc) {
    uint32_t a = ~crc;
    for (; size >= 3 * kStream; data += 3 * kStream, size -= 3 * kStream) {
        uint32_t b = 0, c = 0;
        for (size_t i = 0; i < kStream; i += 8) {
            a = step64(a, load64(data + i));
            b = step64(b, load64(data + kStream + i));
            c = step64(c, load64(data + 2 * kStream + i));
        }
        a = table.skip_stream(table.skip_stream(a) ^ b) ^ c;
    }
    return ~serial(data, size, a);
}
#else
bool supported() { return false; }
constexpr auto by_serial = by_table, by_streams = by_table;
#endif

struct Code {
    const char* name;
    uint32_t (*compute)(const uint8_t* data, size_t size, uint32_t crc);
};
constexpr Code kCodes[] = {{"table", by_table}, {"serial", by_serial}, {"streams", by_streams}};  // slow to fast
const bool hardware = supported();
const Code* chosen = &kCodes[hardware ? 2 : 0];

const Code& find(const std::string& name) {
    for (const Code& code : kCodes)
        if (name == code.name && (&code == &kCodes[0] || hardware)) return code;
    throw std::invalid_argument(
        std::string("expected the CRC32C code to be ") +
        (hardware ? "table, serial or streams" : "table, the only one that this processor has") + ", got \"" + name +
        "\"");
}

}  // namespace

uint32_t crc32c(const uint8_t* data, size_t size, uint32_t crc) { return chosen->compute(data, size, crc); }

uint32_t crc32c_by(const std::string& code, const uint8_t* data, size_t size, uint32_t crc) {
    return find(code).compute(data, size, crc);
}

void choose_crc32c(const std::string& code) {
    if (!code.empty()) chosen = &find(code);
}

const char* crc32c_path() { return chosen->name; }

}  // namespace nf
