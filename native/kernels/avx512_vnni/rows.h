// What the integer dot products of this level share: the loop over weight rows and activation rows.
//
// A Kernel accumulates R weight rows times M activation rows in R x M registers of 16 floats:
//
//   template <int R, int M, int P> static void accumulate(weight, stride, x, __m512 (&sums)[R][M])
//
// P is the number of planes of the activations: 1 for int8, 2 for 16 bits (low bytes, high bytes).
//
// Each (row, activation row) pair goes through the same operations for any R and M, so a result
// does not depend on how many of either are done together.
#pragma once

#include "kernels/avx512/floats.h"
#include "kernels/dispatch.h"
#include "kernels/kernels.h"

namespace nybble {
namespace {

// Activation rows from some row on: pointers as in Int8Rows.
struct Activations {
    const int8_t* planes[2];
    const float* scales;
    const float* sums;
    int64_t columns;
};

NYBBLE_ALWAYS_INLINE Activations from_row(const Int8Rows& x, int64_t row) {
    const int8_t* low = x.values + row * x.columns;
    return {{low, x.high != nullptr ? x.high + row * x.columns : low},
            x.scales + row * (x.columns / 32),
            x.sums + row * (x.columns / 16),
            x.columns};
}

// Sums over `count` blocks (16 if all) from those over half blocks; zeros after them.
template <bool all>
NYBBLE_ALWAYS_INLINE __m512 block_sums(const float* halves, int64_t count) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    const uint32_t present = all ? 0xffffffffu : static_cast<uint32_t>((uint64_t{1} << (2 * count)) - 1);
    const __m512 a = _mm512_maskz_loadu_ps(static_cast<__mmask16>(present), halves);
    const __m512 c = _mm512_maskz_loadu_ps(static_cast<__mmask16>(present >> 16), halves + 16);
    return _mm512_add_ps(_mm512_permutex2var_ps(a, even, c), _mm512_permutex2var_ps(a, odd, c));
}

// Into the L2 cache: it has more requests under way at a time than the L1 cache.
NYBBLE_ALWAYS_INLINE void prefetch(const uint8_t* p) {
    _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1);
}

// Bytes from a weight to the one to fetch meanwhile: that of a later group of R rows, kPrefetchBytes or
// more ahead, because short rows are done before memory answers.
constexpr size_t kPrefetchBytes = 4096;

template <int R>
NYBBLE_ALWAYS_INLINE size_t prefetch_distance(size_t stride) {
    const size_t group = static_cast<size_t>(R) * stride;
    return (kPrefetchBytes + group - 1) / group * group;
}

template <typename Kernel, int R, int M, int P>
NYBBLE_ALWAYS_INLINE void linear_rows(const uint8_t* weight, size_t stride, const Activations& x, float* y,
                                      int64_t y_stride) {
    __m512 sums[R][M];
    for (int r = 0; r < R; ++r) {
        for (int j = 0; j < M; ++j) sums[r][j] = _mm512_setzero_ps();
    }
    Kernel::template accumulate<R, M, P>(weight, stride, x, sums);
    for (int r = 0; r < R; ++r) {
        for (int j = 0; j < M; ++j) y[j * y_stride + r] = sum_of(sums[r][j]);
    }
}

template <typename Kernel, int P>
void linear_planes(const uint8_t* weight, size_t stride, int64_t rows, const Int8Rows& x, int64_t m, float* y,
                   int64_t y_stride) {
    for_activation_rows(m, [&](auto count, int64_t first) {
        constexpr int M = decltype(count)::value;
        constexpr int R = M * P <= 2 ? 4 : 2;  // at most 8 accumulators
        const Activations activations = from_row(x, first);
        float* out = y + first * y_stride;
        int64_t r = 0;
        for (; r + R <= rows; r += R) {
            linear_rows<Kernel, R, M, P>(weight + static_cast<size_t>(r) * stride, stride, activations,
                                         out + r, y_stride);
        }
        for (; r < rows; ++r) {
            linear_rows<Kernel, 1, M, P>(weight + static_cast<size_t>(r) * stride, stride, activations,
                                         out + r, y_stride);
        }
    });
}

// One plane's product added to the other's: low + 256 * high.
NYBBLE_ALWAYS_INLINE __m512i join_planes(__m512i low, __m512i high) {
    return _mm512_add_epi32(low, _mm512_slli_epi32(high, 8));
}

// The low (f16) halves of 16 words, as floats.
NYBBLE_ALWAYS_INLINE __m512 floats_from_low_f16(__m512i words) {
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(words));
}

// 0, 0, 0, 0, 1, 1, 1, 1, ...: with it a permutation spreads 4 scales over the 16 lanes of a product.
NYBBLE_ALWAYS_INLINE __m512i lanes_by_four() {
    return _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
}

NYBBLE_ALWAYS_INLINE __m512i lanes_by_eight() {
    return _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
}

}  // namespace
}  // namespace nybble
