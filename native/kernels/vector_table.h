// Entries of a level's table from the vector dequantizations (avx2/dequantize.h), and the float
// products that are built on them.
#pragma once

#include "kernels/avx2/dequantize.h"
#include "kernels/linear_f32.h"

namespace nybble {
namespace {

// Rounding to bfloat16 of 16-bit and 32-bit floats, for encodings without blocks.
template <typename Output>
NYBBLE_NOINLINE void round_f32(const uint8_t* values, uint16_t* out, int64_t n) {
    const float* p = reinterpret_cast<const float*>(values);
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) Output::round(p + i, out + i);
    for (; i < n; ++i) out[i] = bf16_from_float(float_from_bits(read_u32(values + 4 * i)));
}

template <typename Output>
NYBBLE_NOINLINE void round_f16(const uint8_t* values, uint16_t* out, int64_t n) {
    int64_t i = 0;
    float buffer[32];
    for (; i + 32 <= n; i += 32) {
        for (int k = 0; k < 32; k += 8)
            _mm256_storeu_ps(buffer + k, _mm256_cvtph_ps(load_16(values + 2 * (i + k))));
        Output::round(buffer, out + i);
    }
    for (; i < n; ++i) out[i] = bf16_from_float(float_from_f16(read_u16(values + 2 * i)));
}

NYBBLE_NOINLINE void copy_bf16(const uint8_t* values, uint16_t* out, int64_t n) {
    memcpy(out, values, static_cast<size_t>(n) * sizeof(uint16_t));
}

// Hardware conversion, eight at a time.
NYBBLE_NOINLINE void widen_f16_hardware(const uint8_t* values, float* out, int64_t n) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, _mm256_cvtph_ps(load_16(values + 2 * i)));
    for (; i < n; ++i) out[i] = float_from_f16(read_u16(values + 2 * i));
}

template <typename Output>
void add_vector_bf16(EncodingKernelTable& table) {
    table[Encoding::f32].dequantize_bf16 = round_f32<Output>;
    table[Encoding::f16].dequantize_bf16 = round_f16<Output>;
    table[Encoding::bf16].dequantize_bf16 = copy_bf16;
    for_each_vector_block([&](auto vector, Encoding encoding) {
        table[encoding].dequantize_bf16 = dequantize_vector<decltype(vector), Output>;
    });
}

template <typename Floats, typename Output>
void add_vector_f32(EncodingKernelTable& table) {
    add_plain_f32<Floats>(table);
    for_each_rare_block(
        [&](auto block, Encoding encoding) { add_block_f32<Floats, decltype(block)>(table[encoding]); });
    table[Encoding::f16].dequantize_f32 = widen_f16_hardware;
    table[Encoding::f16].linear_f32 = linear_f32<Floats, widen_f16_hardware, 1, 2>;
    for_each_vector_block([&](auto vector, Encoding encoding) {
        using Vector = decltype(vector);
        table[encoding].dequantize_f32 = dequantize_vector<Vector, Output>;
        table[encoding].linear_f32 =
            linear_f32<Floats, dequantize_vector<Vector, Output>, Vector::size, Vector::bytes>;
    });
}

}  // namespace
}  // namespace nybble
