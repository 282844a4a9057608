// Weight kernels for AVX-512 F, BW, DQ and VL.
#include "kernels/avx512/floats.h"
#include "kernels/avx512/outputs.h"
#include "kernels/encoding_kernels.h"
#include "kernels/vector_table.h"

namespace nybble {
namespace {

EncodingKernelTable make_table() {
    EncodingKernelTable table;
    memcpy(table.entries, encoding_kernels_avx2(), sizeof table.entries);
    add_vector_f32<Avx512Floats, Avx512Output<Avx512StoreF32>>(table);
    add_vector_bf16<Avx512Output<Avx512StoreBf16>>(table);
    return table;
}

}  // namespace

const EncodingKernels* encoding_kernels_avx512() {
    static const EncodingKernelTable table = make_table();
    return table.entries;
}

}  // namespace nybble
