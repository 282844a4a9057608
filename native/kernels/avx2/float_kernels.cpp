// The float kernels at the level avx2.
#include "kernels/avx2/vec.h"

#include "kernels/generic/float_kernels.inc.h"

namespace nybble {

const FloatKernels* float_kernels_avx2() {
    static constexpr FloatKernels table = make_table("avx2");
    return &table;
}

}  // namespace nybble
