// Rounding to affine encodings for AVX2 and up: the same code, wider registers.
#include "kernels/generic/quantize.inc.h"

namespace nybble {

bool quantize_groups_avx2(const GroupTask& task, const AffineFormat& format, StepSearch search,
                          float* scratch) {
    return quantize_groups(task, format, search, scratch);
}

}  // namespace nybble
