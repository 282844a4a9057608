// Four-bit weights to bfloat16 through tables: the 16 values that a block can hold are computed and
// rounded once, and one permutation then turns 32 codes into 32 elements.
//
// A permutation of 16-bit words reads five bits of each index: the tables of two blocks fill one
// register, and a bit of the index tells them apart.
#pragma once

#include "kernels/avx512/outputs.h"
#include "kernels/avx512_vnni/strided.h"

namespace nybble {
namespace {

NYBBLE_ALWAYS_INLINE __m512i two_tables(__m512 first, __m512 second) {
    const __m512bh rounded = _mm512_cvtne2ps_pbh(second, first);
    __m512i bits;
    memcpy(&bits, &rounded, sizeof bits);
    return bits;
}

// The same in integer arithmetic: the conversion instruction takes subnormal numbers for zero, and
// float32 scales can make some.
NYBBLE_ALWAYS_INLINE __m512i two_exact_tables(__m512 first, __m512 second) {
    alignas(64) uint16_t rounded[32];
    Avx512StoreBf16::store(rounded, first, second);
    return _mm512_load_si512(rounded);
}

// 32 words whose low nibbles are codes, looked up in the first or second table.
NYBBLE_ALWAYS_INLINE void look_up(__m512i words, __m512i tables, bool second, uint16_t* out) {
    const __m512i nibble = _mm512_set1_epi16(0x0f);
    const __m512i codes =
        second ? _mm512_ternarylogic_epi32(words, nibble, _mm512_set1_epi16(0x10), 0xea)  // a & b | c
               : _mm512_and_si512(words, nibble);
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(codes, tables));
}

NYBBLE_ALWAYS_INLINE __m512 levels_from(const int8_t* levels) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(levels))));
}

NYBBLE_ALWAYS_INLINE __m512 levels_counting_from(int first) {
    const __m512i count = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_cvtepi32_ps(_mm512_add_epi32(count, _mm512_set1_epi32(first)));
}

// 16 bytes, whose low nibbles are the first 16 elements.
NYBBLE_ALWAYS_INLINE __m512i words_of_16(const uint8_t* packed) {
    const __m512i words = _mm512_cvtepu8_epi16(_mm256_broadcastsi128_si256(load_16(packed)));
    return _mm512_srlv_epi16(words, _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(4), 1));
}

// Blocks of 32 elements; scales (and minima) are converted for 16 blocks together.
template <int bytes, int packed, bool has_minimum>
NYBBLE_ALWAYS_INLINE void table_bf16(const uint8_t* block, uint16_t* out, int64_t n, __m512 levels) {
    alignas(64) float d[16];
    alignas(64) float m[16];
    for (int64_t left = n / 32; left > 0; left -= 16) {
        const __m512i words = left >= 16 ? Strided<bytes>::template load<true>(block, 16)
                                         : Strided<bytes>::template load<false>(block, left);
        _mm512_store_ps(d, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(words)));
        if (has_minimum)
            _mm512_store_ps(m, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(words, 16))));
        const int64_t count = left < 16 ? left : 16;
        for (int64_t i = 0; i < count; i += 2, block += 2 * bytes, out += 64) {
            __m512 first = _mm512_mul_ps(_mm512_set1_ps(d[i]), levels);
            __m512 second = _mm512_mul_ps(_mm512_set1_ps(d[i + 1]), levels);
            if (has_minimum) {
                first = _mm512_add_ps(first, _mm512_set1_ps(m[i]));
                second = _mm512_add_ps(second, _mm512_set1_ps(m[i + 1]));
            }
            const __m512i tables = two_tables(first, second);
            look_up(words_of_16(block + packed), tables, false, out);
            if (i + 1 < count) look_up(words_of_16(block + bytes + packed), tables, true, out + 32);
        }
    }
}

NYBBLE_NOINLINE void table_bf16_q4_0(const uint8_t* blocks, uint16_t* out, int64_t n) {
    table_bf16<18, 2, false>(blocks, out, n, levels_counting_from(-8));
}

NYBBLE_NOINLINE void table_bf16_q4_1(const uint8_t* blocks, uint16_t* out, int64_t n) {
    table_bf16<20, 4, true>(blocks, out, n, levels_counting_from(0));
}

