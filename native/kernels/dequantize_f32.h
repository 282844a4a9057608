// Dequantization to float32 for every encoding, from the scalar descriptions of blocks; plain loops
// that the compiler vectorises with whatever instruction set the including unit is built for.
#pragma once

#include "kernels/blocks.h"
#include "kernels/iq_blocks.h"

namespace nybble {
namespace {

template <typename Block>
NYBBLE_ALWAYS_INLINE void dequantize_block(const uint8_t* block, float* out) {
    int8_t q[Block::size];
    float scale[Block::size / 16];
    float minimum[Block::size / 16];
    Block::unpack(block, q, scale, minimum);
    for (int g = 0; g < Block::size / 16; ++g) {
        for (int i = 16 * g; i < 16 * g + 16; ++i) {
            const float product = scale[g] * static_cast<float>(q[i]);
            out[i] = Block::has_minimum ? product + minimum[g] : product;
        }
    }
}

// Not inlined: it has many callers, and a call per tile costs nothing.
template <typename Block>
NYBBLE_NOINLINE void dequantize_blocks_f32(const uint8_t* blocks, float* out, int64_t n) {
    for (int64_t i = 0; i < n; i += Block::size, blocks += Block::bytes)
        dequantize_block<Block>(blocks, out + i);
}

void copy_f32(const uint8_t* values, float* out, int64_t n) {
    memcpy(out, values, static_cast<size_t>(n) * sizeof(float));
}

void widen_f16(const uint8_t* values, float* out, int64_t n) {
    for (int64_t i = 0; i < n; ++i) out[i] = float_from_f16(read_u16(values + 2 * i));
}

void widen_bf16(const uint8_t* values, float* out, int64_t n) {
    for (int64_t i = 0; i < n; ++i) out[i] = float_from_bf16(read_u16(values + 2 * i));
}

}  // namespace
}  // namespace nybble
