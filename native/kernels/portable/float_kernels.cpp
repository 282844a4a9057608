// The float kernels at the level portable.
#include "kernels/portable/vec.h"

#include "kernels/generic/float_kernels.inc.h"

namespace nybble {

const FloatKernels* float_kernels_portable() {
    static constexpr FloatKernels table = make_table("portable");
    return &table;
}

}  // namespace nybble
