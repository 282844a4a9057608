// The common encodings unpacked with vector instructions of AVX2 and up: 32 signed bytes at a time,
// each handed to an `Output`, which is all that differs between levels and uses:
//
//   output.put(q, s, at)                    element at + i = s * q[i]
//   output.put(q, s0, s1, at)               the same, s0 for the first 16 and s1 for the last
//   output.put_with_minimum(q, s, m, at)    element at + i = s * q[i] + m
//   output.put_with_minimum(q, s0, s1, m0, m1, at)
//
// The outputs that store (outputs.h) round after both operations, as the scalar description does
// (blocks.h), so all levels give the same bits. Another kind multiplies with activations instead
// (linear_int8.h).
#pragma once

#include "core/encoding.h"
#include "kernels/affine_blocks.h"
#include "kernels/blocks.h"
#include "kernels/intrinsics.h"
#include "kernels/iq_grids.h"

namespace nybble {
namespace {

NYBBLE_ALWAYS_INLINE float hardware_f16(const uint8_t* p) {
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(read_u16(p))));
}

NYBBLE_ALWAYS_INLINE __m128i load_16(const uint8_t* p) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}
NYBBLE_ALWAYS_INLINE __m256i load_32(const uint8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

NYBBLE_ALWAYS_INLINE __m256i bytes_of(int value) { return _mm256_set1_epi8(static_cast<char>(value)); }

// (v >> shift) & mask in every byte; the mask must hide what comes from the next byte.
template <int shift>
NYBBLE_ALWAYS_INLINE __m256i field(__m256i v, int mask) {
    return _mm256_and_si256(shift ? _mm256_srli_epi16(v, shift) : v, bytes_of(mask));
}

// 16 bytes to 32 nibbles, low ones first.
NYBBLE_ALWAYS_INLINE __m256i nibbles_32(const uint8_t* p) {
    const __m128i packed = load_16(p);
    return field<0>(_mm256_inserti128_si256(_mm256_castsi128_si256(packed), _mm_srli_epi16(packed, 4), 1),
                    0x0f);
}

// 0xff in byte i where bit i is set.
NYBBLE_ALWAYS_INLINE __m256i spread_bits(uint32_t bits) {
    const __m256i source = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i select = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201u));
    const __m256i repeated = _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(bits)), source);
    return _mm256_cmpeq_epi8(_mm256_and_si256(repeated, select), select);
}

NYBBLE_ALWAYS_INLINE __m256i five_bits_32(const uint8_t* nibbles, uint32_t high) {
    return _mm256_or_si256(nibbles_32(nibbles), _mm256_and_si256(spread_bits(high), bytes_of(16)));
}

NYBBLE_ALWAYS_INLINE __m256i levels_of(const int8_t* levels, __m256i codes) {
    return _mm256_shuffle_epi8(
        _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(levels))), codes);
}

// put(block, output, at): the elements of a block, the first being element `at` of the output.

struct VectorQ4_0 : BlockQ4_0 {
    template <typename Output>
    static NYBBLE_ALWAYS_INLINE void put(const uint8_t* block, Output& output, int64_t at) {
        const float d = hardware_f16(block);
        output.put(_mm256_sub_epi8(nibbles_32(block + 2), bytes_of(8)), d, at);
    }
};

struct VectorQ4_1 : BlockQ4_1 {
    template <typename Output>
    static NYBBLE_ALWAYS_INLINE void put(const uint8_t* block, Output& output, int64_t at) {
        const float d = hardware_f16(block);
        const float m = hardware_f16(block + 2);
        output.put_with_minimum(nibbles_32(block + 4), d, m, at);
    }
};

struct VectorQ5_0 : BlockQ5_0 {
    template <typename Output>
    static NYBBLE_ALWAYS_INLINE void put(const uint8_t* block, Output& output, int64_t at) {
        const float d = hardware_f16(block);
        output.put(_mm256_sub_epi8(five_bits_32(block + 6, read_u32(block + 2)), bytes_of(16)), d, at);
    }
};

struct VectorQ5_1 : BlockQ5_1 {
    template <typename Output>
    static NYBBLE_ALWAYS_INLINE void put(const uint8_t* block, Output& output, int64_t at) {
        const float d = hardware_f16(block);
        const float m = hardware_f16(block + 2);
        output.put_with_minimum(five_bits_32(block + 8, read_u32(block + 4)), d, m, at);
    }
};

