// Outputs of avx2/dequantize.h for AVX-512: 16 floats at a time. `Store` writes 32 elements:
//
//   Store::Element, Store::store(out, first 16, last 16)
#pragma once

#include "kernels/avx2/dequantize.h"

namespace nybble {
namespace {

struct Avx512StoreF32 {
    using Element = float;
    static NYBBLE_ALWAYS_INLINE void store(float* out, __m512 first, __m512 second) {
        _mm512_storeu_ps(out, first);
        _mm512_storeu_ps(out + 16, second);
    }
};

// Rounded to nearest even in integer arithmetic; NaN stays NaN.
struct Avx512StoreBf16 {
    using Element = uint16_t;
    static NYBBLE_ALWAYS_INLINE void store(uint16_t* out, __m512 first, __m512 second) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), rounded(first));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16), rounded(second));
    }

   private:
    static NYBBLE_ALWAYS_INLINE __m256i rounded(__m512 v) {
        const __m512i bits = _mm512_castps_si512(v);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
        const __m512i chosen = _mm512_mask_mov_epi32(sum, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), quiet);
        return _mm512_cvtepi32_epi16(_mm512_srli_epi32(chosen, 16));
    }
};

template <typename Store>
struct Avx512Output {
    using Element = typename Store::Element;
    Element* out;

    NYBBLE_ALWAYS_INLINE void put(__m256i q, float s, int64_t at) { put(q, s, s, at); }
    NYBBLE_ALWAYS_INLINE void put_with_minimum(__m256i q, float s, float m, int64_t at) {
        put_with_minimum(q, s, s, m, m, at);
    }
    NYBBLE_ALWAYS_INLINE void put(__m256i q, float s0, float s1, int64_t at) {
        Store::store(out + at, _mm512_mul_ps(_mm512_set1_ps(s0), first_of(q)),
                     _mm512_mul_ps(_mm512_set1_ps(s1), second_of(q)));
    }
    NYBBLE_ALWAYS_INLINE void put_with_minimum(__m256i q, float s0, float s1, float m0, float m1,
                                               int64_t at) {
        Store::store(out + at,
                     _mm512_add_ps(_mm512_mul_ps(_mm512_set1_ps(s0), first_of(q)), _mm512_set1_ps(m0)),
                     _mm512_add_ps(_mm512_mul_ps(_mm512_set1_ps(s1), second_of(q)), _mm512_set1_ps(m1)));
    }
    static NYBBLE_ALWAYS_INLINE void round(const float* p, uint16_t* to) {
        Avx512StoreBf16::store(to, _mm512_loadu_ps(p), _mm512_loadu_ps(p + 16));
    }

   private:
    static NYBBLE_ALWAYS_INLINE __m512 first_of(__m256i q) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(q)));
    }
    static NYBBLE_ALWAYS_INLINE __m512 second_of(__m256i q) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(q, 1)));
    }
};

}  // namespace
}  // namespace nybble
