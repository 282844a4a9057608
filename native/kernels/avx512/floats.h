// Sixteen floats of AVX-512 for linear_f32.h.
#pragma once

#include "kernels/avx2/floats.h"

namespace nybble {
namespace {

NYBBLE_ALWAYS_INLINE float sum_of(__m512 v) {
    return sum_of(_mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)));
}

struct Avx512Floats {
    using Register = __m512;
    static constexpr int width = 16;
    static NYBBLE_ALWAYS_INLINE Register zero() { return _mm512_setzero_ps(); }
    static NYBBLE_ALWAYS_INLINE Register load(const float* p) { return _mm512_loadu_ps(p); }
    static NYBBLE_ALWAYS_INLINE Register multiply_add(Register a, Register b, Register c) {
        return _mm512_fmadd_ps(a, b, c);
    }
    static NYBBLE_ALWAYS_INLINE Register add(Register a, Register b) { return _mm512_add_ps(a, b); }
    static NYBBLE_ALWAYS_INLINE float sum(Register a) { return sum_of(a); }
};

}  // namespace
}  // namespace nybble
