// Matrix-vector products with float activations, for every encoding: a tile of a weight row is
// dequantized into a buffer that stays in the first-level cache, then multiplied with up to four
// activation rows.
//
// `Vector` gives the instruction set's floats: Register, width, zero(), load(p),
// multiply_add(a, b, c) = a * b + c, add(a, b) and sum(v).
#pragma once

#include "kernels/dequantize_f32.h"
#include "kernels/dispatch.h"
#include "kernels/encoding_kernels.h"

namespace nybble {
namespace {

constexpr int tile_columns = 512;

// Accumulates one tile: element i goes to lane i % width of accumulator (i / width) % 4, whatever M.
// `n` is padded with zeros to a multiple of 4 * width in `w`; x is read up to n only.
template <typename Vector, int M>
NYBBLE_ALWAYS_INLINE void accumulate_tile(const float* w, const float* x, int64_t x_stride, int64_t n,
                                          typename Vector::Register (*sums)[4]) {
    constexpr int step = 4 * Vector::width;
    int64_t i = 0;
    for (; i + step <= n; i += step) {
        for (int k = 0; k < 4; ++k) {
            const auto weight = Vector::load(w + i + k * Vector::width);
            for (int j = 0; j < M; ++j) {
                const auto value = Vector::load(x + j * x_stride + i + k * Vector::width);
                sums[j][k] = Vector::multiply_add(weight, value, sums[j][k]);
            }
        }
    }
    if (i == n) return;
    float padded_w[step] = {};
    float padded_x[step] = {};
    memcpy(padded_w, w + i, static_cast<size_t>(n - i) * sizeof(float));
    for (int j = 0; j < M; ++j) {
        memcpy(padded_x, x + j * x_stride + i, static_cast<size_t>(n - i) * sizeof(float));
        for (int k = 0; k < 4; ++k) {
            sums[j][k] = Vector::multiply_add(Vector::load(padded_w + k * Vector::width),
                                              Vector::load(padded_x + k * Vector::width), sums[j][k]);
        }
    }
}

template <typename Vector, DequantizeF32 dequantize, int block_size, int block_bytes, int M>
NYBBLE_ALWAYS_INLINE void linear_f32_rows(const uint8_t* weight, size_t stride, int64_t rows, const float* x,
                                          int64_t x_stride, int64_t columns, float* y, int64_t y_stride) {
    alignas(64) float tile[tile_columns];
    for (int64_t r = 0; r < rows; ++r) {
        const uint8_t* row = weight + static_cast<size_t>(r) * stride;
        typename Vector::Register sums[M][4];
        for (int j = 0; j < M; ++j) {
            for (int k = 0; k < 4; ++k) sums[j][k] = Vector::zero();
        }
        for (int64_t c = 0; c < columns; c += tile_columns) {
            const int64_t n = columns - c < tile_columns ? columns - c : tile_columns;
            dequantize(row + c / block_size * block_bytes, tile, n);
            accumulate_tile<Vector, M>(tile, x + c, x_stride, n, sums);
        }
        for (int j = 0; j < M; ++j) {
            y[j * y_stride + r] = Vector::sum(
                Vector::add(Vector::add(sums[j][0], sums[j][1]), Vector::add(sums[j][2], sums[j][3])));
        }
    }
}

template <typename Vector, DequantizeF32 dequantize, int block_size, int block_bytes>
void linear_f32(const uint8_t* weight, size_t stride, int64_t rows, const float* x, int64_t x_stride,
                int64_t columns, int64_t m, float* y, int64_t y_stride) {
    for_activation_rows(m, [&](auto count, int64_t first) {
        linear_f32_rows<Vector, dequantize, block_size, block_bytes, decltype(count)::value>(
            weight, stride, rows, x + first * x_stride, x_stride, columns, y + first * y_stride, y_stride);
    });
}

// -- entries of one level's table -----------------------------------------------------------------

template <typename Vector, typename Block>
void add_block_f32(EncodingKernels& entry) {
    entry.dequantize_f32 = dequantize_blocks_f32<Block>;
    entry.linear_f32 = linear_f32<Vector, dequantize_blocks_f32<Block>, Block::size, Block::bytes>;
}

template <typename Vector>
void add_plain_f32(EncodingKernelTable& table) {
    table[Encoding::f32].dequantize_f32 = copy_f32;
    table[Encoding::f16].dequantize_f32 = widen_f16;
    table[Encoding::bf16].dequantize_f32 = widen_bf16;
    table[Encoding::f32].linear_f32 = linear_f32<Vector, copy_f32, 1, 4>;
    table[Encoding::f16].linear_f32 = linear_f32<Vector, widen_f16, 1, 2>;
    table[Encoding::bf16].linear_f32 = linear_f32<Vector, widen_bf16, 1, 2>;
}

}  // namespace
}  // namespace nybble
