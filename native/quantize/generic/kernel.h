// Runs a type's `encode` over rows: cuts them into tiles and puts the blocks where they belong.
#pragma once

#include "kernels/generic/half.h"
#include "quantize/blocks.h"
#include "quantize/generic/tile.h"

namespace nybble {
namespace {

// The importance of a block's columns, brought to a largest value of 1 up to 2. Columns that say almost
// nothing still count a little, so that no sum is empty; where none says anything all count alike.
inline void block_weights(const float* importance, int size, float* w) {
    float largest = 0.0f;
    for (int i = 0; i < size; ++i) largest = importance[i] > largest ? importance[i] : largest;
    const float power = bits_to_float(float_to_bits(largest) & 0x7f800000U);
    if (!(power > 0.0f)) {
        for (int i = 0; i < size; ++i) w[i] = 1.0f;
        return;
    }
    const float factor = 1.0f / (power < 0x1p126f ? power : 0x1p126f);
    for (int i = 0; i < size; ++i) {
        const float scaled = importance[i] * factor;
        w[i] = scaled > 1e-6f ? scaled : 1e-6f;
    }
}

// values: `rows` rows of `columns`; out: their blocks, row after row.
template <class Type>
Quantized quantize_rows(const float* values, int64_t rows, int64_t columns, const float* importance,
                        uint8_t* out) {
    Tile<Type::size, Type::bytes> tile;
    alignas(64) float w[Type::size];
    const int64_t blocks = columns / Type::size;
    for (int64_t b = 0; b < blocks; ++b) {
        if (importance != nullptr) block_weights(importance + b * Type::size, Type::size, w);
        for (int64_t first = 0; first < rows; first += N) {
            const float* from[N];
            uint8_t* to[N];
            for (int lane = 0; lane < N; ++lane) {
                // Lanes beyond the last row do the last row again.
                const int64_t row = first + lane < rows ? first + lane : rows - 1;
                from[lane] = values + row * columns + b * Type::size;
                to[lane] = out + (row * blocks + b) * Type::bytes;
            }
            if (!tile.load(from)) return Quantized::not_finite;
            if (importance != nullptr) {
                Type::encode(tile, Weights<true>{w});
            } else {
                Type::encode(tile, Weights<false>{nullptr});
            }
            Lanes::transpose_bytes(tile.out, Type::bytes, to);
        }
    }
    return tile.fits ? Quantized::done : Quantized::scale_too_large;
}

}  // namespace
}  // namespace nybble
