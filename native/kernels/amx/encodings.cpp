// Weight kernels for machines with AMX, which also have AVX512_BF16 and AVX512_VBMI.
#include "kernels/encoding_kernels.h"

#include <string.h>

namespace nybble {
namespace {

EncodingKernelTable make_table() {
    EncodingKernelTable table;
    memcpy(table.entries, encoding_kernels_avx512_vnni(), sizeof table.entries);
    return table;
}

}  // namespace

const EncodingKernels* encoding_kernels_amx() {
    static const EncodingKernelTable table = make_table();
    return table.entries;
}

}  // namespace nybble
