// Sixteen floats in an AVX-512 register.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "core/compiler.h"
#include "kernels/generic/half.h"

namespace nybble {
namespace {

struct Vec {
    static constexpr int N = 16;
    static constexpr int kRows = 4;
    __m512 v;

    static NYBBLE_ALWAYS_INLINE Vec set1(float x) { return {_mm512_set1_ps(x)}; }
    static NYBBLE_ALWAYS_INLINE Vec zero() { return {_mm512_setzero_ps()}; }
    static NYBBLE_ALWAYS_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
    static NYBBLE_ALWAYS_INLINE Vec load_f16(const uint16_t* p) {
        return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
    }
    static NYBBLE_ALWAYS_INLINE Vec load_bf16(const uint16_t* p) {
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
        return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
    }
    static NYBBLE_ALWAYS_INLINE Vec load_i8(const int8_t* p) {
        return {
            _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
    }
    static NYBBLE_ALWAYS_INLINE Vec load_low_nibbles(const uint8_t* p) {
        const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        return {_mm512_cvtepi32_ps(_mm512_and_si512(wide, _mm512_set1_epi32(15)))};
    }
    static NYBBLE_ALWAYS_INLINE Vec load_high_nibbles(const uint8_t* p) {
        const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        return {_mm512_cvtepi32_ps(_mm512_srli_epi32(wide, 4))};
    }
    NYBBLE_ALWAYS_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
    NYBBLE_ALWAYS_INLINE void store_f16(uint16_t* p) const {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    }
    NYBBLE_ALWAYS_INLINE void store_bf16(uint16_t* p) const {
        const __m512i bits = _mm512_castps_si512(v);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i rounded =
            _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
        const __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
        const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                            _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, quiet)));
    }
    NYBBLE_ALWAYS_INLINE void store_i8(int8_t* p) const {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v)));
    }
    friend NYBBLE_ALWAYS_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
    friend NYBBLE_ALWAYS_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
    friend NYBBLE_ALWAYS_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
    friend NYBBLE_ALWAYS_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
    static NYBBLE_ALWAYS_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
    static NYBBLE_ALWAYS_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
    static NYBBLE_ALWAYS_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
    static NYBBLE_ALWAYS_INLINE Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
    static NYBBLE_ALWAYS_INLINE Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, 0x08)}; }
    static NYBBLE_ALWAYS_INLINE Vec ldexp(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
    static NYBBLE_ALWAYS_INLINE Vec zero_below(Vec x, Vec limit, Vec value) {
        return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, limit.v, _CMP_NLT_UQ), value.v)};
    }
    static NYBBLE_ALWAYS_INLINE Vec swap_pairs(Vec a) { return {_mm512_permute_ps(a.v, 0xb1)}; }
    static NYBBLE_ALWAYS_INLINE float reduce_add(Vec a) { return _mm512_reduce_add_ps(a.v); }
    static NYBBLE_ALWAYS_INLINE float reduce_max(Vec a) { return _mm512_reduce_max_ps(a.v); }
};

}  // namespace
}  // namespace nybble
