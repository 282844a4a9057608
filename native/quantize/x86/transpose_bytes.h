// Bytes that lie lane by lane, to one run of bytes for each lane; for AVX2's 8 lanes and AVX-512's 16.
#pragma once

#include <cstdint>

#include "core/compiler.h"
#include "kernels/intrinsics.h"

namespace nybble {
namespace {

// bytes: n rows of N bytes, one for each lane; out: N pointers to n bytes. `load` takes a row to a register.
template <int N, class Load>
NYBBLE_ALWAYS_INLINE void transpose_byte_rows(const uint8_t* bytes, int n, uint8_t* const* out, Load load) {
    const int whole = n & ~15;
    for (int start = 0; start < whole; start += 16) {
        __m128i x[16], y[16];
        for (int i = 0; i < 16; ++i) {
            x[i] = load(reinterpret_cast<const __m128i*>(bytes + (start + i) * N));
        }
        // Four perfect shuffles of 16 rows are a transposition.
        for (int round = 0; round < 4; ++round) {
            for (int i = 0; i < 8; ++i) {
                y[2 * i] = _mm_unpacklo_epi8(x[i], x[i + 8]);
                y[2 * i + 1] = _mm_unpackhi_epi8(x[i], x[i + 8]);
            }
            for (int i = 0; i < 16; ++i) x[i] = y[i];
        }
        for (int lane = 0; lane < N; ++lane) {
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out[lane] + start), x[lane]);
        }
    }
    for (int i = whole; i < n; ++i) {
        for (int lane = 0; lane < N; ++lane) out[lane][i] = bytes[i * N + lane];
    }
}

}  // namespace
}  // namespace nybble
