// Eight floats in an AVX2 register.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "core/compiler.h"
#include "kernels/generic/half.h"

namespace nybble {
namespace {

struct Vec {
    static constexpr int N = 8;
    static constexpr int kRows = 2;
    __m256 v;

    static NYBBLE_ALWAYS_INLINE Vec set1(float x) { return {_mm256_set1_ps(x)}; }
    static NYBBLE_ALWAYS_INLINE Vec zero() { return {_mm256_setzero_ps()}; }
    static NYBBLE_ALWAYS_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
    static NYBBLE_ALWAYS_INLINE Vec load_f16(const uint16_t* p) {
        return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
    }
    static NYBBLE_ALWAYS_INLINE Vec load_bf16(const uint16_t* p) {
        const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
    }
    static NYBBLE_ALWAYS_INLINE Vec load_i8(const int8_t* p) {
        return {
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
    }
    static NYBBLE_ALWAYS_INLINE Vec load_low_nibbles(const uint8_t* p) {
        const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
        return {_mm256_cvtepi32_ps(_mm256_and_si256(wide, _mm256_set1_epi32(15)))};
    }
    static NYBBLE_ALWAYS_INLINE Vec load_high_nibbles(const uint8_t* p) {
        const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
        return {_mm256_cvtepi32_ps(_mm256_srli_epi32(wide, 4))};
    }
    NYBBLE_ALWAYS_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
    NYBBLE_ALWAYS_INLINE void store_f16(uint16_t* p) const {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    }
    NYBBLE_ALWAYS_INLINE void store_bf16(uint16_t* p) const {
        const __m256i bits = _mm256_castps_si256(v);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        __m256i rounded =
            _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
        const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
        rounded = _mm256_blendv_epi8(rounded, quiet, nan);
        const __m128i packed =
            _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
    }
    NYBBLE_ALWAYS_INLINE void store_i8(int8_t* p) const {
        const __m256i ints = _mm256_cvtps_epi32(v);
        const __m128i words =
            _mm_packs_epi32(_mm256_castsi256_si128(ints), _mm256_extracti128_si256(ints, 1));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
    }
    friend NYBBLE_ALWAYS_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
    friend NYBBLE_ALWAYS_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
    friend NYBBLE_ALWAYS_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
    friend NYBBLE_ALWAYS_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
    static NYBBLE_ALWAYS_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
    static NYBBLE_ALWAYS_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
    static NYBBLE_ALWAYS_INLINE Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
    static NYBBLE_ALWAYS_INLINE Vec abs(Vec a) {
        return {_mm256_and_ps(a.v, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff)))};
    }
    static NYBBLE_ALWAYS_INLINE Vec round(Vec a) {
        return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
    }
    static NYBBLE_ALWAYS_INLINE Vec ldexp(Vec a, Vec n) {
        const __m256i exponent =
            _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23);
        return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(exponent))};
    }
    static NYBBLE_ALWAYS_INLINE Vec zero_below(Vec x, Vec limit, Vec value) {
        return {_mm256_andnot_ps(_mm256_cmp_ps(x.v, limit.v, _CMP_LT_OQ), value.v)};
    }
    static NYBBLE_ALWAYS_INLINE Vec swap_pairs(Vec a) { return {_mm256_permute_ps(a.v, 0xb1)}; }
    static NYBBLE_ALWAYS_INLINE float reduce_add(Vec a) {
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }
    static NYBBLE_ALWAYS_INLINE float reduce_max(Vec a) {
        const __m128 four = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
        const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
    }
};

}  // namespace
}  // namespace nybble