struct VectorQ8_0 : BlockQ8_0 {
    template <typename Output>
    static NYBBLE_ALWAYS_INLINE void put(const uint8_t* block, Output& output, int64_t at) {
        const float d = hardware_f16(block);
        output.put(load_32(block + 2), d, at);
    }
};

// 16 scales: d * signed byte, as floats in memory from where they are broadcast.
NYBBLE_ALWAYS_INLINE void scale_bytes(float d, __m128i bytes, float* scales) {
    const __m256 factor = _mm256_set1_ps(d);
    const __m256 low = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
    const __m256 high = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)));
    _mm256_storeu_ps(scales, _mm256_mul_ps(factor, low));
    _mm256_storeu_ps(scales + 8, _mm256_mul_ps(factor, high));
}

struct VectorQ2K : BlockQ2K {
    template <typename Output>
    static NYBBLE_ALWAYS_INLINE void put(const uint8_t* block, Output& output, int64_t at) {
        float s[16];
        float m[16];
        const __m128i both = load_16(block);
        const __m128i nibble = _mm_set1_epi8(0x0f);
        scale_bytes(hardware_f16(block + 80), _mm_and_si128(both, nibble), s);
        scale_bytes(-hardware_f16(block + 82), _mm_and_si128(_mm_srli_epi16(both, 4), nibble), m);
        for (int h = 0; h < 2; ++h) {
            const __m256i packed = load_32(block + 16 + 32 * h);
            const int g = 8 * h;
            output.put_with_minimum(field<0>(packed, 3), s[g], s[g + 1], m[g], m[g + 1], at + 16 * g);
            output.put_with_minimum(field<2>(packed, 3), s[g + 2], s[g + 3], m[g + 2], m[g + 3],
                                    at + 16 * g + 32);
            output.put_with_minimum(field<4>(packed, 3), s[g + 4], s[g + 5], m[g + 4], m[g + 5],
                                    at + 16 * g + 64);
            output.put_with_minimum(field<6>(packed, 3), s[g + 6], s[g + 7], m[g + 6], m[g + 7],
                                    at + 16 * g + 96);
        }
    }
};

struct VectorQ3K : BlockQ3K {
    template <typename Output>
    static NYBBLE_ALWAYS_INLINE void put(const uint8_t* block, Output& output, int64_t at) {
        alignas(16) int8_t scales[16];
        unpack_scales_q3k(block + 96, scales);
        float s[16];
        scale_bytes(hardware_f16(block + 108), _mm_load_si128(reinterpret_cast<const __m128i*>(scales)), s);
        const __m256i high = load_32(block);
        const __m256i first = load_32(block + 32);
        const __m256i second = load_32(block + 64);
        part<0>(first, high, s, output, at);
        part<1>(first, high, s, output, at);
        part<2>(first, high, s, output, at);
        part<3>(first, high, s, output, at);
        part<4>(second, high, s, output, at);
        part<5>(second, high, s, output, at);
        part<6>(second, high, s, output, at);
        part<7>(second, high, s, output, at);
    }

   private:
    template <int j, typename Output>
    static NYBBLE_ALWAYS_INLINE void part(__m256i packed, __m256i high, const float* s, Output& output,
                                          int64_t at) {
        const __m256i third = _mm256_slli_epi16(field<j>(high, 1), 2);
        const __m256i q = _mm256_or_si256(field<2 * (j & 3)>(packed, 3), third);
        output.put(_mm256_sub_epi8(q, bytes_of(4)), s[2 * j], s[2 * j + 1], at + 32 * j);
    }
};

// Nibbles with 8 scales and minima: q4_k, and q5_k with its fifth bits.
template <bool five>
NYBBLE_ALWAYS_INLINE void scales_q4k(const uint8_t* block, float* s, float* m) {
    uint64_t words[2];
    unpack_scales_q4k(block + 4, &words[0], &words[1]);
    float unordered[16];  // scales 0-3, minima 0-3, scales 4-7, minima 4-7
    const __m128i bytes = _mm_set_epi64x(static_cast<long long>(words[1]), static_cast<long long>(words[0]));
    const __m256 factors =
        _mm256_setr_m128(_mm_set1_ps(hardware_f16(block)), _mm_set1_ps(-hardware_f16(block + 2)));
    _mm256_storeu_ps(unordered, _mm256_mul_ps(factors, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes))));
    _mm256_storeu_ps(
        unordered + 8,
        _mm256_mul_ps(factors, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))));
    memcpy(s, unordered, 16);
    memcpy(m, unordered + 4, 16);
    memcpy(s + 4, unordered + 8, 16);
    memcpy(m + 4, unordered + 12, 16);
}

