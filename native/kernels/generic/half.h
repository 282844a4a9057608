// Scalar conversions of 16-bit floats; internal linkage on purpose (see kernels.h).
#pragma once

#include <cstdint>
#include <cstring>

namespace nybble {
namespace {

static inline float bits_to_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float half_to_float(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000U) << 16;
    const uint32_t rest = half & 0x7fffU;
    if (rest >= 0x7c00U) {
        return bits_to_float(sign | 0x7f800000U | (rest << 13));
    }
    // Shift exponent and mantissa into place and multiply by 2^112: subnormals come out right.
    return bits_to_float(sign | float_to_bits(bits_to_float(rest << 13) * bits_to_float(0x77800000U)));
}

// Round to nearest even, as the hardware does.
static inline uint16_t float_to_half(float value) {
    const uint32_t bits = float_to_bits(value);
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000U);
    const uint32_t rest = bits & 0x7fffffffU;
    if (rest > 0x7f800000U) {
        return static_cast<uint16_t>(sign | 0x7e00U | ((rest >> 13) & 0x1ffU));
    }
    if (rest >= 0x477ff000U) {
        return static_cast<uint16_t>(sign | 0x7c00U);
    }
    if (rest < 0x38800000U) {
        // Subnormal: adding 0.5 aligns the mantissa so that the rounding happens in hardware.
        const float aligned = bits_to_float(rest) + 0.5F;
        return static_cast<uint16_t>(sign | (float_to_bits(aligned) - 0x3f000000U));
    }
    const uint32_t rounded = rest - 0x38000000U + 0xfffU + ((rest >> 13) & 1U);
    return static_cast<uint16_t>(sign | (rounded >> 13));
}

static inline float bf16_to_float(uint16_t value) {
    return bits_to_float(static_cast<uint32_t>(value) << 16);
}

static inline uint16_t float_to_bf16(float value) {
    const uint32_t bits = float_to_bits(value);
    if ((bits & 0x7fffffffU) > 0x7f800000U) {
        return static_cast<uint16_t>((bits >> 16) | 0x40U);
    }
    return static_cast<uint16_t>((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16);
}

}  // namespace
}  // namespace nybble
