// Scalar conversions between float32 and the small float formats in which weights and scales are
// stored: f16, bf16, E8M0 and unsigned E4M3; and unaligned little-endian reads.
//
// Everything has internal linkage, because this is compiled once per instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/compiler.h"

namespace nybble {
namespace {

NYBBLE_ALWAYS_INLINE uint16_t read_u16(const uint8_t* p) {
    uint16_t value;
    memcpy(&value, p, sizeof value);
    return value;
}

NYBBLE_ALWAYS_INLINE uint32_t read_u32(const uint8_t* p) {
    uint32_t value;
    memcpy(&value, p, sizeof value);
    return value;
}

NYBBLE_ALWAYS_INLINE uint64_t read_u64(const uint8_t* p) {
    uint64_t value;
    memcpy(&value, p, sizeof value);
    return value;
}

NYBBLE_ALWAYS_INLINE float float_from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

NYBBLE_ALWAYS_INLINE uint32_t bits_from_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

// IEEE half precision, exact. The exponent is rebased by a multiplication, which also normalises
// subnormals; infinities and NaN are what overflows to an exponent of 143 or more.
NYBBLE_ALWAYS_INLINE float float_from_f16(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    const uint32_t magnitude = static_cast<uint32_t>(half & 0x7fffu) << 13;
    const float rebased = float_from_bits(magnitude) * float_from_bits(0x77800000u);  // 2^112
    uint32_t bits = bits_from_float(rebased);
    if (magnitude >= 0x0f800000u) bits |= 0x7f800000u;
    return float_from_bits(sign | bits);
}

NYBBLE_ALWAYS_INLINE float float_from_bf16(uint16_t value) {
    return float_from_bits(static_cast<uint32_t>(value) << 16);
}

// Round to nearest even; a NaN stays a (quiet) NaN.
NYBBLE_ALWAYS_INLINE uint16_t bf16_from_float(float value) {
    const uint32_t bits = bits_from_float(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// 2^(exponent - 128): the OCP MX scale (E8M0, bias 127) halved, because the E2M1 table holds
// doubled values. 0 and 1 give subnormal numbers.
NYBBLE_ALWAYS_INLINE float float_from_e8m0_half(uint8_t exponent) {
    return float_from_bits(exponent < 2 ? 0x00200000u << exponent
                                        : static_cast<uint32_t>(exponent - 1) << 23);
}

// Unsigned E4M3 (bias 7), halved for the same reason. 0x7f, the NaN pattern, counts as zero. The
// sign bit is ignored, as ggml does.
NYBBLE_ALWAYS_INLINE float float_from_ue4m3_half(uint8_t value) {
    if (value == 0x7f) return 0.0f;
    const uint32_t exponent = (value >> 3) & 0xfu;
    const uint32_t mantissa = value & 0x7u;
    if (exponent == 0) return static_cast<float>(mantissa) * 0.0009765625f;  // 2^-10
    return float_from_bits(((exponent + 119) << 23) | (mantissa << 20));
}

}  // namespace
}  // namespace nybble
