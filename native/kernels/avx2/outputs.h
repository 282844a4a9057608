// Outputs of dequantize.h for AVX2: 8 floats at a time.
#pragma once

#include "kernels/avx2/dequantize.h"

namespace nybble {
namespace {

NYBBLE_ALWAYS_INLINE __m256 floats_of_bytes(__m128i bytes) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}

// 16 floats, rounded to nearest even in integer arithmetic; NaN stays NaN.
NYBBLE_ALWAYS_INLINE __m256i rounded_word(__m256 v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(sum, quiet, is_nan), 16);
}

NYBBLE_ALWAYS_INLINE void store_bf16(uint16_t* out, __m256 low, __m256 high) {
    const __m256i packed = _mm256_packus_epi32(rounded_word(low), rounded_word(high));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permute4x64_epi64(packed, 0xd8));
}

struct Avx2OutputF32 {
    using Element = float;
    static NYBBLE_ALWAYS_INLINE void store(float* out, __m256 low, __m256 high) {
        _mm256_storeu_ps(out, low);
        _mm256_storeu_ps(out + 8, high);
    }
};

struct Avx2OutputBf16 {
    using Element = uint16_t;
    static NYBBLE_ALWAYS_INLINE void store(uint16_t* out, __m256 low, __m256 high) {
        store_bf16(out, low, high);
    }
};

template <typename Store>
struct Avx2Output {
    using Element = typename Store::Element;
    Element* out;

    NYBBLE_ALWAYS_INLINE void put(__m256i q, float s, int64_t at) { put(q, s, s, at); }
    NYBBLE_ALWAYS_INLINE void put_with_minimum(__m256i q, float s, float m, int64_t at) {
        put_with_minimum(q, s, s, m, m, at);
    }
    NYBBLE_ALWAYS_INLINE void put(__m256i q, float s0, float s1, int64_t at) {
        half(_mm256_castsi256_si128(q), _mm256_set1_ps(s0), out + at);
        half(_mm256_extracti128_si256(q, 1), _mm256_set1_ps(s1), out + at + 16);
    }
    NYBBLE_ALWAYS_INLINE void put_with_minimum(__m256i q, float s0, float s1, float m0, float m1,
                                               int64_t at) {
        half(_mm256_castsi256_si128(q), _mm256_set1_ps(s0), _mm256_set1_ps(m0), out + at);
        half(_mm256_extracti128_si256(q, 1), _mm256_set1_ps(s1), _mm256_set1_ps(m1), out + at + 16);
    }
    static NYBBLE_ALWAYS_INLINE void round(const float* p, uint16_t* to) {
        store_bf16(to, _mm256_loadu_ps(p), _mm256_loadu_ps(p + 8));
        store_bf16(to + 16, _mm256_loadu_ps(p + 16), _mm256_loadu_ps(p + 24));
    }

   private:
    static NYBBLE_ALWAYS_INLINE void half(__m128i q, __m256 s, Element* to) {
        Store::store(to, _mm256_mul_ps(s, floats_of_bytes(q)),
                     _mm256_mul_ps(s, floats_of_bytes(_mm_srli_si128(q, 8))));
    }
    static NYBBLE_ALWAYS_INLINE void half(__m128i q, __m256 s, __m256 m, Element* to) {
        Store::store(to, _mm256_add_ps(_mm256_mul_ps(s, floats_of_bytes(q)), m),
                     _mm256_add_ps(_mm256_mul_ps(s, floats_of_bytes(_mm_srli_si128(q, 8))), m));
    }
};

}  // namespace
}  // namespace nybble
