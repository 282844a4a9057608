// Weight kernels for AVX-512 with VNNI.
#include "kernels/encoding_kernels.h"

#include <string.h>

namespace nybble {
namespace {

EncodingKernelTable make_table() {
    EncodingKernelTable table;
    memcpy(table.entries, encoding_kernels_avx512(), sizeof table.entries);
    return table;
}

}  // namespace

const EncodingKernels* encoding_kernels_avx512_vnni() {
    static const EncodingKernelTable table = make_table();
    return table.entries;
}

}  // namespace nybble
