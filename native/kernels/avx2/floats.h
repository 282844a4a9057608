// Eight floats of AVX2 for linear_f32.h.
#pragma once

#include "kernels/intrinsics.h"

#include "core/compiler.h"

namespace nybble {
namespace {

NYBBLE_ALWAYS_INLINE float sum_of(__m256 v) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

struct Avx2Floats {
    using Register = __m256;
    static constexpr int width = 8;
    static NYBBLE_ALWAYS_INLINE Register zero() { return _mm256_setzero_ps(); }
    static NYBBLE_ALWAYS_INLINE Register load(const float* p) { return _mm256_loadu_ps(p); }
    static NYBBLE_ALWAYS_INLINE Register multiply_add(Register a, Register b, Register c) {
        return _mm256_fmadd_ps(a, b, c);
    }
    static NYBBLE_ALWAYS_INLINE Register add(Register a, Register b) { return _mm256_add_ps(a, b); }
    static NYBBLE_ALWAYS_INLINE float sum(Register a) { return sum_of(a); }
};

}  // namespace
}  // namespace nybble
