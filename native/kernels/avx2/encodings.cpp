// Weight kernels for AVX2 with FMA, F16C and BMI2.
#include "kernels/encoding_kernels.h"
#include "kernels/avx2/floats.h"
#include "kernels/avx2/outputs.h"
#include "kernels/vector_table.h"

namespace nybble {
namespace {

EncodingKernelTable make_table() {
    EncodingKernelTable table;
    memcpy(table.entries, encoding_kernels_portable(), sizeof table.entries);
    add_vector_f32<Avx2Floats, Avx2Output<Avx2OutputF32>>(table);
    add_vector_bf16<Avx2Output<Avx2OutputBf16>>(table);
    return table;
}

}  // namespace

const EncodingKernels* encoding_kernels_avx2() {
    static const EncodingKernelTable table = make_table();
    return table.entries;
}

}  // namespace nybble