template <bool five, int h, typename Output>
NYBBLE_ALWAYS_INLINE void part_q4k(const uint8_t* nibbles, __m256i high, const float* s, const float* m,
                                   Output& output, int64_t at) {
    const __m256i packed = load_32(nibbles + 32 * h);
    __m256i low = field<0>(packed, 0x0f);
    __m256i top = field<4>(packed, 0x0f);
    if (five) {
        low = _mm256_or_si256(low, _mm256_slli_epi16(field<2 * h>(high, 1), 4));
        top = _mm256_or_si256(top, _mm256_slli_epi16(field<2 * h + 1>(high, 1), 4));
    }
    output.put_with_minimum(low, s[2 * h], m[2 * h], at + 64 * h);
    output.put_with_minimum(top, s[2 * h + 1], m[2 * h + 1], at + 64 * h + 32);
}

template <bool five, typename Output>
NYBBLE_ALWAYS_INLINE void put_q4k(const uint8_t* block, Output& output, int64_t at) {
    float s[8];
    float m[8];
    scales_q4k<five>(block, s, m);
    const uint8_t* nibbles = block + (five ? 48 : 16);
    const __m256i high = five ? load_32(block + 16) : _mm256_setzero_si256();
    part_q4k<five, 0>(nibbles, high, s, m, output, at);
    part_q4k<five, 1>(nibbles, high, s, m, output, at);
    part_q4k<five, 2>(nibbles, high, s, m, output, at);
    part_q4k<five, 3>(nibbles, high, s, m, output, at);
}

struct VectorQ4K : BlockQ4K {
    template <typename Output>
    static NYBBLE_ALWAYS_INLINE void put(const uint8_t* block, Output& output, int64_t at) {
        put_q4k<false>(block, output, at);
    }
};

struct VectorQ5K : BlockQ5K {
    template <typename Output>
    static NYBBLE_ALWAYS_INLINE void put(const uint8_t* block, Output& output, int64_t at) {
        put_q4k<true>(block, output, at);
    }
};

struct VectorQ6K : BlockQ6K {
    template <typename Output>
    static NYBBLE_ALWAYS_INLINE void put(const uint8_t* block, Output& output, int64_t at) {
        float scales[16];
        scale_bytes(hardware_f16(block + 208), load_16(block + 192), scales);
        for (int h = 0; h < 2; ++h, at += 128) {
            const float* s = scales + 8 * h;
            const __m256i a = load_32(block + 64 * h);
            const __m256i b = load_32(block + 64 * h + 32);
            const __m256i high = load_32(block + 128 + 32 * h);
            part(field<0>(a, 0x0f), field<0>(_mm256_slli_epi16(high, 4), 0x30), s, output, at);
            part(field<0>(b, 0x0f), field<0>(_mm256_slli_epi16(high, 2), 0x30), s + 2, output, at + 32);
            part(field<4>(a, 0x0f), field<0>(high, 0x30), s + 4, output, at + 64);
            part(field<4>(b, 0x0f), field<2>(high, 0x30), s + 6, output, at + 96);
        }
    }

   private:
    template <typename Output>
    static NYBBLE_ALWAYS_INLINE void part(__m256i low, __m256i high, const float* s, Output& output,
                                          int64_t at) {
        output.put(_mm256_sub_epi8(_mm256_or_si256(low, high), bytes_of(32)), s[0], s[1], at);
    }
};

struct VectorIQ4NL : BlockQ4_0 {
    template <typename Output>
    static NYBBLE_ALWAYS_INLINE void put(const uint8_t* block, Output& output, int64_t at) {
        const float d = hardware_f16(block);
        output.put(levels_of(grids::kvalues_iq4nl, nibbles_32(block + 2)), d, at);
    }
};

struct VectorIQ4XS {
    static constexpr int size = 256, bytes = 136;
    template <typename Output>
    static NYBBLE_ALWAYS_INLINE void put(const uint8_t* block, Output& output, int64_t at) {
        const __m256i low =
            _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(read_u32(block + 4))),
                                               _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28)),
                             _mm256_set1_epi32(0x0f));
        const __m256i high = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(read_u16(block + 2)),
                                                                _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14)),
                                              _mm256_set1_epi32(3));
        const __m256i scale =
            _mm256_sub_epi32(_mm256_or_si256(low, _mm256_slli_epi32(high, 4)), _mm256_set1_epi32(32));
        float s[8];
        _mm256_storeu_ps(s, _mm256_mul_ps(_mm256_set1_ps(hardware_f16(block)), _mm256_cvtepi32_ps(scale)));
        for (int j = 0; j < 8; ++j) {
            output.put(levels_of(grids::kvalues_iq4nl, nibbles_32(block + 8 + 16 * j)), s[j], at + 32 * j);
        }
    }
};

