// Weight kernels for AVX-VNNI (256-bit registers with dpbusd and dpwssd).
#include "kernels/avx2/linear_int16.h"
#include "kernels/avx2/linear_int8.h"
#include "kernels/encoding_kernels.h"

namespace nybble {
namespace {

struct DotAvxVnni {
    static NYBBLE_ALWAYS_INLINE __m256i bytes(__m256i u, __m256i s) {
        return _mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), u, s);
    }
    static NYBBLE_ALWAYS_INLINE __m256i words(__m256i a, __m256i x, __m256i b, __m256i y) {
        return _mm256_dpwssd_avx_epi32(_mm256_dpwssd_avx_epi32(_mm256_setzero_si256(), a, x), b, y);
    }
};

EncodingKernelTable make_table() {
    EncodingKernelTable table;
    memcpy(table.entries, encoding_kernels_avx2(), sizeof table.entries);
    add_linear_int8<DotAvxVnni>(table);
    add_linear_int16<DotAvxVnni>(table);
    return table;
}

}  // namespace

const EncodingKernels* encoding_kernels_avx_vnni() {
    static const EncodingKernelTable table = make_table();
    return table.entries;
}

}  // namespace nybble
