// Rounding to affine encodings for AVX2 and up: the same code, wider registers.
#include "kernels/generic/quantize.inc.h"

namespace nybble {

bool quantize_groups_avx2(const float* values, int64_t groups, const AffineFormat& format, float* scratch,
                          uint8_t* out) {
    return quantize_groups(values, groups, format, scratch, out);
}

}  // namespace nybble
