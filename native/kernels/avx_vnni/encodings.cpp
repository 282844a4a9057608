// Weight kernels for AVX-VNNI (256-bit registers with dpbusd).
#include "kernels/encoding_kernels.h"

#include <string.h>

namespace nybble {
namespace {

EncodingKernelTable make_table() {
    EncodingKernelTable table;
    memcpy(table.entries, encoding_kernels_avx2(), sizeof table.entries);
    return table;
}

}  // namespace

const EncodingKernels* encoding_kernels_avx_vnni() {
    static const EncodingKernelTable table = make_table();
    return table.entries;
}

}  // namespace nybble
