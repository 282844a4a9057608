// Integer dot products of the encodings with 32 weights of a byte in a block, q8_0, int8_g32_f32 and
// int8_g32_f32_m: two blocks (64 weights) a register.
//
// Signed weights are made unsigned by adding 128 (flipping the top bit); the product starts from -128
// times the sum of the activations, so it is exact. Weights beside a minimum are unsigned.
#pragma once

#include "kernels/avx512_vnni/rows.h"
#include "kernels/avx512_vnni/strided.h"

namespace nybble {
namespace {

struct BytesQ8_0 {
    static constexpr int bytes = 34, codes = 2;
    static constexpr bool is_signed = true, has_minimum = false;
    static NYBBLE_ALWAYS_INLINE __m512 scales(__m512i words) { return floats_from_low_f16(words); }
};

struct BytesInt8F32 {
    static constexpr int bytes = 36, codes = 4;
    static constexpr bool is_signed = false, has_minimum = false;
    static NYBBLE_ALWAYS_INLINE __m512 scales(__m512i words) { return _mm512_castsi512_ps(words); }
};

struct BytesInt8F32M {
    static constexpr int bytes = 40, codes = 8;
    static constexpr bool is_signed = false, has_minimum = true;
    static NYBBLE_ALWAYS_INLINE __m512 scales(__m512i words) { return _mm512_castsi512_ps(words); }
};

// `Format` gives: bytes of a block, `codes` = where its weights start, whether they are signed, whether
// there is a float32 minimum in the second word, and the scales of 16 blocks from their first words.
template <typename Format>
struct ByteKernel {
    static constexpr int bytes = Format::bytes;

    template <int R, int M, int P>
    static NYBBLE_ALWAYS_INLINE void accumulate(const uint8_t* weight, size_t stride, const Activations& x,
                                                __m512 (&sums)[R][M]) {
        const int64_t blocks = x.columns / 32;
        int64_t b = 0;
        for (; b + 16 <= blocks; b += 16) chunk<R, M, P, true>(weight, stride, x, b, 16, sums);
        if (b < blocks) chunk<R, M, P, false>(weight, stride, x, b, blocks - b, sums);
    }

   private:
    template <int R, int M, int P, bool all>
    static NYBBLE_ALWAYS_INLINE void chunk(const uint8_t* weight, size_t stride, const Activations& x,
                                           int64_t b, int64_t count, __m512 (&sums)[R][M]) {
        __m512 scales[R][M];
        __m512 x_scales[M];
        [[maybe_unused]] __m512 x_sums[M];
        const __mmask16 present = static_cast<__mmask16>(all ? 0xffff : (1 << count) - 1);
        for (int j = 0; j < M; ++j) {
            x_scales[j] = _mm512_maskz_loadu_ps(present, x.scales + j * (x.columns / 32) + b);
            if constexpr (Format::has_minimum) {
                x_sums[j] = block_sums<all>(x.sums + j * (x.columns / 16) + 2 * b, count);
            }
        }
        for (int r = 0; r < R; ++r) {
            const uint8_t* row = weight + static_cast<size_t>(r) * stride + b * bytes;
            const __m512 scale = Format::scales(Strided<bytes>::template load<all>(row, count));
            for (int j = 0; j < M; ++j) scales[r][j] = _mm512_mul_ps(scale, x_scales[j]);
            if constexpr (Format::has_minimum) {
                const __m512 minimum = _mm512_castsi512_ps(Strided<bytes, 4>::template load<all>(row, count));
                for (int j = 0; j < M; ++j) sums[r][j] = _mm512_fmadd_ps(minimum, x_sums[j], sums[r][j]);
            }
        }
        __m512i lanes = lanes_by_eight();
        for (int64_t g = 0; g < count; g += 2) {
            const uint8_t* blocks = weight + (b + g) * bytes;
            if (all || count - g >= 2) {
                two_blocks<R, M, P, true>(blocks, stride, x, 32 * (b + g), lanes, scales, sums);
            } else {
                two_blocks<R, M, P, false>(blocks, stride, x, 32 * (b + g), lanes, scales, sums);
            }
            lanes = _mm512_add_epi32(lanes, _mm512_set1_epi32(2));
        }
    }

    template <int R, int M, int P, bool all>
    static NYBBLE_ALWAYS_INLINE void two_blocks(const uint8_t* blocks, size_t stride, const Activations& x,
                                                int64_t column, __m512i lanes, const __m512 (&scales)[R][M],
                                                __m512 (&sums)[R][M]) {
        const __m512i top = _mm512_set1_epi8(static_cast<char>(0x80));
        __m512i v[M][P];
        __m512i start[M];
        for (int j = 0; j < M; ++j) {
            start[j] = _mm512_setzero_si512();
            for (int plane = P - 1; plane >= 0; --plane) {
                const int8_t* p = x.planes[plane] + j * x.columns + column;
                v[j][plane] = all ? _mm512_loadu_si512(p) : _mm512_zextsi256_si512(load_32(p));
                if (Format::has_minimum) continue;
                start[j] = _mm512_dpbusd_epi32(_mm512_slli_epi32(start[j], 8), top, v[j][plane]);
            }
            start[j] = _mm512_sub_epi32(_mm512_setzero_si512(), start[j]);
        }
        for (int r = 0; r < R; ++r) {
            const uint8_t* row = blocks + static_cast<size_t>(r) * stride;
            prefetch(row + prefetch_distance<R>(stride));
            const __m256i first = load_32(row + Format::codes);
            const __m512i both = all ? _mm512_inserti64x4(_mm512_castsi256_si512(first),
                                                          load_32(row + bytes + Format::codes), 1)
                                     : _mm512_zextsi256_si512(first);
            const __m512i w = Format::is_signed ? _mm512_xor_si512(both, top) : both;
            for (int j = 0; j < M; ++j) {
                __m512i product = _mm512_dpbusd_epi32(start[j], w, v[j][0]);
                if (P == 2) {
                    product =
                        join_planes(product, _mm512_dpbusd_epi32(_mm512_setzero_si512(), w, v[j][P - 1]));
                }
                sums[r][j] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(product),
                                             _mm512_permutexvar_ps(lanes, scales[r][j]), sums[r][j]);
            }
        }
    }

    static NYBBLE_ALWAYS_INLINE __m256i load_32(const void* p) {
        return _mm256_loadu_si256(static_cast<const __m256i*>(p));
    }
};

}  // namespace
}  // namespace nybble
