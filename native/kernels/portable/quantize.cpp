// Rounding to affine encodings at the level portable, and the choice of the level.
#include "kernels/generic/quantize.inc.h"

namespace nybble {

bool quantize_groups_portable(const GroupTask& task, const AffineFormat& format, StepSearch search,
                              float* scratch) {
    return quantize_groups(task, format, search, scratch);
}

QuantizeGroups quantize_groups_of(Isa isa) {
#if NYBBLE_X86
    if (isa != Isa::portable) return quantize_groups_avx2;
#endif
    static_cast<void>(isa);
    return quantize_groups_portable;
}

}  // namespace nybble
