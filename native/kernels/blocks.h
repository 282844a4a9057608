// Block layouts of the encodings, and how a block comes apart.
//
// Each struct describes one encoding and has
//
//   size, bytes    elements and bytes of a block
//   has_minimum    whether `minimum` is used
//   unpack(block, q, scale, minimum)
//
// `unpack` writes q[size] (int8), scale[size / 16] and minimum[size / 16], so that
//
//   element i = scale[i / 16] * q[i] (+ minimum[i / 16])
//
// rounded as float32 after each operation: the value of ggml's and gguf-py's references. That one
// form serves dequantization, the portable integer dot product and the tests.
//
// In the drawings `d` and `m` are float16; a byte's low bits are on the right. The layouts are
// those of ggml-common.h, https://github.com/ggml-org/ggml. IQ types: iq_blocks.h.
//
// Everything has internal linkage, because this is compiled once per instruction set.
#pragma once

#include <cstdint>

#include "kernels/float_formats.h"

namespace nybble {
namespace {

NYBBLE_ALWAYS_INLINE float read_f16(const uint8_t* p) { return float_from_f16(read_u16(p)); }

NYBBLE_ALWAYS_INLINE void fill_groups(float* groups, int count, float value) {
    for (int g = 0; g < count; ++g) groups[g] = value;
}

// 16 bytes hold 32 nibbles: byte i = | element i + 16 | element i |
NYBBLE_ALWAYS_INLINE void unpack_nibbles(const uint8_t* packed, int offset, int8_t* q) {
    for (int i = 0; i < 16; ++i) {
        q[i] = static_cast<int8_t>((packed[i] & 0x0f) - offset);
        q[i + 16] = static_cast<int8_t>((packed[i] >> 4) - offset);
    }
}

// The same with a fifth bit: bit i of `high` belongs to element i.
NYBBLE_ALWAYS_INLINE void unpack_five_bits(const uint8_t* packed, uint32_t high, int offset, int8_t* q) {
    for (int i = 0; i < 16; ++i) {
        q[i] =
            static_cast<int8_t>(static_cast<int>((packed[i] & 0x0fu) | (((high >> i) & 1u) << 4)) - offset);
        q[i + 16] = static_cast<int8_t>(
            static_cast<int>((packed[i] >> 4u) | (((high >> (i + 16)) & 1u) << 4)) - offset);
    }
}

NYBBLE_ALWAYS_INLINE void unpack_codes(const uint8_t* packed, const int8_t* codebook, int count, int8_t* q) {
    for (int i = 0; i < count; ++i) {
        q[i] = codebook[packed[i] & 0x0f];
        q[i + count] = codebook[packed[i] >> 4];
    }
}

// | d 2 | nibbles 16 |    x = d * (q - 8)
struct BlockQ4_0 {
    static constexpr int size = 32, bytes = 18;
    static constexpr bool has_minimum = false;
    static void unpack(const uint8_t* block, int8_t* q, float* scale, float*) {
        fill_groups(scale, 2, read_f16(block));
        unpack_nibbles(block + 2, 8, q);
    }
};

// | d 2 | m 2 | nibbles 16 |    x = d * q + m
struct BlockQ4_1 {
    static constexpr int size = 32, bytes = 20;
    static constexpr bool has_minimum = true;
    static void unpack(const uint8_t* block, int8_t* q, float* scale, float* minimum) {
        fill_groups(scale, 2, read_f16(block));
        fill_groups(minimum, 2, read_f16(block + 2));
        unpack_nibbles(block + 4, 0, q);
    }
};

// | d 2 | fifth bits 4 | nibbles 16 |    x = d * (q - 16)
struct BlockQ5_0 {
    static constexpr int size = 32, bytes = 22;
    static constexpr bool has_minimum = false;
    static void unpack(const uint8_t* block, int8_t* q, float* scale, float*) {
        fill_groups(scale, 2, read_f16(block));
        unpack_five_bits(block + 6, read_u32(block + 2), 16, q);
    }
};

// | d 2 | m 2 | fifth bits 4 | nibbles 16 |    x = d * q + m
struct BlockQ5_1 {
    static constexpr int size = 32, bytes = 24;
    static constexpr bool has_minimum = true;
    static void unpack(const uint8_t* block, int8_t* q, float* scale, float* minimum) {
        fill_groups(scale, 2, read_f16(block));
        fill_groups(minimum, 2, read_f16(block + 2));
        unpack_five_bits(block + 8, read_u32(block + 4), 0, q);
    }
};

// | d 2 | int8 32 |    x = d * q
struct BlockQ8_0 {
    static constexpr int size = 32, bytes = 34;
    static constexpr bool has_minimum = false;
    static void unpack(const uint8_t* block, int8_t* q, float* scale, float*) {
        fill_groups(scale, 2, read_f16(block));
        memcpy(q, block + 2, 32);
    }
};

// | d 2 | d * sum of q, 2 | int8 32 |    x = d * q
struct BlockQ8_1 {
    static constexpr int size = 32, bytes = 36;
    static constexpr bool has_minimum = false;
    static void unpack(const uint8_t* block, int8_t* q, float* scale, float*) {
        fill_groups(scale, 2, read_f16(block));
        memcpy(q, block + 4, 32);
    }
};

// | scale and minimum nibbles 16 | two bits 64 | d 2 | dmin 2 |
//
//   x = (d * scale) * q - (dmin * minimum), one scale byte | minimum | scale | per 16 elements
//   bits 2j of the 32 bytes at 32h: elements 128h + 32j ... + 31
struct BlockQ2K {
    static constexpr int size = 256, bytes = 84;
    static constexpr bool has_minimum = true;
    static void unpack(const uint8_t* block, int8_t* q, float* scale, float* minimum) {
        const float d = read_f16(block + 80);
        const float dmin = read_f16(block + 82);
        for (int g = 0; g < 16; ++g) {
            scale[g] = d * static_cast<float>(block[g] & 0x0f);
            minimum[g] = -(dmin * static_cast<float>(block[g] >> 4));
        }
        for (int h = 0; h < 2; ++h) {
            const uint8_t* packed = block + 16 + 32 * h;
            for (int j = 0; j < 4; ++j) {
                for (int i = 0; i < 32; ++i) {
                    q[128 * h + 32 * j + i] = static_cast<int8_t>((packed[i] >> (2 * j)) & 3);
                }
            }
        }
    }
};

// The twelve bytes of 16 six-bit scales of q3_k (offset 32):
//   bytes 0 to 7:  | low nibble of scale i + 8 | low nibble of scale i |
//   bytes 8 to 11: | high bits of scale i + 12 | i + 8 | i + 4 | i |
NYBBLE_ALWAYS_INLINE void unpack_scales_q3k(const uint8_t* packed, int8_t* scales) {
    for (int g = 0; g < 16; ++g) {
        const int low = (packed[g & 7] >> (g < 8 ? 0 : 4)) & 0x0f;
        const int high = (packed[8 + (g & 3)] >> (2 * (g >> 2))) & 3;
        scales[g] = static_cast<int8_t>((low | (high << 4)) - 32);
    }
}

// | third bits 32 | two bits 64 | six-bit scales 12 | d 2 |
//
//   x = (d * scale) * (q - 4), one scale per 16 elements
//   two bits as in q2_k; third bit: bit j of byte i is that of element 32j + i
struct BlockQ3K {
    static constexpr int size = 256, bytes = 110;
    static constexpr bool has_minimum = false;
    static void unpack(const uint8_t* block, int8_t* q, float* scale, float*) {
        int8_t scales[16];
        unpack_scales_q3k(block + 96, scales);
        const float d = read_f16(block + 108);
        for (int g = 0; g < 16; ++g) scale[g] = d * static_cast<float>(scales[g]);
        for (int j = 0; j < 8; ++j) {
            const uint8_t* packed = block + 32 + 32 * (j >> 2);
            for (int i = 0; i < 32; ++i) {
                const int low = (packed[i] >> (2 * (j & 3))) & 3;
                const int high = (block[i] >> j) & 1;
                q[32 * j + i] = static_cast<int8_t>((low | (high << 2)) - 4);
            }
        }
    }
};

// The twelve bytes of 8 six-bit scales and minima of q4_k and q5_k, i in 0 to 3:
//   bytes 0 to 3:  | high bits of scale i + 4 | scale i (6 bits) |
//   bytes 4 to 7:  | high bits of minimum i + 4 | minimum i (6 bits) |
//   bytes 8 to 11: | low nibble of minimum i + 4 | low nibble of scale i + 4 |
// As bytes of two words: first = scales 0-3, minima 0-3; second = scales 4-7, minima 4-7.
NYBBLE_ALWAYS_INLINE void unpack_scales_q4k(const uint8_t* packed, uint64_t* first, uint64_t* second) {
    const uint64_t both = read_u64(packed);
    const uint64_t nibbles = read_u32(packed + 8);
    *first = both & 0x3f3f3f3f3f3f3f3fu;
    *second = ((nibbles | (nibbles << 28)) & 0x0f0f0f0f0f0f0f0fu) | ((both >> 2) & 0x3030303030303030u);
}

NYBBLE_ALWAYS_INLINE void unpack_scales_q4k(const uint8_t* block, float* scale, float* minimum) {
    const float d = read_f16(block);
    const float dmin = read_f16(block + 2);
    uint64_t words[2];
    unpack_scales_q4k(block + 4, &words[0], &words[1]);
    for (int j = 0; j < 8; ++j) {
        const uint64_t word = words[j >> 2];
        const float s = d * static_cast<float>((word >> (8 * (j & 3))) & 0xff);
        const float m = -(dmin * static_cast<float>((word >> (8 * (j & 3) + 32)) & 0xff));
        scale[2 * j] = scale[2 * j + 1] = s;
        minimum[2 * j] = minimum[2 * j + 1] = m;
    }
}

// | d 2 | dmin 2 | six-bit scales and minima 12 | nibbles 128 |
//
//   x = (d * scale) * q - (dmin * minimum), a scale and a minimum per 32 elements
//   the 32 bytes at 32h: | elements 64h + 32 ... + 63 | elements 64h ... + 31 |
struct BlockQ4K {
    static constexpr int size = 256, bytes = 144;
    static constexpr bool has_minimum = true;
    static void unpack(const uint8_t* block, int8_t* q, float* scale, float* minimum) {
        unpack_scales_q4k(block, scale, minimum);
        for (int h = 0; h < 4; ++h) {
            const uint8_t* packed = block + 16 + 32 * h;
            for (int i = 0; i < 32; ++i) {
                q[64 * h + i] = static_cast<int8_t>(packed[i] & 0x0f);
                q[64 * h + 32 + i] = static_cast<int8_t>(packed[i] >> 4);
            }
        }
    }
};

// | d 2 | dmin 2 | six-bit scales and minima 12 | fifth bits 32 | nibbles 128 |
//
//   as q4_k; fifth bit: bit j of byte i is that of element 32j + i
struct BlockQ5K {
    static constexpr int size = 256, bytes = 176;
    static constexpr bool has_minimum = true;
    static void unpack(const uint8_t* block, int8_t* q, float* scale, float* minimum) {
        unpack_scales_q4k(block, scale, minimum);
        const uint8_t* high = block + 16;
        for (int h = 0; h < 4; ++h) {
            const uint8_t* packed = block + 48 + 32 * h;
            for (int i = 0; i < 32; ++i) {
                q[64 * h + i] = static_cast<int8_t>((packed[i] & 0x0f) | (((high[i] >> (2 * h)) & 1) << 4));
                q[64 * h + 32 + i] =
                    static_cast<int8_t>((packed[i] >> 4) | (((high[i] >> (2 * h + 1)) & 1) << 4));
            }
        }
    }
};

// | low nibbles 128 | high two bits 64 | int8 scales 16 | d 2 |
//
//   x = (d * scale) * (q - 32), one scale per 16 elements; for each half h of 128 elements
//   the 64 bytes of nibbles:  | element 64 + i | element i |
//   the 32 bytes of two bits: | element 96 + i | 64 + i | 32 + i | i |
struct BlockQ6K {
    static constexpr int size = 256, bytes = 210;
    static constexpr bool has_minimum = false;
    static void unpack(const uint8_t* block, int8_t* q, float* scale, float*) {
        const float d = read_f16(block + 208);
        for (int g = 0; g < 16; ++g) scale[g] = d * static_cast<float>(static_cast<int8_t>(block[192 + g]));
        for (int h = 0; h < 2; ++h) {
            const uint8_t* low = block + 64 * h;
            const uint8_t* high = block + 128 + 32 * h;
            int8_t* half = q + 128 * h;
            for (int i = 0; i < 32; ++i) {
                half[i] = static_cast<int8_t>(((low[i] & 0x0f) | ((high[i] & 3) << 4)) - 32);
                half[i + 32] = static_cast<int8_t>(((low[i + 32] & 0x0f) | (((high[i] >> 2) & 3) << 4)) - 32);
                half[i + 64] = static_cast<int8_t>(((low[i] >> 4) | (((high[i] >> 4) & 3) << 4)) - 32);
                half[i + 96] = static_cast<int8_t>(((low[i + 32] >> 4) | ((high[i] >> 6) << 4)) - 32);
            }
        }
    }
};

// | d float32 | int8 256 | int16 sums 32 |    x = d * q
struct BlockQ8K {
    static constexpr int size = 256, bytes = 292;
    static constexpr bool has_minimum = false;
    static void unpack(const uint8_t* block, int8_t* q, float* scale, float*) {
        fill_groups(scale, 16, float_from_bits(read_u32(block)));
        memcpy(q, block + 4, 256);
    }
};

// | five base-3 digits a byte 48 | four base-3 digits a byte 4 | d 2 |
//
//   x = d * (digit - 1). A byte holds its digits as a fraction of 256: multiplying by 3 moves the
//   next digit out at the top. Digit p of the first 32 bytes: elements 32p ...; of the next 16:
//   160 + 16p ...; of the last 4: 240 + 4p ...
struct BlockTQ1_0 {
    static constexpr int size = 256, bytes = 54;
    static constexpr bool has_minimum = false;
    static void unpack(const uint8_t* block, int8_t* q, float* scale, float*) {
        fill_groups(scale, 16, read_f16(block + 52));
        q = digits(block, 32, 5, q);
        q = digits(block + 32, 16, 5, q);
        digits(block + 48, 4, 4, q);
    }

