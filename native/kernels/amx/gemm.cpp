// Matrix product of bfloat16 on AMX tiles.
//
// A tile register holds 16 rows of 64 bytes. tdpbf16ps computes, for 16 x 16 float32 sums,
//   c[r][j] += sum over p < 16 of a[r][2p] * b[p][2j] + a[r][2p + 1] * b[p][2j + 1]
// so a holds 16 rows of 32 values as they lie in memory, and b holds pairs of k side by side:
//
//   a  weights      [16 weight rows][32 k]
//   b  activations  [16 pairs of k][16 activation rows][2]
//   c  sums         [16 weight rows][16 activation rows]    (transposed: see store_transposed)
//
// Weights take the plain layout, because they are dequantized anew for every product, while an
// activation is packed once and meets every weight row.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "core/compiler.h"
#include "kernels/float_kernels.h"

namespace nybble {
namespace {

struct alignas(64) TileConfig {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t column_bytes[16] = {};
    uint8_t rows[16] = {};
};

void begin() {
    TileConfig config;
    for (int i = 0; i < 8; ++i) {
        config.column_bytes[i] = 64;
        config.rows[i] = 16;
    }
#if defined(__GNUC__)
    // GCC 12's _tile_loadconfig does not tell the compiler that it reads the whole structure, and the
    // stores that fill it are dropped.
    __asm__ volatile("ldtilecfg %0" : : "m"(config) : "memory");
#else
    _tile_loadconfig(&config);
#endif
}

void end() { _tile_release(); }

// Transposes a 16 x 16 matrix of 32-bit elements in registers.
NYBBLE_ALWAYS_INLINE void transpose16(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

void pack(const float* x, int64_t ldx, int64_t rows, int64_t k, uint16_t* out) {
    for (int64_t p = 0; p < k; p += 32, out += 512) {
        __m512i r[16];
        for (int i = 0; i < 16; ++i) {
            if (i < rows) {
                const float* row = x + i * ldx + p;
                const __m512bh pairs = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(row + 16), _mm512_loadu_ps(row));
                std::memcpy(&r[i], &pairs, sizeof pairs);
            } else {
                r[i] = _mm512_setzero_si512();
            }
        }
        transpose16(r);
        for (int i = 0; i < 16; ++i) {
            _mm512_storeu_si512(out + i * 32, r[i]);
        }
    }
}

void multiply(const uint16_t* w, int64_t ldw, int64_t n_tiles, const uint16_t* x, int64_t x_stride,
              int64_t m_tiles, int64_t k, float* c, bool accumulate) {
    const size_t stride = static_cast<size_t>(ldw) * 2;
    const int64_t steps = k / 32;
    for (int64_t i = 0; i < m_tiles; i += 2) {
        const bool two_m = i + 1 < m_tiles;
        const uint16_t* b0 = x + i * x_stride;
        const uint16_t* b1 = two_m ? b0 + x_stride : b0;
        for (int64_t j = 0; j < n_tiles; j += 2) {
            const bool two_n = j + 1 < n_tiles;
            const uint16_t* a0 = w + j * 16 * ldw;
            const uint16_t* a1 = two_n ? a0 + 16 * ldw : a0;
            float* c00 = c + (j * m_tiles + i) * 256;
            float* c01 = c00 + 256;
            float* c10 = c00 + m_tiles * 256;
            float* c11 = c10 + 256;
            if (accumulate) {
                _tile_loadd(0, c00, 64);
                if (two_m) _tile_loadd(1, c01, 64);
                if (two_n) _tile_loadd(2, c10, 64);
                if (two_m && two_n) _tile_loadd(3, c11, 64);
            } else {
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
            }
            if (two_m && two_n) {
                for (int64_t s = 0; s < steps; ++s) {
                    _tile_loadd(4, a0 + s * 32, stride);
                    _tile_loadd(6, b0 + s * 512, 64);
                    _tile_loadd(5, a1 + s * 32, stride);
                    _tile_loadd(7, b1 + s * 512, 64);
                    _tile_dpbf16ps(0, 4, 6);
                    _tile_dpbf16ps(2, 5, 6);
                    _tile_dpbf16ps(1, 4, 7);
                    _tile_dpbf16ps(3, 5, 7);
                }
            } else if (two_n) {
                for (int64_t s = 0; s < steps; ++s) {
                    _tile_loadd(4, a0 + s * 32, stride);
                    _tile_loadd(6, b0 + s * 512, 64);
                    _tile_loadd(5, a1 + s * 32, stride);
                    _tile_dpbf16ps(0, 4, 6);
                    _tile_dpbf16ps(2, 5, 6);
                }
            } else {
                for (int64_t s = 0; s < steps; ++s) {
                    _tile_loadd(4, a0 + s * 32, stride);
                    _tile_loadd(6, b0 + s * 512, 64);
                    _tile_dpbf16ps(0, 4, 6);
                    if (two_m) {
                        _tile_loadd(7, b1 + s * 512, 64);
                        _tile_dpbf16ps(1, 4, 7);
                    }
                }
            }
            _tile_stored(0, c00, 64);
            if (two_m) _tile_stored(1, c01, 64);
            if (two_n) _tile_stored(2, c10, 64);
            if (two_m && two_n) _tile_stored(3, c11, 64);
        }
    }
}

void store_transposed(const float* tile, float* out, int64_t ldo, int64_t rows, int64_t columns) {
    __m512i r[16];
    for (int i = 0; i < 16; ++i) {
        r[i] = _mm512_loadu_si512(tile + i * 16);
    }
    transpose16(r);
    const __mmask16 mask = static_cast<__mmask16>(columns >= 16 ? 0xffff : (1U << columns) - 1U);
    for (int64_t i = 0; i < 16 && i < rows; ++i) {
        _mm512_mask_storeu_epi32(out + i * ldo, mask, r[i]);
    }
}

}  // namespace

const Bf16Gemm* bf16_gemm_amx() {
    static constexpr Bf16Gemm table = {pack, multiply, store_transposed, begin, end};
    return &table;
}

}  // namespace nybble
