// Weight kernels for AVX-512 with VNNI: integer dot products, 64 weights an instruction.
#include "kernels/avx512_vnni/linear_nibbles.h"
#include "kernels/avx512_vnni/linear_q8.h"
#include "kernels/avx512_vnni/linear_super.h"
#include "kernels/encoding_kernels.h"

namespace nybble {
namespace {

template <typename Kernel>
void set(EncodingKernels& kernels) {
    kernels.linear_int8 = linear_planes<Kernel, 1>;
    kernels.linear_int16 = linear_planes<Kernel, 2>;
}

EncodingKernelTable make_table() {
    EncodingKernelTable table;
    memcpy(table.entries, encoding_kernels_avx512(), sizeof table.entries);
    set<NibbleKernel<NibblesQ4_0>>(table[Encoding::q4_0]);
    set<NibbleKernel<NibblesQ4_1>>(table[Encoding::q4_1]);
    set<NibbleKernel<NibblesQ5_0>>(table[Encoding::q5_0]);
    set<NibbleKernel<NibblesQ5_1>>(table[Encoding::q5_1]);
    set<ByteKernel<BytesQ8_0>>(table[Encoding::q8_0]);
    set<ByteKernel<BytesInt8F32>>(table[Encoding::int8_g32_f32]);
    set<NibbleKernel<NibblesInt4F32>>(table[Encoding::int4_g32_f32]);
    set<NibbleKernel<NibblesInt4F16Z>>(table[Encoding::int4_g32_f16_z]);
    set<NibbleKernel<NibblesInt4F32Z>>(table[Encoding::int4_g32_f32_z]);
    set<NibbleKernel<NibblesInt4F32M>>(table[Encoding::int4_g32_f32_m]);
    set<ByteKernel<BytesInt8F32M>>(table[Encoding::int8_g32_f32_m]);
    set<SuperKernel<SuperQ2K>>(table[Encoding::q2_k]);
    set<SuperKernel<SuperQ3K>>(table[Encoding::q3_k]);
    set<SuperKernel<SuperQ4K>>(table[Encoding::q4_k]);
    set<SuperKernel<SuperQ5K>>(table[Encoding::q5_k]);
    set<SuperKernel<SuperQ6K>>(table[Encoding::q6_k]);
    set<NibbleKernel<NibblesIQ4NL>>(table[Encoding::iq4_nl]);
    set<SuperKernel<SuperIQ4XS>>(table[Encoding::iq4_xs]);
    set<NibbleKernel<NibblesMXFP4>>(table[Encoding::mxfp4]);
    return table;
}

}  // namespace

const EncodingKernels* encoding_kernels_avx512_vnni() {
    static const EncodingKernelTable table = make_table();
    return table.entries;
}

}  // namespace nybble