   private:
    static int8_t* digits(const uint8_t* packed, int count, int digits, int8_t* q) {
        int power = 1;
        for (int p = 0; p < digits; ++p, power *= 3) {
            for (int i = 0; i < count; ++i) {
                const uint8_t fraction = static_cast<uint8_t>(packed[i] * power);
                *q++ = static_cast<int8_t>(((fraction * 3) >> 8) - 1);
            }
        }
        return q;
    }
};

// | two bits 64 | d 2 |    x = d * (q - 1), bits as in q2_k
struct BlockTQ2_0 {
    static constexpr int size = 256, bytes = 66;
    static constexpr bool has_minimum = false;
    static void unpack(const uint8_t* block, int8_t* q, float* scale, float*) {
        fill_groups(scale, 16, read_f16(block + 64));
        for (int j = 0; j < 8; ++j) {
            const uint8_t* packed = block + 32 * (j >> 2);
            for (int i = 0; i < 32; ++i) {
                q[32 * j + i] = static_cast<int8_t>(((packed[i] >> (2 * (j & 3))) & 3) - 1);
            }
        }
    }
};

// | d 2 | bits 16 |    x = bit ? d : -d
struct BlockQ1_0 {
    static constexpr int size = 128, bytes = 18;
    static constexpr bool has_minimum = false;
    static void unpack(const uint8_t* block, int8_t* q, float* scale, float*) {
        fill_groups(scale, 8, read_f16(block));
        for (int i = 0; i < 128; ++i) q[i] = ((block[2 + (i >> 3)] >> (i & 7)) & 1) ? 1 : -1;
    }
};

// | d 2 | two bits 16 |    x = d * (q - 1), element i in bits 2 (i % 4) of byte i / 4
struct BlockQ2_0 {
    static constexpr int size = 64, bytes = 18;
    static constexpr bool has_minimum = false;
    static void unpack(const uint8_t* block, int8_t* q, float* scale, float*) {
        fill_groups(scale, 4, read_f16(block));
        for (int i = 0; i < 64; ++i) {
            q[i] = static_cast<int8_t>(((block[2 + (i >> 2)] >> (2 * (i & 3))) & 3) - 1);
        }
    }
};

}  // namespace
}  // namespace nybble
