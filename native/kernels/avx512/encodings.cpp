// Weight kernels for AVX-512 F, BW, DQ and VL.
#include "kernels/encoding_kernels.h"
#include "kernels/avx512/floats.h"
#include "kernels/linear_f32.h"

namespace nybble {
namespace {

EncodingKernelTable make_table() {
    EncodingKernelTable table;
    memcpy(table.entries, encoding_kernels_avx2(), sizeof table.entries);
    add_all_f32<Avx512Floats>(table);
    return table;
}

}  // namespace

const EncodingKernels* encoding_kernels_avx512() {
    static const EncodingKernelTable table = make_table();
    return table.entries;
}

}  // namespace nybble
