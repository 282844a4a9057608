// Weight kernels for AVX-512 with VNNI: integer dot products, 64 weights an instruction.
#include "kernels/avx512_vnni/linear_nibbles.h"
#include "kernels/avx512_vnni/linear_q8.h"
#include "kernels/avx512_vnni/linear_super.h"
#include "kernels/encoding_kernels.h"

namespace nybble {
namespace {

EncodingKernelTable make_table() {
    EncodingKernelTable table;
    memcpy(table.entries, encoding_kernels_avx512(), sizeof table.entries);
    table[Encoding::q4_0].linear_int8 = linear_int8<NibbleKernel<NibblesQ4_0>>;
    table[Encoding::q4_1].linear_int8 = linear_int8<NibbleKernel<NibblesQ4_1>>;
    table[Encoding::q5_0].linear_int8 = linear_int8<NibbleKernel<NibblesQ5_0>>;
    table[Encoding::q5_1].linear_int8 = linear_int8<NibbleKernel<NibblesQ5_1>>;
    table[Encoding::q8_0].linear_int8 = linear_int8<KernelQ8_0>;
    table[Encoding::q2_k].linear_int8 = linear_int8<SuperKernel<SuperQ2K>>;
    table[Encoding::q3_k].linear_int8 = linear_int8<SuperKernel<SuperQ3K>>;
    table[Encoding::q4_k].linear_int8 = linear_int8<SuperKernel<SuperQ4K>>;
    table[Encoding::q5_k].linear_int8 = linear_int8<SuperKernel<SuperQ5K>>;
    table[Encoding::q6_k].linear_int8 = linear_int8<SuperKernel<SuperQ6K>>;
    table[Encoding::iq4_nl].linear_int8 = linear_int8<NibbleKernel<NibblesIQ4NL>>;
    table[Encoding::iq4_xs].linear_int8 = linear_int8<SuperKernel<SuperIQ4XS>>;
    table[Encoding::mxfp4].linear_int8 = linear_int8<NibbleKernel<NibblesMXFP4>>;
    return table;
}

}  // namespace

const EncodingKernels* encoding_kernels_avx512_vnni() {
    static const EncodingKernelTable table = make_table();
    return table.entries;
}

}  // namespace nybble
