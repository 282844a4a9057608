// Integer dot products with activations of 8 bits, in 256-bit registers.
//
// `Dot::bytes` is how 32 products of an unsigned and a signed byte become 8 sums: dpbusd, or the pair
// of multiplications of AVX2. Weights are signed, so their sign moves to the activations: |w| and
// sign(w) * x. (Pairs of |w| <= 128 times |x| <= 127 do not overflow the 16 bits of AVX2.)
#pragma once

#include "kernels/avx2/dot_output.h"
#include "kernels/dispatch.h"
#include "kernels/encoding_kernels.h"

namespace nybble {
namespace {

template <typename Dot>
struct Int8Products {
    const int8_t* values;  // row j is j * columns further, as in Int8Rows
    const float* scales;
    const float* sums;
    int64_t columns;

    struct Weights {
        __m256i q;
        __m256i magnitude;
    };
    static NYBBLE_ALWAYS_INLINE Weights prepare(__m256i q) { return {q, _mm256_abs_epi8(q)}; }
    NYBBLE_ALWAYS_INLINE __m256i multiply(const Weights& weights, int j, int64_t at) const {
        const __m256i x = load_32(reinterpret_cast<const uint8_t*>(values + j * columns + at));
        return Dot::bytes(weights.magnitude, _mm256_sign_epi8(x, weights.q));
    }
    NYBBLE_ALWAYS_INLINE __m256 scale(int j, int64_t at) const {
        return _mm256_broadcast_ss(scales + (j * columns + at) / 32);
    }
    NYBBLE_ALWAYS_INLINE __m128 half_sums(int j, int64_t at) const {
        return load_pair(sums + (j * columns + at) / 16);
    }
};

// R rows side by side keep the additions of one row from waiting for each other.
template <typename Vector, typename Dot, int R, int M>
NYBBLE_ALWAYS_INLINE void linear_int8_rows(const uint8_t* weight, size_t stride, const Int8Rows& x,
                                           int64_t first, float* y, int64_t y_stride) {
    DotOutput<Int8Products<Dot>, M> outputs[R];
    for (int r = 0; r < R; ++r) {
        outputs[r].products = {x.values + first * x.columns, x.scales + first * (x.columns / 32),
                               x.sums + first * (x.columns / 16), x.columns};
        for (int j = 0; j < M; ++j) {
            outputs[r].sums[j] = _mm256_setzero_ps();
            outputs[r].minima[j] = _mm_setzero_ps();
        }
    }
    put_rows<Vector>(weight, stride, x.columns, outputs);
    for (int r = 0; r < R; ++r) {
        for (int j = 0; j < M; ++j)
            y[(first + j) * y_stride + r] = total_of(outputs[r].sums[j], outputs[r].minima[j]);
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
            linear_int8_rows<Vector, Dot, R, M>(weight + static_cast<size_t>(r) * stride, stride, x, first,
                                                y + r, y_stride);
        }
        for (; r < rows; ++r) {
            linear_int8_rows<Vector, Dot, 1, M>(weight + static_cast<size_t>(r) * stride, stride, x, first,
                                                y + r, y_stride);
        }
    });
}

template <typename Dot>
void add_linear_int8(EncodingKernelTable& table) {
    for_each_dot_block([&](auto vector, Encoding encoding) {
        table[encoding].linear_int8 = linear_int8<decltype(vector), Dot>;
    });
}

}  // namespace
}  // namespace nybble
