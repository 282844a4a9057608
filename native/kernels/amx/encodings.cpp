// Weight kernels for machines with AMX, which also have AVX512_BF16: bfloat16 weights for the matrix
// multiplication are rounded by the conversion instruction.
//
// That instruction takes subnormal numbers for zero, so it serves only encodings whose elements are
// multiples of the smallest float16.
#include "kernels/amx/nibble_tables.h"
#include "kernels/avx512/outputs.h"
#include "kernels/encoding_kernels.h"

namespace nybble {
namespace {

struct AmxStoreBf16 {
    using Element = uint16_t;
    static NYBBLE_ALWAYS_INLINE void store(uint16_t* out, __m512 first, __m512 second) {
        const __m512bh both = _mm512_cvtne2ps_pbh(second, first);
        memcpy(out, &both, sizeof both);
    }
};

EncodingKernelTable make_table() {
    EncodingKernelTable table;
    memcpy(table.entries, encoding_kernels_avx512_vnni(), sizeof table.entries);
    for_each_vector_block([&](auto vector, Encoding encoding) {
        if (encoding == Encoding::mxfp4 || encoding == Encoding::int8_g32_f32 ||
            encoding == Encoding::int8_g32_f32_m) {
            return;
        }
        table[encoding].dequantize_bf16 = dequantize_vector<decltype(vector), Avx512Output<AmxStoreBf16>>;
    });
    table[Encoding::q4_0].dequantize_bf16 = table_bf16_q4_0;
    table[Encoding::q4_1].dequantize_bf16 = table_bf16_q4_1;
    table[Encoding::q4_k].dequantize_bf16 = table_bf16_q4_k;
    table[Encoding::iq4_nl].dequantize_bf16 = table_bf16_iq4_nl;
    table[Encoding::int4_g32_f32].dequantize_bf16 = table_bf16_int4_g32_f32;
    table[Encoding::int4_g32_f16_z].dequantize_bf16 = table_bf16_int4_g32_f16_z;
    table[Encoding::int4_g32_f32_z].dequantize_bf16 = table_bf16_int4_g32_f32_z;
    table[Encoding::int4_g32_f32_m].dequantize_bf16 = table_bf16_int4_g32_f32_m;
    return table;
}

}  // namespace

const EncodingKernels* encoding_kernels_amx() {
    static const EncodingKernelTable table = make_table();
    return table.entries;
}

}  // namespace nybble
