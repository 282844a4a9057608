// Block layouts of the encodings that look values up in a table: IQ types, MXFP4 and NVFP4. The
// structs are as in blocks.h.
//
// IQ1 to IQ3 take 8 (or 4) elements at once from a codebook (iq_grids.h) and flip their signs. In
// IQ2_XXS, IQ2_XS and IQ3_XXS seven bits name a sign pattern of even parity.
#pragma once

#include "core/encoding.h"
#include "kernels/affine_blocks.h"
#include "kernels/blocks.h"
#include "kernels/iq_grids.h"

namespace nybble {
namespace {

constexpr uint64_t each_byte = 0x0101010101010101u;

// Eight values of a codebook entry, negated where a bit of `signs` is set: all eight bytes in one
// word. Values are positive, so that inverting and adding one never carries into the next byte.
NYBBLE_ALWAYS_INLINE void signed_entry(uint64_t entry, uint8_t signs, int8_t* q) {
    const uint64_t bits = (signs * each_byte) & 0x8040201008040201u;
    const uint64_t negative = ((bits + 0x7f * each_byte) >> 7) & each_byte;
    const uint64_t values = (entry ^ (negative * 0xff)) + negative;
    memcpy(q, &values, sizeof values);
}

NYBBLE_ALWAYS_INLINE uint64_t pair_of(uint32_t low, uint32_t high) {
    return low | (static_cast<uint64_t>(high) << 32);
}

// | d 2 | 8 x { index 1, 1, 1, 1 | scale 4 bits, sign patterns 4 x 7 bits } |
//
//   x = d * (scale + 1/2) / 4 * value, one scale per 32 elements
struct BlockIQ2XXS {
    static constexpr int size = 256, bytes = 66;
    static constexpr bool has_minimum = false;
    static void unpack(const uint8_t* block, int8_t* q, float* scale, float*) {
        const float d = read_f16(block);
        for (int j = 0; j < 8; ++j) {
            const uint8_t* index = block + 2 + 8 * j;
            const uint32_t word = read_u32(index + 4);
            fill_groups(scale + 2 * j, 2, d * (0.5f + static_cast<float>(word >> 28)) * 0.25f);
            for (int k = 0; k < 4; ++k) {
                signed_entry(grids::iq2xxs[index[k]], grids::ksigns[(word >> (7 * k)) & 0x7f],
                             q + 32 * j + 8 * k);
            }
        }
    }
};

// | d 2 | 32 x { sign pattern 7 bits, index 9 bits } | scale nibbles 8 |
//
//   x = d * (scale + 1/2) / 4 * value, one scale per 16 elements
struct BlockIQ2XS {
    static constexpr int size = 256, bytes = 74;
    static constexpr bool has_minimum = false;
    static void unpack(const uint8_t* block, int8_t* q, float* scale, float*) {
        const float d = read_f16(block);
        for (int g = 0; g < 16; ++g) {
            const int nibble = (block[66 + (g >> 1)] >> (4 * (g & 1))) & 0x0f;
            scale[g] = d * (0.5f + static_cast<float>(nibble)) * 0.25f;
        }
        for (int k = 0; k < 32; ++k) {
            const uint16_t word = read_u16(block + 2 + 2 * k);
            signed_entry(grids::iq2xs[word & 511], grids::ksigns[word >> 9], q + 8 * k);
        }
    }
};

// | d 2 | low byte of index 32 | signs 32 | high two bits of index 8 | scale nibbles 8 |
struct BlockIQ2S {
    static constexpr int size = 256, bytes = 82;
    static constexpr bool has_minimum = false;
    static void unpack(const uint8_t* block, int8_t* q, float* scale, float*) {
        const float d = read_f16(block);
        for (int g = 0; g < 16; ++g) {
            const int nibble = (block[74 + (g >> 1)] >> (4 * (g & 1))) & 0x0f;
            scale[g] = d * (0.5f + static_cast<float>(nibble)) * 0.25f;
        }
        for (int k = 0; k < 32; ++k) {
            const int high = (block[66 + (k >> 2)] >> (2 * (k & 3))) & 3;
            signed_entry(grids::iq2s[block[2 + k] | (high << 8)], block[34 + k], q + 8 * k);
        }
    }
};

// | d 2 | index 64 | 8 x { scale 4 bits, sign patterns 4 x 7 bits } |
//
//   x = d * (scale + 1/2) / 2 * value, one scale per 32 elements, four elements an index
struct BlockIQ3XXS {
    static constexpr int size = 256, bytes = 98;
    static constexpr bool has_minimum = false;
    static void unpack(const uint8_t* block, int8_t* q, float* scale, float*) {
        const float d = read_f16(block);
        for (int j = 0; j < 8; ++j) {
            const uint8_t* index = block + 2 + 8 * j;
            const uint32_t word = read_u32(block + 66 + 4 * j);
            fill_groups(scale + 2 * j, 2, d * (0.5f + static_cast<float>(word >> 28)) * 0.5f);
            for (int k = 0; k < 4; ++k) {
                const uint64_t entry = pair_of(grids::iq3xxs[index[2 * k]], grids::iq3xxs[index[2 * k + 1]]);
                signed_entry(entry, grids::ksigns[(word >> (7 * k)) & 0x7f], q + 32 * j + 8 * k);
            }
        }
    }
};

// | d 2 | low byte of index 64 | ninth bit of index 8 | signs 32 | scale nibbles 4 |
//
//   x = d * (2 scale + 1) * value, one scale per 32 elements, four elements an index
struct BlockIQ3S {
    static constexpr int size = 256, bytes = 110;
    static constexpr bool has_minimum = false;
    static void unpack(const uint8_t* block, int8_t* q, float* scale, float*) {
        const float d = read_f16(block);
        for (int j = 0; j < 8; ++j) {
            const int nibble = (block[106 + (j >> 1)] >> (4 * (j & 1))) & 0x0f;
            fill_groups(scale + 2 * j, 2, d * static_cast<float>(1 + 2 * nibble));
        }
        for (int k = 0; k < 32; ++k) {
            const int high = block[66 + (k >> 2)] >> (2 * (k & 3));
            const uint32_t low_entry = grids::iq3s[block[2 + 2 * k] | ((high & 1) << 8)];
            const uint32_t high_entry = grids::iq3s[block[3 + 2 * k] | ((high & 2) << 7)];
            signed_entry(pair_of(low_entry, high_entry), block[74 + k], q + 8 * k);
        }
    }
};

// Eight ternary values g with a common shift of 1/8, as 8 g + 1 or 8 g - 1; byte by byte in one word,
// where subtracting goes through the top bit to borrow nothing from the next byte.
NYBBLE_ALWAYS_INLINE void shifted_entry(uint64_t entry, bool negative, int8_t* q) {
    const uint64_t top = 0x80 * each_byte;
    const uint64_t eightfold = (entry << 3) & (0xf8 * each_byte);
    const uint64_t lower = ((eightfold | top) - each_byte) ^ (~eightfold & top);
    const uint64_t values = negative ? lower : eightfold + each_byte;
    memcpy(q, &values, sizeof values);
}

// | d 2 | low byte of index 32 | 8 x { sign of shift 1, scale 3, high bits of index 4 x 3 bits } |
//
//   x = d * (2 scale + 1) * (value +- 1/8), one scale per 32 elements
struct BlockIQ1S {
    static constexpr int size = 256, bytes = 50;
    static constexpr bool has_minimum = false;
    static void unpack(const uint8_t* block, int8_t* q, float* scale, float*) {
        const float d = read_f16(block);
        for (int j = 0; j < 8; ++j) {
            const int word = read_u16(block + 34 + 2 * j);
            fill_groups(scale + 2 * j, 2, d * static_cast<float>(2 * ((word >> 12) & 7) + 1) * 0.125f);
            for (int k = 0; k < 4; ++k) {
                const int index = block[2 + 4 * j + k] | (((word >> (3 * k)) & 7) << 8);
                shifted_entry(grids::iq1s[index], (word & 0x8000) != 0, q + 32 * j + 8 * k);
            }
        }
    }
};

// | low byte of index 32 | 32 x { sign of shift 1, high bits of index 3 } |
// | 4 x { a nibble of d, scales 4 x 3 bits } |
//
//   x = d * (2 scale + 1) * (value +- 1/8), one scale per 16 elements
struct BlockIQ1M {
    static constexpr int size = 256, bytes = 56;
    static constexpr bool has_minimum = false;
    static void unpack(const uint8_t* block, int8_t* q, float* scale, float*) {
        int half = 0;
        for (int k = 0; k < 4; ++k) half |= (read_u16(block + 48 + 2 * k) >> 12) << (4 * k);
        const float d = float_from_f16(static_cast<uint16_t>(half));
        for (int g = 0; g < 16; ++g) {
            const int bits = (read_u16(block + 48 + 2 * (g >> 2)) >> (3 * (g & 3))) & 7;
            scale[g] = d * static_cast<float>(2 * bits + 1) * 0.125f;
        }
        for (int k = 0; k < 32; ++k) {
            const int high = block[32 + (k >> 1)] >> (4 * (k & 1));
            shifted_entry(grids::iq1s[block[k] | ((high & 7) << 8)], (high & 8) != 0, q + 8 * k);
        }
    }
};

// | d 2 | nibbles 16 |    x = d * kvalues_iq4nl[nibble]
struct BlockIQ4NL {
    static constexpr int size = 32, bytes = 18;
    static constexpr bool has_minimum = false;
    static void unpack(const uint8_t* block, int8_t* q, float* scale, float*) {
        fill_groups(scale, 2, read_f16(block));
        unpack_codes(block + 2, grids::kvalues_iq4nl, 16, q);
    }
};

// | d 2 | high two bits of 8 scales 2 | low nibbles of scales 4 | 8 x nibbles 16 |
//
//   x = (d * (scale - 32)) * kvalues_iq4nl[nibble], one scale per 32 elements
struct BlockIQ4XS {
    static constexpr int size = 256, bytes = 136;
    static constexpr bool has_minimum = false;
    static void unpack(const uint8_t* block, int8_t* q, float* scale, float*) {
        const float d = read_f16(block);
        const int high = read_u16(block + 2);
        for (int j = 0; j < 8; ++j) {
            const int low = (block[4 + (j >> 1)] >> (4 * (j & 1))) & 0x0f;
            fill_groups(scale + 2 * j, 2,
                        d * static_cast<float>((low | (((high >> (2 * j)) & 3) << 4)) - 32));
            unpack_codes(block + 8 + 16 * j, grids::kvalues_iq4nl, 16, q + 32 * j);
        }
    }
};

// | E8M0 scale 1 | E2M1 nibbles 16 |    x = scale * value
// OCP Microscaling Formats (MX) Specification 1.0
struct BlockMXFP4 {
    static constexpr int size = 32, bytes = 17;
    static constexpr bool has_minimum = false;
    static void unpack(const uint8_t* block, int8_t* q, float* scale, float*) {
        fill_groups(scale, 2, float_from_e8m0_half(block[0]));
        unpack_codes(block + 1, grids::kvalues_mxfp4, 16, q);
    }
};

// | unsigned E4M3 scales 4 | 4 x E2M1 nibbles 8 |    x = scale * value, one scale per 16 elements
struct BlockNVFP4 {
    static constexpr int size = 64, bytes = 36;
    static constexpr bool has_minimum = false;
    static void unpack(const uint8_t* block, int8_t* q, float* scale, float*) {
        for (int g = 0; g < 4; ++g) {
            scale[g] = float_from_ue4m3_half(block[g]);
            unpack_codes(block + 4 + 8 * g, grids::kvalues_mxfp4, 8, q + 16 * g);
        }
    }
};

// Calls visit(Block{}, encoding) for the encodings that most files use; these have vector kernels.
template <typename Visit>
NYBBLE_ALWAYS_INLINE void for_each_common_block(const Visit& visit) {
    visit(BlockQ4_0{}, Encoding::q4_0);
    visit(BlockQ4_1{}, Encoding::q4_1);
    visit(BlockQ5_0{}, Encoding::q5_0);
    visit(BlockQ5_1{}, Encoding::q5_1);
    visit(BlockQ8_0{}, Encoding::q8_0);
    visit(BlockQ2K{}, Encoding::q2_k);
    visit(BlockQ3K{}, Encoding::q3_k);
    visit(BlockQ4K{}, Encoding::q4_k);
    visit(BlockQ5K{}, Encoding::q5_k);
    visit(BlockQ6K{}, Encoding::q6_k);
    visit(BlockIQ4NL{}, Encoding::iq4_nl);
    visit(BlockIQ4XS{}, Encoding::iq4_xs);
    visit(BlockMXFP4{}, Encoding::mxfp4);
    visit(BlockInt4F32{}, Encoding::int4_g32_f32);
    visit(BlockInt4F16Z{}, Encoding::int4_g32_f16_z);
    visit(BlockInt4F32Z{}, Encoding::int4_g32_f32_z);
    visit(BlockInt8F32{}, Encoding::int8_g32_f32);
    visit(BlockInt4F32M{}, Encoding::int4_g32_f32_m);
    visit(BlockInt8F32M{}, Encoding::int8_g32_f32_m);
}

// The same for the others, none of which has a minimum.
template <typename Visit>
NYBBLE_ALWAYS_INLINE void for_each_rare_block(const Visit& visit) {
    visit(BlockQ8_1{}, Encoding::q8_1);
    visit(BlockQ8K{}, Encoding::q8_k);
    visit(BlockIQ1S{}, Encoding::iq1_s);
    visit(BlockIQ1M{}, Encoding::iq1_m);
    visit(BlockIQ2XXS{}, Encoding::iq2_xxs);
    visit(BlockIQ2XS{}, Encoding::iq2_xs);
    visit(BlockIQ2S{}, Encoding::iq2_s);
    visit(BlockIQ3XXS{}, Encoding::iq3_xxs);
    visit(BlockIQ3S{}, Encoding::iq3_s);
    visit(BlockTQ1_0{}, Encoding::tq1_0);
    visit(BlockTQ2_0{}, Encoding::tq2_0);
    visit(BlockNVFP4{}, Encoding::nvfp4);
    visit(BlockQ1_0{}, Encoding::q1_0);
    visit(BlockQ2_0{}, Encoding::q2_0);
}

template <typename Visit>
NYBBLE_ALWAYS_INLINE void for_each_block(const Visit& visit) {
    for_each_common_block(visit);
    for_each_rare_block(visit);
}

}  // namespace
}  // namespace nybble
