// Integer dot products with activations of 16 bits, in 256-bit registers.
//
// The two planes of the activations become int16 once for many weight rows; weights are widened and
// multiplied by `Dot::words`: madd_epi16 and an addition, or dpwssd twice.
//
// x = 256 * high + low with a signed low byte. As bits that is the pair of bytes (low, high - 1) where
// low is negative and (low, high) elsewhere; high - 1 >= -128 because high >= -127.
#pragma once

#include "kernels/avx2/dot_output.h"
#include "kernels/dispatch.h"
#include "kernels/encoding_kernels.h"

namespace nybble {
namespace {

// Whether |w| <= 64. Then a weight is widened by unpacking it above a zero byte, and the products are
// 256 times too large, which the scales take back: a lane adds four products, 4 * 64 * 256 * 32640
// < 2^31. Larger weights are shifted down after that: 4 * 128 * 32640 < 2^31.
template <typename Vector>
constexpr bool small_weights = false;
template <>
constexpr bool small_weights<VectorQ4_0> = true;
template <>
constexpr bool small_weights<VectorQ4_1> = true;
template <>
constexpr bool small_weights<VectorQ5_0> = true;
template <>
constexpr bool small_weights<VectorQ5_1> = true;
template <>
constexpr bool small_weights<VectorQ2K> = true;
template <>
constexpr bool small_weights<VectorQ3K> = true;
template <>
constexpr bool small_weights<VectorQ4K> = true;
template <>
constexpr bool small_weights<VectorQ5K> = true;
template <>
constexpr bool small_weights<VectorQ6K> = true;
template <>
constexpr bool small_weights<VectorMXFP4> = true;
template <>
constexpr bool small_weights<VectorInt4F32> = true;
template <>
constexpr bool small_weights<VectorInt4F16Z> = true;
template <>
constexpr bool small_weights<VectorInt4F32Z> = true;
template <>
constexpr bool small_weights<VectorInt4F32M> = true;

// 32 activations, their values in the order of unpacked bytes: 0-7, 16-23, 8-15, 24-31.
struct alignas(32) WideBlock {
    int16_t values[32];
    float scale;
    float sums[2];
};

// A range of columns of M activation rows.
template <int M>
struct WideRows {
    static constexpr int64_t columns = 3072 / M / 256 * 256;  // whole blocks of any encoding, 9 KB in all
    WideBlock blocks[M][columns / 32];

    // `count` columns from column `begin` of activation row `first` on.
    NYBBLE_ALWAYS_INLINE void fill(const Int8Rows& x, int64_t first, int64_t begin, int64_t count,
                                   float factor) {
        for (int j = 0; j < M; ++j) {
            const int64_t at = (first + j) * x.columns + begin;
            for (int64_t i = 0; i < count; i += 32) {
                const __m256i low = load_32(reinterpret_cast<const uint8_t*>(x.values + at + i));
                const __m256i high = load_32(reinterpret_cast<const uint8_t*>(x.high + at + i));
                const __m256i floor = _mm256_add_epi8(high, _mm256_cmpgt_epi8(_mm256_setzero_si256(), low));
                WideBlock& block = blocks[j][i / 32];
                _mm256_store_si256(reinterpret_cast<__m256i*>(block.values),
                                   _mm256_unpacklo_epi8(low, floor));
                _mm256_store_si256(reinterpret_cast<__m256i*>(block.values + 16),
                                   _mm256_unpackhi_epi8(low, floor));
                block.scale = factor * x.scales[(at + i) / 32];
                memcpy(block.sums, x.sums + (at + i) / 16, sizeof block.sums);
            }
        }
    }

    // The block of column `i`. Written as a multiple of i, so that offsets of the columns of a
    // super-block are constants to the compiler.
    NYBBLE_ALWAYS_INLINE const WideBlock* block(int j, int64_t i) const {
        static_assert(sizeof(WideBlock) == 3 * 32);
        return reinterpret_cast<const WideBlock*>(reinterpret_cast<const uint8_t*>(blocks[j]) + 3 * i);
    }
};

template <typename Dot, bool small, int M>
struct Int16Products {
    const WideRows<M>* x;

