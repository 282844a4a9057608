// From a level to its table.
#include "kernels/encoding_kernels.h"

namespace nybble {

const EncodingKernels* encoding_kernels(Isa isa) {
    switch (isa) {
#if NYBBLE_X86
        case Isa::avx2: return encoding_kernels_avx2();
        case Isa::avx_vnni: return encoding_kernels_avx_vnni();
        case Isa::avx512: return encoding_kernels_avx512();
        case Isa::avx512_vnni: return encoding_kernels_avx512_vnni();
        case Isa::amx: return encoding_kernels_amx();
#endif
        default: return encoding_kernels_portable();
    }
}

}  // namespace nybble