NYBBLE_NOINLINE void table_bf16_iq4_nl(const uint8_t* blocks, uint16_t* out, int64_t n) {
    table_bf16<18, 2, false>(blocks, out, n, levels_from(grids::kvalues_iq4nl));
}

// Affine encodings: the scale's four bytes, or two, and perhaps a zero point or a float32 minimum after them.
template <int bytes, bool half_scale, bool has_zero_point, bool has_minimum = false>
NYBBLE_ALWAYS_INLINE void table_bf16_affine(const uint8_t* block, uint16_t* out, int64_t n) {
    constexpr int scale_bytes = half_scale ? 2 : 4;
    constexpr int packed = scale_bytes + (has_zero_point ? 1 : 0) + (has_minimum ? 4 : 0);
    const __m512 levels = levels_counting_from(has_zero_point || has_minimum ? 0 : -8);
    const auto table = [&](const uint8_t* p) {
        const __m512 scale = _mm512_set1_ps(half_scale ? hardware_f16(p) : read_f32(p));
        if (has_minimum) {
            return _mm512_add_ps(_mm512_mul_ps(scale, levels), _mm512_set1_ps(read_f32(p + scale_bytes)));
        }
        if (!has_zero_point) return _mm512_mul_ps(scale, levels);
        return _mm512_mul_ps(scale,
                             _mm512_sub_ps(levels, _mm512_set1_ps(static_cast<float>(p[scale_bytes]))));
    };
    for (; n >= 64; n -= 64, block += 2 * bytes, out += 64) {
        const __m512 first = table(block);
        const __m512 second = table(block + bytes);
        const __m512i tables = half_scale ? two_tables(first, second) : two_exact_tables(first, second);
        look_up(words_of_16(block + packed), tables, false, out);
        look_up(words_of_16(block + bytes + packed), tables, true, out + 32);
    }
    if (n > 0) {
        const __m512 only = table(block);
        const __m512i tables = half_scale ? two_tables(only, only) : two_exact_tables(only, only);
        look_up(words_of_16(block + packed), tables, false, out);
    }
}

NYBBLE_NOINLINE void table_bf16_int4_g32_f32(const uint8_t* blocks, uint16_t* out, int64_t n) {
    table_bf16_affine<20, false, false>(blocks, out, n);
}

NYBBLE_NOINLINE void table_bf16_int4_g32_f16_z(const uint8_t* blocks, uint16_t* out, int64_t n) {
    table_bf16_affine<19, true, true>(blocks, out, n);
}

NYBBLE_NOINLINE void table_bf16_int4_g32_f32_z(const uint8_t* blocks, uint16_t* out, int64_t n) {
    table_bf16_affine<21, false, true>(blocks, out, n);
}

NYBBLE_NOINLINE void table_bf16_int4_g32_f32_m(const uint8_t* blocks, uint16_t* out, int64_t n) {
    table_bf16_affine<24, false, false, true>(blocks, out, n);
}

NYBBLE_NOINLINE void table_bf16_q4_k(const uint8_t* block, uint16_t* out, int64_t n) {
    const __m512 levels = levels_counting_from(0);
    for (int64_t at = 0; at < n; at += 256, block += 144) {
        float s[8];
        float m[8];
        scales_q4k<false>(block, s, m);
        for (int h = 0; h < 4; ++h) {
            const __m512i codes = _mm512_cvtepu8_epi16(load_32(block + 16 + 32 * h));
            const __m512 low = _mm512_mul_ps(_mm512_set1_ps(s[2 * h]), levels);
            const __m512 high = _mm512_mul_ps(_mm512_set1_ps(s[2 * h + 1]), levels);
            const __m512i tables = two_tables(_mm512_add_ps(low, _mm512_set1_ps(m[2 * h])),
                                              _mm512_add_ps(high, _mm512_set1_ps(m[2 * h + 1])));
            look_up(codes, tables, false, out + at + 64 * h);
            look_up(_mm512_srli_epi16(codes, 4), tables, true, out + at + 64 * h + 32);
        }
    }
}

}  // namespace
}  // namespace nybble
