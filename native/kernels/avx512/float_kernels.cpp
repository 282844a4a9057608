// The float kernels at the level avx512.
#include "kernels/avx512/vec.h"

#include "kernels/generic/float_kernels.inc.h"

namespace nybble {

const FloatKernels* float_kernels_avx512() {
    static constexpr FloatKernels table = make_table("avx512");
    return &table;
}

}  // namespace nybble
