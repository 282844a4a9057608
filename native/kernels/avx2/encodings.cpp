// Weight kernels for AVX2 with FMA, F16C and BMI2.
#include "kernels/avx2/floats.h"
#include "kernels/avx2/linear_int16.h"
#include "kernels/avx2/linear_int8.h"
#include "kernels/avx2/outputs.h"
#include "kernels/encoding_kernels.h"
#include "kernels/vector_table.h"

namespace nybble {
namespace {

struct DotAvx2 {
    static NYBBLE_ALWAYS_INLINE __m256i bytes(__m256i u, __m256i s) {
        return _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1));
    }
    static NYBBLE_ALWAYS_INLINE __m256i words(__m256i a, __m256i x, __m256i b, __m256i y) {
        return _mm256_add_epi32(_mm256_madd_epi16(a, x), _mm256_madd_epi16(b, y));
    }
};

EncodingKernelTable make_table() {
    EncodingKernelTable table;
    memcpy(table.entries, encoding_kernels_portable(), sizeof table.entries);
    add_vector_f32<Avx2Floats, Avx2Output<Avx2OutputF32>>(table);
    add_vector_bf16<Avx2Output<Avx2OutputBf16>>(table);
    add_linear_int8<DotAvx2>(table);
    add_linear_int16<DotAvx2>(table);
    return table;
}

}  // namespace

const EncodingKernels* encoding_kernels_avx2() {
    static const EncodingKernelTable table = make_table();
    return table.entries;
}

}  // namespace nybble
