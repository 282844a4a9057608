// From a level to its tables.
#include "kernels/encoding_kernels.h"

#include "kernels/float_kernels.h"

namespace nybble {

const EncodingKernels* encoding_kernels(Isa isa) {
    switch (isa) {
#if NYBBLE_X86
        case Isa::avx2:
            return encoding_kernels_avx2();
        case Isa::avx_vnni:
            return encoding_kernels_avx_vnni();
        case Isa::avx512:
            return encoding_kernels_avx512();
        case Isa::avx512_vnni:
            return encoding_kernels_avx512_vnni();
        case Isa::amx:
            return encoding_kernels_amx();
#endif
        default:
            return encoding_kernels_portable();
    }
}

const FloatKernels* float_kernels(Isa isa) {
#if NYBBLE_X86
    if (isa >= Isa::avx512) return float_kernels_avx512();
    if (isa >= Isa::avx2) return float_kernels_avx2();
#else
    (void)isa;
#endif
    return float_kernels_portable();
}

}  // namespace nybble
