// Sixteen blocks side by side in AVX-512 registers; see portable/lanes.h.
#pragma once

#include <cstdint>

#include "core/compiler.h"
#include "kernels/intrinsics.h"
#include "quantize/x86/transpose_bytes.h"

namespace nybble {
namespace {

struct Mask {
    __mmask16 m;
};

struct Lanes {
    static constexpr int N = 16;
    __m512 v;

    static NYBBLE_ALWAYS_INLINE Lanes set1(float x) { return {_mm512_set1_ps(x)}; }
    static NYBBLE_ALWAYS_INLINE Lanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
    static NYBBLE_ALWAYS_INLINE Lanes load_half(const uint16_t* p) {
        return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
    }
    NYBBLE_ALWAYS_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
    NYBBLE_ALWAYS_INLINE void store_half(uint16_t* p) const {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    }
    NYBBLE_ALWAYS_INLINE void store_byte(uint8_t* p) const {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
    }
    friend NYBBLE_ALWAYS_INLINE Lanes operator+(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
    friend NYBBLE_ALWAYS_INLINE Lanes operator-(Lanes a, Lanes b) { return {_mm512_sub_ps(a.v, b.v)}; }
    friend NYBBLE_ALWAYS_INLINE Lanes operator*(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
    friend NYBBLE_ALWAYS_INLINE Lanes operator/(Lanes a, Lanes b) { return {_mm512_div_ps(a.v, b.v)}; }
    static NYBBLE_ALWAYS_INLINE Lanes max(Lanes a, Lanes b) { return {_mm512_max_ps(a.v, b.v)}; }
    static NYBBLE_ALWAYS_INLINE Lanes min(Lanes a, Lanes b) { return {_mm512_min_ps(a.v, b.v)}; }
    static NYBBLE_ALWAYS_INLINE Lanes abs(Lanes a) { return {_mm512_abs_ps(a.v)}; }
    static NYBBLE_ALWAYS_INLINE Lanes max_magnitude(Lanes a, Lanes b) {
        return {
            _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(abs(a).v), _mm512_castps_si512(b.v)))};
    }
    static NYBBLE_ALWAYS_INLINE Lanes nearest(Lanes a) { return {_mm512_roundscale_ps(a.v, 0x08)}; }
    static NYBBLE_ALWAYS_INLINE Mask less(Lanes a, Lanes b) {
        return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)};
    }
    static NYBBLE_ALWAYS_INLINE Mask unordered(Lanes a) {
        return {_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q)};
    }
    static NYBBLE_ALWAYS_INLINE Lanes select(Mask m, Lanes a, Lanes b) {
        return {_mm512_mask_mov_ps(b.v, m.m, a.v)};
    }
    static NYBBLE_ALWAYS_INLINE bool any(Mask m) { return m.m != 0; }
    static NYBBLE_ALWAYS_INLINE Lanes power_of_two(Lanes a) {
        return {_mm512_and_ps(a.v, _mm512_castsi512_ps(_mm512_set1_epi32(0x7f800000)))};
    }
    static NYBBLE_ALWAYS_INLINE Lanes lookup(const float* table, Lanes index) {
        return {_mm512_i32gather_ps(_mm512_cvtps_epi32(index.v), table, 4)};
    }
    static NYBBLE_ALWAYS_INLINE Lanes lookup16(const float* table, Lanes index) {
        return {_mm512_permutexvar_ps(_mm512_cvtps_epi32(index.v), _mm512_loadu_ps(table))};
    }
    static NYBBLE_ALWAYS_INLINE Lanes lookup32(const float* table, Lanes index) {
        return {_mm512_permutex2var_ps(_mm512_loadu_ps(table), _mm512_cvtps_epi32(index.v),
                                       _mm512_loadu_ps(table + 16))};
    }
    static NYBBLE_ALWAYS_INLINE Lanes gather(const float* table, Lanes index) {
        const __m512i row = _mm512_slli_epi32(_mm512_cvtps_epi32(index.v), 4);
        const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        return {_mm512_i32gather_ps(_mm512_add_epi32(row, lane), table, 4)};
    }
    static void transpose(const float* const* rows, int n, float* out) {
        for (int i = 0; i < n; i += 16) {
            __m512 q[16];
            for (int k = 0; k < 4; ++k) {
                const __m512 r0 = _mm512_loadu_ps(rows[4 * k] + i);
                const __m512 r1 = _mm512_loadu_ps(rows[4 * k + 1] + i);
                const __m512 r2 = _mm512_loadu_ps(rows[4 * k + 2] + i);
                const __m512 r3 = _mm512_loadu_ps(rows[4 * k + 3] + i);
                const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(r0, r1));
                const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(r0, r1));
                const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(r2, r3));
                const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(r2, r3));
                q[4 * k] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
                q[4 * k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
                q[4 * k + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
                q[4 * k + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
            }
            // q[4 k + e] holds, in part m of 128 bits, elements 4 m + e of rows 4 k to 4 k + 3.
            for (int e = 0; e < 4; ++e) {
                const __m512 even = _mm512_shuffle_f32x4(q[e], q[4 + e], 0x88);
                const __m512 odd = _mm512_shuffle_f32x4(q[e], q[4 + e], 0xdd);
                const __m512 even2 = _mm512_shuffle_f32x4(q[8 + e], q[12 + e], 0x88);
                const __m512 odd2 = _mm512_shuffle_f32x4(q[8 + e], q[12 + e], 0xdd);
                float* to = out + (i + e) * N;
                _mm512_storeu_ps(to, _mm512_shuffle_f32x4(even, even2, 0x88));
                _mm512_storeu_ps(to + 4 * N, _mm512_shuffle_f32x4(odd, odd2, 0x88));
                _mm512_storeu_ps(to + 8 * N, _mm512_shuffle_f32x4(even, even2, 0xdd));
                _mm512_storeu_ps(to + 12 * N, _mm512_shuffle_f32x4(odd, odd2, 0xdd));
            }
        }
    }
    static void transpose_bytes(const uint8_t* bytes, int n, uint8_t* const* out) {
        transpose_byte_rows<N>(bytes, n, out,
                               [](const __m128i* p) NYBBLE_LAMBDA_INLINE { return _mm_loadu_si128(p); });
    }
};

}  // namespace
}  // namespace nybble
