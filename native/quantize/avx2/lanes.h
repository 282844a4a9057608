// Eight blocks side by side in AVX2 registers; see portable/lanes.h.
#pragma once

#include <cstdint>

#include "core/compiler.h"
#include "kernels/intrinsics.h"
#include "quantize/x86/transpose_bytes.h"

namespace nybble {
namespace {

struct Mask {
    __m256 m;
};

struct Lanes {
    static constexpr int N = 8;
    __m256 v;

    static NYBBLE_ALWAYS_INLINE Lanes set1(float x) { return {_mm256_set1_ps(x)}; }
    static NYBBLE_ALWAYS_INLINE Lanes load(const float* p) { return {_mm256_loadu_ps(p)}; }
    static NYBBLE_ALWAYS_INLINE Lanes load_half(const uint16_t* p) {
        return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
    }
    NYBBLE_ALWAYS_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
    NYBBLE_ALWAYS_INLINE void store_half(uint16_t* p) const {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    }
    NYBBLE_ALWAYS_INLINE void store_byte(uint8_t* p) const {
        const __m256i ints = _mm256_cvtps_epi32(v);
        const __m128i words =
            _mm_packus_epi32(_mm256_castsi256_si128(ints), _mm256_extracti128_si256(ints, 1));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
    }
    friend NYBBLE_ALWAYS_INLINE Lanes operator+(Lanes a, Lanes b) { return {_mm256_add_ps(a.v, b.v)}; }
    friend NYBBLE_ALWAYS_INLINE Lanes operator-(Lanes a, Lanes b) { return {_mm256_sub_ps(a.v, b.v)}; }
    friend NYBBLE_ALWAYS_INLINE Lanes operator*(Lanes a, Lanes b) { return {_mm256_mul_ps(a.v, b.v)}; }
    friend NYBBLE_ALWAYS_INLINE Lanes operator/(Lanes a, Lanes b) { return {_mm256_div_ps(a.v, b.v)}; }
    static NYBBLE_ALWAYS_INLINE Lanes max(Lanes a, Lanes b) { return {_mm256_max_ps(a.v, b.v)}; }
    static NYBBLE_ALWAYS_INLINE Lanes min(Lanes a, Lanes b) { return {_mm256_min_ps(a.v, b.v)}; }
    static NYBBLE_ALWAYS_INLINE Lanes abs(Lanes a) {
        return {_mm256_and_ps(a.v, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff)))};
    }
    static NYBBLE_ALWAYS_INLINE Lanes max_magnitude(Lanes a, Lanes b) {
        return {
            _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(abs(a).v), _mm256_castps_si256(b.v)))};
    }
    static NYBBLE_ALWAYS_INLINE Lanes nearest(Lanes a) {
        return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
    }
    static NYBBLE_ALWAYS_INLINE Mask less(Lanes a, Lanes b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
    static NYBBLE_ALWAYS_INLINE Mask unordered(Lanes a) { return {_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q)}; }
    static NYBBLE_ALWAYS_INLINE Lanes select(Mask m, Lanes a, Lanes b) {
        return {_mm256_blendv_ps(b.v, a.v, m.m)};
    }
    static NYBBLE_ALWAYS_INLINE bool any(Mask m) { return _mm256_movemask_ps(m.m) != 0; }
    static NYBBLE_ALWAYS_INLINE Lanes power_of_two(Lanes a) {
        return {_mm256_and_ps(a.v, _mm256_castsi256_ps(_mm256_set1_epi32(0x7f800000)))};
    }
    static NYBBLE_ALWAYS_INLINE Lanes lookup(const float* table, Lanes index) {
        return {_mm256_i32gather_ps(table, _mm256_cvtps_epi32(index.v), 4)};
    }
    static NYBBLE_ALWAYS_INLINE Lanes lookup16(const float* table, Lanes index) {
        return lookup(table, index);
    }
    static NYBBLE_ALWAYS_INLINE Lanes lookup32(const float* table, Lanes index) {
        return lookup(table, index);
    }
    static NYBBLE_ALWAYS_INLINE Lanes gather(const float* table, Lanes index) {
        const __m256i row = _mm256_slli_epi32(_mm256_cvtps_epi32(index.v), 3);
        return {
            _mm256_i32gather_ps(table, _mm256_add_epi32(row, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)), 4)};
    }
    static void transpose(const float* const* rows, int n, float* out) {
        for (int i = 0; i < n; i += 8) {
            __m256 q[8];
            for (int k = 0; k < 2; ++k) {
                const __m256 r0 = _mm256_loadu_ps(rows[4 * k] + i);
                const __m256 r1 = _mm256_loadu_ps(rows[4 * k + 1] + i);
                const __m256 r2 = _mm256_loadu_ps(rows[4 * k + 2] + i);
                const __m256 r3 = _mm256_loadu_ps(rows[4 * k + 3] + i);
                const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(r0, r1));
                const __m256d b = _mm256_castps_pd(_mm256_unpackhi_ps(r0, r1));
                const __m256d c = _mm256_castps_pd(_mm256_unpacklo_ps(r2, r3));
                const __m256d d = _mm256_castps_pd(_mm256_unpackhi_ps(r2, r3));
                q[4 * k] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, c));
                q[4 * k + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, c));
                q[4 * k + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(b, d));
                q[4 * k + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(b, d));
            }
            for (int e = 0; e < 4; ++e) {
                _mm256_storeu_ps(out + (i + e) * N, _mm256_permute2f128_ps(q[e], q[4 + e], 0x20));
                _mm256_storeu_ps(out + (i + 4 + e) * N, _mm256_permute2f128_ps(q[e], q[4 + e], 0x31));
            }
        }
    }
    static void transpose_bytes(const uint8_t* bytes, int n, uint8_t* const* out) {
        transpose_byte_rows<N>(bytes, n, out,
                               [](const __m128i* p) NYBBLE_LAMBDA_INLINE { return _mm_loadl_epi64(p); });
    }
};

}  // namespace
}  // namespace nybble
