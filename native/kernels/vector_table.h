// Entries of a level's table from the vector dequantizations (avx2/dequantize.h), and the float
// products that are built on them.
#pragma once

#include "kernels/avx2/dequantize.h"
#include "kernels/linear_f32.h"

namespace nybble {
namespace {

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
    add_all_f32<Floats>(table);
    table[Encoding::f16].dequantize_f32 = widen_f16_hardware;
    table[Encoding::f16].linear_f32 = linear_f32<Floats, widen_f16_hardware, 1, 2>;
    for_each_vector_block([&](auto vector, Encoding encoding) {
        using Vector = decltype(vector);
        table[encoding].dequantize_f32 = dequantize_vector<Vector, Output>;
        table[encoding].linear_f32 = linear_f32<Floats, dequantize_vector<Vector, Output>, Vector::size, Vector::bytes>;
    });
}

}  // namespace
}  // namespace nybble
