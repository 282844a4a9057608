// Rounding to affine encodings at the level portable, and the choice of the level.
#include "kernels/generic/quantize.inc.h"

namespace nybble {

bool quantize_groups_portable(const float* values, int64_t groups, const AffineFormat& format, float* scratch,
                              uint8_t* out) {
    return quantize_groups(values, groups, format, scratch, out);
}

QuantizeGroups quantize_groups_of(Isa isa) {
#if NYBBLE_X86
    if (isa != Isa::portable) return quantize_groups_avx2;
#endif
    static_cast<void>(isa);
    return quantize_groups_portable;
}

}  // namespace nybble