    struct Weights {
        __m256i low;
        __m256i high;
    };
    static NYBBLE_ALWAYS_INLINE Weights prepare(__m256i q) {
        const __m256i zero = _mm256_setzero_si256();
        const Weights shifted = {_mm256_unpacklo_epi8(zero, q), _mm256_unpackhi_epi8(zero, q)};
        if (small) return shifted;
        return {_mm256_srai_epi16(shifted.low, 8), _mm256_srai_epi16(shifted.high, 8)};
    }
    NYBBLE_ALWAYS_INLINE __m256i multiply(const Weights& weights, int j, int64_t at) const {
        const __m256i* values = reinterpret_cast<const __m256i*>(x->block(j, at)->values);
        return Dot::words(weights.low, _mm256_load_si256(values), weights.high,
                          _mm256_load_si256(values + 1));
    }
    NYBBLE_ALWAYS_INLINE __m256 scale(int j, int64_t at) const {
        return _mm256_broadcast_ss(&x->block(j, at)->scale);
    }
    NYBBLE_ALWAYS_INLINE __m128 half_sums(int j, int64_t at) const {
        return load_pair(x->block(j, at)->sums);
    }
};

// Weight rows that share the activations of a WideRows.
constexpr int64_t rows_of_a_tile = 16;

// What the rows of a tile have so far, for M activation rows.
template <int M>
struct TileSums {
    __m256 sums[rows_of_a_tile][M];
    __m128 minima[rows_of_a_tile][M];
};

// Adds the next `columns` elements of R weight rows, from `row` of the tile on. (Element by element
// into the outputs and back: that lets the compiler hold them in registers.)
template <typename Vector, typename Dot, int R, int M>
NYBBLE_ALWAYS_INLINE void linear_int16_rows(const uint8_t* weight, size_t stride, int64_t columns,
                                            const WideRows<M>& wide, int64_t row, TileSums<M>& totals) {
    DotOutput<Int16Products<Dot, small_weights<Vector>, M>, M> outputs[R];
    for (int r = 0; r < R; ++r) {
        outputs[r].products.x = &wide;
        for (int j = 0; j < M; ++j) {
            outputs[r].sums[j] = totals.sums[row + r][j];
            outputs[r].minima[j] = totals.minima[row + r][j];
        }
    }
    put_rows<Vector>(weight + static_cast<size_t>(row) * stride, stride, columns, outputs);
    for (int r = 0; r < R; ++r) {
        for (int j = 0; j < M; ++j) {
            totals.sums[row + r][j] = outputs[r].sums[j];
            totals.minima[row + r][j] = outputs[r].minima[j];
        }
    }
}

template <typename Vector, typename Dot, int M>
NYBBLE_ALWAYS_INLINE void linear_int16_tile(const uint8_t* weight, size_t stride, int64_t rows,
                                            const Int8Rows& x, int64_t first, float* y, int64_t y_stride) {
    constexpr int R = M <= 2 ? 2 : 1;
    WideRows<M> wide;
    TileSums<M> totals;
    for (int64_t r = 0; r < rows; ++r) {
        for (int j = 0; j < M; ++j) {
            totals.sums[r][j] = _mm256_setzero_ps();
            totals.minima[r][j] = _mm_setzero_ps();
        }
    }
    for (int64_t begin = 0; begin < x.columns; begin += wide.columns) {
        const int64_t count = x.columns - begin < wide.columns ? x.columns - begin : wide.columns;
        wide.fill(x, first, begin, count, small_weights<Vector> ? 1.0f / 256.0f : 1.0f);
        const uint8_t* blocks = weight + begin / Vector::size * Vector::bytes;
        int64_t r = 0;
        for (; r + R <= rows; r += R) {
            linear_int16_rows<Vector, Dot, R>(blocks, stride, count, wide, r, totals);
        }
        for (; r < rows; ++r) {
            linear_int16_rows<Vector, Dot, 1>(blocks, stride, count, wide, r, totals);
        }
    }
    for (int64_t r = 0; r < rows; ++r) {
        for (int j = 0; j < M; ++j) {
            y[(first + j) * y_stride + r] = total_of(totals.sums[r][j], totals.minima[r][j]);
        }
    }
}

template <typename Vector, typename Dot>
void linear_int16(const uint8_t* weight, size_t stride, int64_t rows, const Int8Rows& x, int64_t m, float* y,
                  int64_t y_stride) {
    for_activation_rows(m, [&](auto count, int64_t first) {
        for (int64_t r = 0; r < rows; r += rows_of_a_tile) {
            const int64_t tile = rows - r < rows_of_a_tile ? rows - r : rows_of_a_tile;
            linear_int16_tile<Vector, Dot, decltype(count)::value>(weight + static_cast<size_t>(r) * stride,
                                                                   stride, tile, x, first, y + r, y_stride);
        }
    });
}

template <typename Dot>
void add_linear_int16(EncodingKernelTable& table) {
    for_each_dot_block([&](auto vector, Encoding encoding) {
        table[encoding].linear_int16 = linear_int16<decltype(vector), Dot>;
    });
}

}  // namespace
}  // namespace nybble