struct VectorMXFP4 {
    static constexpr int size = 32, bytes = 17;
    template <typename Output>
    static NYBBLE_ALWAYS_INLINE void put(const uint8_t* block, Output& output, int64_t at) {
        const float d = float_from_e8m0_half(block[0]);
        output.put(levels_of(grids::kvalues_mxfp4, nibbles_32(block + 1)), d, at);
    }
};

struct VectorInt4F32 : BlockInt4F32 {
    template <typename Output>
    static NYBBLE_ALWAYS_INLINE void put(const uint8_t* block, Output& output, int64_t at) {
        output.put(_mm256_sub_epi8(nibbles_32(block + 4), bytes_of(8)), read_f32(block), at);
    }
};

struct VectorInt4F16Z : BlockInt4F16Z {
    template <typename Output>
    static NYBBLE_ALWAYS_INLINE void put(const uint8_t* block, Output& output, int64_t at) {
        const float d = hardware_f16(block);
        output.put(_mm256_sub_epi8(nibbles_32(block + 3), bytes_of(block[2])), d, at);
    }
};

struct VectorInt4F32Z : BlockInt4F32Z {
    template <typename Output>
    static NYBBLE_ALWAYS_INLINE void put(const uint8_t* block, Output& output, int64_t at) {
        output.put(_mm256_sub_epi8(nibbles_32(block + 5), bytes_of(block[4])), read_f32(block), at);
    }
};

struct VectorInt8F32 : BlockInt8F32 {
    template <typename Output>
    static NYBBLE_ALWAYS_INLINE void put(const uint8_t* block, Output& output, int64_t at) {
        output.put(_mm256_xor_si256(load_32(block + 4), bytes_of(128)), read_f32(block), at);
    }
};

struct VectorInt4F32M : BlockInt4F32M {
    template <typename Output>
    static NYBBLE_ALWAYS_INLINE void put(const uint8_t* block, Output& output, int64_t at) {
        output.put_with_minimum(nibbles_32(block + 8), read_f32(block), read_f32(block + 4), at);
    }
};

struct VectorInt8F32M : BlockInt8F32M {
    template <typename Output>
    static NYBBLE_ALWAYS_INLINE void put(const uint8_t* block, Output& output, int64_t at) {
        output.put_with_minimum(load_32(block + 8), read_f32(block), read_f32(block + 4), at);
    }
};

// Calls visit(Vector{}, encoding) for the encodings above.
template <typename Visit>
NYBBLE_ALWAYS_INLINE void for_each_vector_block(const Visit& visit) {
    visit(VectorQ4_0{}, Encoding::q4_0);
    visit(VectorQ4_1{}, Encoding::q4_1);
    visit(VectorQ5_0{}, Encoding::q5_0);
    visit(VectorQ5_1{}, Encoding::q5_1);
    visit(VectorQ8_0{}, Encoding::q8_0);
    visit(VectorQ2K{}, Encoding::q2_k);
    visit(VectorQ3K{}, Encoding::q3_k);
    visit(VectorQ4K{}, Encoding::q4_k);
    visit(VectorQ5K{}, Encoding::q5_k);
    visit(VectorQ6K{}, Encoding::q6_k);
    visit(VectorIQ4NL{}, Encoding::iq4_nl);
    visit(VectorIQ4XS{}, Encoding::iq4_xs);
    visit(VectorMXFP4{}, Encoding::mxfp4);
    visit(VectorInt4F32{}, Encoding::int4_g32_f32);
    visit(VectorInt4F16Z{}, Encoding::int4_g32_f16_z);
    visit(VectorInt4F32Z{}, Encoding::int4_g32_f32_z);
    visit(VectorInt8F32{}, Encoding::int8_g32_f32);
    visit(VectorInt4F32M{}, Encoding::int4_g32_f32_m);
    visit(VectorInt8F32M{}, Encoding::int8_g32_f32_m);
}

template <typename Vector, typename Output>
NYBBLE_NOINLINE void dequantize_vector(const uint8_t* blocks, typename Output::Element* out, int64_t n) {
    Output output{out};
    for (int64_t at = 0; at < n; at += Vector::size, blocks += Vector::bytes) Vector::put(blocks, output, at);
}

}  // namespace
}  // namespace nybble
