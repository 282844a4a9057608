// Integer dot products with 256-bit registers, 32 weights at a time: an Output of dequantize.h that
// multiplies what it is given with the activations.
//
// `Dot` is how 32 products of an unsigned and a signed byte become 8 sums: dpbusd, or the pair of
// multiplications of AVX2. Weights are signed, so their sign moves to the activations: |w| and
// sign(w) * x. (Pairs of |w| <= 128 times |x| <= 127 do not overflow the 16 bits of AVX2.)
#pragma once

#include "kernels/avx2/dequantize.h"
#include "kernels/avx2/floats.h"
#include "kernels/dispatch.h"
#include "kernels/encoding_kernels.h"
#include "kernels/iq_blocks.h"

namespace nybble {
namespace {

template <typename Dot, int M>
struct DotOutput {
    const int8_t* values;  // row j is j * columns further, as in Int8Rows
    const float* scales;
    const float* x_sums;
    int64_t columns;
    __m256 sums[M];
    __m128 minima[M];  // lanes 0 and 1

    NYBBLE_ALWAYS_INLINE void put(__m256i q, float s, int64_t at) { multiply(q, _mm256_set1_ps(s), at); }
    NYBBLE_ALWAYS_INLINE void put(__m256i q, float s0, float s1, int64_t at) {
        multiply(q, _mm256_blend_ps(_mm256_set1_ps(s0), _mm256_set1_ps(s1), 0xf0), at);
    }
    NYBBLE_ALWAYS_INLINE void put_with_minimum(__m256i q, float s, float m, int64_t at) {
        put(q, s, at);
        add_minimum(_mm_set1_ps(m), at);
    }
    NYBBLE_ALWAYS_INLINE void put_with_minimum(__m256i q, float s0, float s1, float m0, float m1, int64_t at) {
        put(q, s0, s1, at);
        add_minimum(_mm_unpacklo_ps(_mm_set_ss(m0), _mm_set_ss(m1)), at);
    }
    NYBBLE_ALWAYS_INLINE float sum(int j) const {
        return sum_of(_mm256_add_ps(sums[j], _mm256_zextps128_ps256(minima[j])));
    }

private:
    NYBBLE_ALWAYS_INLINE void multiply(__m256i q, __m256 scale, int64_t at) {
        const __m256i magnitude = _mm256_abs_epi8(q);
        for (int j = 0; j < M; ++j) {
            const __m256i x = load_32(reinterpret_cast<const uint8_t*>(values + j * columns + at));
            const __m256 product = _mm256_cvtepi32_ps(Dot::dot(magnitude, _mm256_sign_epi8(x, q)));
            const __m256 x_scale = _mm256_broadcast_ss(scales + (j * columns + at) / 32);
            sums[j] = _mm256_fmadd_ps(product, _mm256_mul_ps(scale, x_scale), sums[j]);
        }
    }
    NYBBLE_ALWAYS_INLINE void add_minimum(__m128 minimum, int64_t at) {
        for (int j = 0; j < M; ++j) {
            const double* pair = reinterpret_cast<const double*>(x_sums + (j * columns + at) / 16);
            minima[j] = _mm_fmadd_ps(minimum, _mm_castpd_ps(_mm_load_sd(pair)), minima[j]);
        }
    }
};

// R rows side by side keep the additions of one row from waiting for each other.
template <typename Vector, typename Dot, int R, int M>
NYBBLE_ALWAYS_INLINE void linear_int8_rows(const uint8_t* weight, size_t stride, const Int8Rows& x, int64_t first,
                                           float* y, int64_t y_stride) {
    DotOutput<Dot, M> outputs[R];
    for (int r = 0; r < R; ++r) {
        outputs[r].values = x.values + first * x.columns;
        outputs[r].scales = x.scales + first * (x.columns / 32);
        outputs[r].x_sums = x.sums + first * (x.columns / 16);
        outputs[r].columns = x.columns;
        for (int j = 0; j < M; ++j) {
            outputs[r].sums[j] = _mm256_setzero_ps();
            outputs[r].minima[j] = _mm_setzero_ps();
        }
    }
    for (int64_t at = 0; at < x.columns; at += Vector::size, weight += Vector::bytes) {
        for (int r = 0; r < R; ++r) {
            const uint8_t* block = weight + static_cast<size_t>(r) * stride;
            for (int line = 0; line < Vector::bytes; line += 64) {
                _mm_prefetch(reinterpret_cast<const char*>(block + static_cast<size_t>(R) * stride + line), _MM_HINT_T0);
            }
            Vector::put(block, outputs[r], at);
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int j = 0; j < M; ++j) y[(first + j) * y_stride + r] = outputs[r].sum(j);
    }
}

template <typename Vector, typename Dot>
void linear_int8(const uint8_t* weight, size_t stride, int64_t rows, const Int8Rows& x, int64_t m, float* y,
                 int64_t y_stride) {
    for_activation_rows(m, [&](auto count, int64_t first) {
        constexpr int M = decltype(count)::value;
        constexpr int R = M <= 2 ? 2 : 1;
        int64_t r = 0;
        for (; r + R <= rows; r += R) {
            linear_int8_rows<Vector, Dot, R, M>(weight + static_cast<size_t>(r) * stride, stride, x, first, y + r,
                                                y_stride);
        }
        for (; r < rows; ++r) {
            linear_int8_rows<Vector, Dot, 1, M>(weight + static_cast<size_t>(r) * stride, stride, x, first, y + r,
                                                y_stride);
        }
    });
}

// Encodings without a vector unpacking of their own: the scalar one, then the same products.
template <typename Block>
struct ScalarUnpacking : Block {
    template <typename Output>
    static NYBBLE_ALWAYS_INLINE void put(const uint8_t* block, Output& output, int64_t at) {
        int8_t q[Block::size];
        float s[Block::size / 16];
        float m[Block::size / 16];
        Block::unpack(block, q, s, m);
        for (int i = 0; i < Block::size; i += 32) {
            output.put(load_32(reinterpret_cast<const uint8_t*>(q + i)), s[i / 16], s[i / 16 + 1], at + i);
        }
    }
};

template <typename Dot>
void add_linear_int8(EncodingKernelTable& table) {
    for_each_rare_block([&](auto block, Encoding encoding) {
        table[encoding].linear_int8 = linear_int8<ScalarUnpacking<decltype(block)>, Dot>;
    });
    for_each_vector_block([&](auto vector, Encoding encoding) {
        table[encoding].linear_int8 = linear_int8<decltype(vector), Dot>;
    });
}

}  // namespace
}  // namespace nybble
