// The kernels of one instruction set, as a table of functions; chosen once per process.
//
// Every kernel computes each output element in an order that depends only on the shapes, never on
// how rows are divided among threads: same seed, same text, whatever the thread count.
//
// kernels/<isa>/ holds one table per level. A translation unit there is compiled with that level's
// compiler flags, so it must not instantiate inline functions of the standard library that other
// units might link to: keep to intrinsics and functions with internal linkage.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/encoding.h"

namespace nybble {

// Activations quantized in blocks of 32 along the row. With 8 bits:
//
//   values  int8  [rows][columns]          x = scale * value, -127 <= value <= 127
//   scales  float [rows][columns / 32]
//   sums    float [rows][columns / 16]     scale * sum of the values of each half block
//
// With 16 bits there is a second plane of high bytes and the values are the low ones:
//
//   high    int8  [rows][columns]          x = scale * (256 * high + value),
//                                          -127 <= high <= 127, -128 <= value <= 127
//
// That costs a second product on the same unpacked weights and makes the error of the activations
// (half a step of a 32512th of the largest in the block) small beside that of the weights.
//
// `sums` turns a weight's constant offset or minimum into one multiply-add per half block.
// Rows are `columns`, `columns / 32` and `columns / 16` elements apart; values are 64-byte aligned.
struct Int8Rows {
    const int8_t* values;
    const float* scales;
    const float* sums;
    int64_t columns;  // multiple of 32
    const int8_t* high = nullptr;
};

// y[m][r] = dot(weight row r, x row m) for `rows` rows and `m` activation rows (1 <= m <= max_rows).
// Weight rows are `stride` bytes apart. y rows are `y_stride` floats apart.
using LinearInt8 = void (*)(const uint8_t* weight, size_t stride, int64_t rows, const Int8Rows& x, int64_t m,
                            float* y, int64_t y_stride);

// The same with float activations (rows `x_stride` floats apart) and any number of `columns` that is
// a multiple of the block size: the precise path, and the one for encodings without LinearInt8.
using LinearF32 = void (*)(const uint8_t* weight, size_t stride, int64_t rows, const float* x,
                           int64_t x_stride, int64_t columns, int64_t m, float* y, int64_t y_stride);

// out[i] = value of element i, for `n` elements (whole blocks).
using DequantizeF32 = void (*)(const uint8_t* blocks, float* out, int64_t n);

// The same, rounded to nearest even bfloat16. May be null (then f32 is rounded by the caller).
using DequantizeBf16 = void (*)(const uint8_t* blocks, uint16_t* out, int64_t n);

struct EncodingKernels {
    DequantizeF32 dequantize_f32 = nullptr;    // never null for a known encoding
    DequantizeBf16 dequantize_bf16 = nullptr;  // may be null
    LinearInt8 linear_int8 = nullptr;          // may be null: then f32 is used
    LinearInt8 linear_int16 = nullptr;         // the same with `high`; may be null
    LinearF32 linear_f32 = nullptr;            // never null for a known encoding
};

}  // namespace nybble
