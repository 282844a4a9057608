// Integer dot products of the encodings with super-blocks of 256 elements: q2_k to q6_k and iq4_xs.
//
// A super-block has its scales decoded once into a register of floats and multiplied by those of the
// activations; then come two halves of 128 weights, each two registers of unsigned weights. A
// `Format` gives
//
//   bytes, offset                 size of the super-block; what to subtract from unsigned weights
//   scales(block)                 float scales, in some order of lanes
//   x_scales(x)                   the activations' multipliers, in the same order
//   weights(block, half, w)       two registers of 64 weights
//   arrange(first, second, v)     128 activations in the order of the weights
//   lanes(half, k)                which scale each of the 16 sums of register k belongs to
//   minimum                       none; or lanes 4-7 and 12-15 of `scales` hold minima; or apart
//   one_product                   both registers' products have the same scales and are added up
#pragma once

#include "kernels/avx512_vnni/rows.h"
#include "kernels/blocks.h"
#include "kernels/iq_grids.h"

namespace nybble {
namespace {

enum class Minimum { none, in_lanes, apart };

template <typename Format>
struct SuperKernel {
    template <int R, int M, int P>
    static NYBBLE_ALWAYS_INLINE void accumulate(const uint8_t* weight, size_t stride, const Activations& x,
                                                __m512 (&sums)[R][M]) {
        const int64_t x_scale_stride = x.columns / 32;
        const int64_t x_sum_stride = x.columns / 16;
        for (int64_t c = 0; c < x.columns; c += 256) {
            const uint8_t* blocks = weight + c / 256 * Format::bytes;
            __m512 x_scales[M];
            __m512 x_sums[M];
            for (int j = 0; j < M; ++j) {
                const float* block_scales = x.scales + j * x_scale_stride + c / 32;
                const float* half_sums = x.sums + j * x_sum_stride + c / 16;
                x_scales[j] = Format::x_scales(block_scales, half_sums);
                if (Format::minimum == Minimum::apart) x_sums[j] = _mm512_loadu_ps(half_sums);
            }
            __m512 scales[R][M];
            for (int r = 0; r < R; ++r) {
                const uint8_t* block = blocks + static_cast<size_t>(r) * stride;
                const __m512 scale = Format::scales(block);
                for (int j = 0; j < M; ++j) {
                    scales[r][j] = _mm512_mul_ps(scale, x_scales[j]);
                    if (Format::minimum == Minimum::in_lanes) {
                        sums[r][j] = _mm512_mask_add_ps(sums[r][j], 0xf0f0, sums[r][j], scales[r][j]);
                    }
                }
                if constexpr (Format::minimum == Minimum::apart) {
                    const __m512 minima = Format::minima(block);
                    for (int j = 0; j < M; ++j) sums[r][j] = _mm512_fnmadd_ps(minima, x_sums[j], sums[r][j]);
                }
            }
            half_block<R, M, P, 0>(blocks, stride, x, c, scales, sums);
            half_block<R, M, P, 1>(blocks, stride, x, c + 128, scales, sums);
        }
    }

   private:
    template <int R, int M, int P, int half>
    static NYBBLE_ALWAYS_INLINE void half_block(const uint8_t* blocks, size_t stride, const Activations& x,
                                                int64_t column, const __m512 (&scales)[R][M],
                                                __m512 (&sums)[R][M]) {
        __m512i v[M][P][2];
        __m512i start[M][2];
        for (int j = 0; j < M; ++j) {
            for (int plane = 0; plane < P; ++plane) {
                const int8_t* p = x.planes[plane] + j * x.columns + column;
                Format::arrange(_mm512_loadu_si512(p), _mm512_loadu_si512(p + 64), v[j][plane]);
            }
            for (int k = 0; k < 2; ++k) {
                start[j][k] = _mm512_setzero_si512();
                if (Format::offset) {
                    const __m512i offset = _mm512_set1_epi8(static_cast<char>(Format::offset));
                    for (int plane = P - 1; plane >= 0; --plane) {
                        start[j][k] =
                            _mm512_dpbusd_epi32(_mm512_slli_epi32(start[j][k], 8), offset, v[j][plane][k]);
                    }
                    start[j][k] = _mm512_sub_epi32(_mm512_setzero_si512(), start[j][k]);
                }
            }
            if (Format::one_product) start[j][0] = _mm512_add_epi32(start[j][0], start[j][1]);
        }
        for (int r = 0; r < R; ++r) {
            const uint8_t* block = blocks + static_cast<size_t>(r) * stride;
            const uint8_t* ahead = block + prefetch_distance<R>(stride) + half * (Format::bytes / 2);
            prefetch(ahead);
            if (Format::bytes > 128) prefetch(ahead + 64);
            __m512i w[2];
            Format::weights(block, half, w);
            for (int j = 0; j < M; ++j) {
                __m512i product = _mm512_dpbusd_epi32(start[j][0], w[0], v[j][0][0]);
                __m512i upper = _mm512_setzero_si512();
                if (P == 2) upper = _mm512_dpbusd_epi32(upper, w[0], v[j][P - 1][0]);
                if (!Format::one_product) {
                    if (P == 2) product = join_planes(product, upper);
                    add(product, Format::lanes(half, 0), scales[r][j], sums[r][j]);
                    product = start[j][1];
                    upper = _mm512_setzero_si512();
                }
                product = _mm512_dpbusd_epi32(product, w[1], v[j][0][1]);
                if (P == 2) product = join_planes(product, _mm512_dpbusd_epi32(upper, w[1], v[j][P - 1][1]));
                add(product, Format::lanes(half, 1), scales[r][j], sums[r][j]);
            }
        }
    }

    static NYBBLE_ALWAYS_INLINE void add(__m512i product, __m512i lanes, __m512 scales, __m512& sum) {
        sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(product), _mm512_permutexvar_ps(lanes, scales), sum);
    }
};

NYBBLE_ALWAYS_INLINE __m512 broadcast_f16(const uint8_t* p) {
    return _mm512_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(read_u16(p))));
}

NYBBLE_ALWAYS_INLINE __m512i broadcast_32(const uint8_t* p) {
    return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// Each 32-bit word of the lower half turned left by `low` bits and of the upper half by `high`: moves
// bits of every byte to another place in the same byte, if masked afterwards.
NYBBLE_ALWAYS_INLINE __m512i rotate_halves(__m512i v, int low, int high) {
    const __m512i by = _mm512_inserti64x4(_mm512_set1_epi32(low & 31), _mm256_set1_epi32(high & 31), 1);
    return _mm512_rolv_epi32(v, by);
}

// a | (b & mask)
NYBBLE_ALWAYS_INLINE __m512i or_masked(__m512i a, __m512i b, int mask) {
    return _mm512_ternarylogic_epi32(a, b, _mm512_set1_epi8(static_cast<char>(mask)), 0xf8);
}

NYBBLE_ALWAYS_INLINE __m512i masked(__m512i v, int mask) {
    return _mm512_and_si512(v, _mm512_set1_epi8(static_cast<char>(mask)));
}

// Scales of q4_k and q5_k. Lanes: scales 0-3, minima 0-3, scales 4-7, minima 4-7.
template <int high_bits>
struct SuperQ4K5K {
    static constexpr int offset = 0;
    static constexpr Minimum minimum = Minimum::in_lanes;
    static constexpr bool one_product = false;

    static NYBBLE_ALWAYS_INLINE __m512 scales(const uint8_t* block) {
        uint64_t first;
        uint64_t second;
        unpack_scales_q4k(block + 4, &first, &second);
        const __m128i both = _mm_set_epi64x(static_cast<long long>(second), static_cast<long long>(first));
        const __m128 d = _mm_cvtph_ps(_mm_cvtsi32_si128(static_cast<int>(read_u32(block))));
        const __m512i spread = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1);
        const __m512 factors = _mm512_permutexvar_ps(spread, _mm512_castps128_ps512(d));
        return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(both)), factors);
    }
    // Scales, and the sums of blocks negated.
    static NYBBLE_ALWAYS_INLINE __m512 x_scales(const float* block_scales, const float* half_sums) {
        const __m512i even = _mm512_setr_epi32(0, 0, 0, 0, 0, 2, 4, 6, 0, 0, 0, 0, 8, 10, 12, 14);
        const __m512i odd = _mm512_setr_epi32(0, 0, 0, 0, 1, 3, 5, 7, 0, 0, 0, 0, 9, 11, 13, 15);
        const __m512i spread = _mm512_setr_epi32(0, 1, 2, 3, 0, 0, 0, 0, 4, 5, 6, 7, 0, 0, 0, 0);
        const __m512 halves = _mm512_loadu_ps(half_sums);
        const __m512 sums =
            _mm512_add_ps(_mm512_permutexvar_ps(even, halves), _mm512_permutexvar_ps(odd, halves));
        const __m512 scale =
            _mm512_permutexvar_ps(spread, _mm512_castps256_ps512(_mm256_loadu_ps(block_scales)));
        return _mm512_mask_sub_ps(scale, 0xf0f0, _mm512_setzero_ps(), sums);
    }
    // The 64 bytes of a half: low nibbles are elements 0-31 and 64-95, high ones 32-63 and 96-127.
    static NYBBLE_ALWAYS_INLINE void weights(const uint8_t* block, int half, __m512i (&w)[2]) {
        const __m512i packed = _mm512_loadu_si512(block + 16 + (high_bits ? 32 : 0) + 64 * half);
        w[0] = masked(packed, 0x0f);
        w[1] = masked(_mm512_srli_epi16(packed, 4), 0x0f);
        if (high_bits) {
            const __m512i bits = broadcast_32(block + 16);
            w[0] = or_masked(w[0], rotate_halves(bits, 4 - 4 * half, 2 - 4 * half), 0x10);
            w[1] = or_masked(w[1], rotate_halves(bits, 3 - 4 * half, 1 - 4 * half), 0x10);
        }
    }
    static NYBBLE_ALWAYS_INLINE void arrange(__m512i first, __m512i second, __m512i (&v)[2]) {
        v[0] = _mm512_shuffle_i64x2(first, second, 0x44);
        v[1] = _mm512_shuffle_i64x2(first, second, 0xee);
    }
    static NYBBLE_ALWAYS_INLINE __m512i lanes(int half, int k) {
        const int low = 8 * half + k;
        return _mm512_inserti64x4(_mm512_set1_epi32(low), _mm256_set1_epi32(low + 2), 1);
    }
};

struct SuperQ4K : SuperQ4K5K<0> {
    static constexpr int bytes = 144;
};

struct SuperQ5K : SuperQ4K5K<1> {
    static constexpr int bytes = 176;
};

// 16 scales, one per 16 elements in order; weights in order.
struct SuperOf16 {
    static constexpr bool one_product = false;

    static NYBBLE_ALWAYS_INLINE __m512 x_scales(const float* block_scales, const float*) {
        const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
        return _mm512_permutexvar_ps(twice, _mm512_castps256_ps512(_mm256_loadu_ps(block_scales)));
    }
    static NYBBLE_ALWAYS_INLINE void arrange(__m512i first, __m512i second, __m512i (&v)[2]) {
        v[0] = first;
        v[1] = second;
    }
    static NYBBLE_ALWAYS_INLINE __m512i lanes(int half, int k) {
        return _mm512_add_epi32(lanes_by_four(), _mm512_set1_epi32(8 * half + 4 * k));
    }
    static NYBBLE_ALWAYS_INLINE __m512 scaled(const uint8_t* d, __m128i scales) {
        return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(scales)), broadcast_f16(d));
    }
};

struct SuperQ6K : SuperOf16 {
    static constexpr int bytes = 210, offset = 32;
    static constexpr Minimum minimum = Minimum::none;

    static NYBBLE_ALWAYS_INLINE __m512 scales(const uint8_t* block) {
        return scaled(block + 208, _mm_loadu_si128(reinterpret_cast<const __m128i*>(block + 192)));
    }
    static NYBBLE_ALWAYS_INLINE void weights(const uint8_t* block, int half, __m512i (&w)[2]) {
        const __m512i packed = _mm512_loadu_si512(block + 64 * half);
        const __m512i high = broadcast_32(block + 128 + 32 * half);
        w[0] = or_masked(masked(packed, 0x0f), rotate_halves(high, 4, 2), 0x30);
        w[1] = or_masked(masked(_mm512_srli_epi16(packed, 4), 0x0f), rotate_halves(high, 0, -2), 0x30);
    }
};

// 128 weights of two bits from 32 bytes.
NYBBLE_ALWAYS_INLINE void two_bits(const uint8_t* p, __m512i (&w)[2]) {
    const __m512i packed = broadcast_32(p);
    w[0] = masked(rotate_halves(packed, 0, -2), 3);
    w[1] = masked(rotate_halves(packed, -4, -6), 3);
}

struct SuperQ3K : SuperOf16 {
    static constexpr int bytes = 110, offset = 4;
    static constexpr Minimum minimum = Minimum::none;

    static NYBBLE_ALWAYS_INLINE __m512 scales(const uint8_t* block) {
        const uint64_t low = read_u64(block + 96);
        const __m128i nibbles =
            _mm_and_si128(_mm_set_epi64x(static_cast<long long>(low >> 4), static_cast<long long>(low)),
                          _mm_set1_epi8(0x0f));
        const __m128i pairs = _mm_srlv_epi32(_mm_set1_epi32(static_cast<int>(read_u32(block + 104))),
                                             _mm_setr_epi32(0, 2, 4, 6));
        const __m128i high = _mm_slli_epi16(_mm_and_si128(pairs, _mm_set1_epi8(3)), 4);
        return scaled(block + 108, _mm_sub_epi8(_mm_or_si128(nibbles, high), _mm_set1_epi8(32)));
    }
    static NYBBLE_ALWAYS_INLINE void weights(const uint8_t* block, int half, __m512i (&w)[2]) {
        two_bits(block + 32 + 32 * half, w);
        const __m512i third = broadcast_32(block);
        w[0] = or_masked(w[0], rotate_halves(third, 2 - 4 * half, 1 - 4 * half), 4);
        w[1] = or_masked(w[1], rotate_halves(third, -4 * half, -1 - 4 * half), 4);
    }
};

struct SuperQ2K : SuperOf16 {
    static constexpr int bytes = 84, offset = 0;
    static constexpr Minimum minimum = Minimum::apart;

    static NYBBLE_ALWAYS_INLINE __m512 scales(const uint8_t* block) {
        return scaled(block + 80, _mm_and_si128(load_scales(block), _mm_set1_epi8(0x0f)));
    }
    static NYBBLE_ALWAYS_INLINE __m512 minima(const uint8_t* block) {
        return scaled(block + 82, _mm_and_si128(_mm_srli_epi16(load_scales(block), 4), _mm_set1_epi8(0x0f)));
    }
    static NYBBLE_ALWAYS_INLINE void weights(const uint8_t* block, int half, __m512i (&w)[2]) {
        two_bits(block + 16 + 32 * half, w);
    }

   private:
    static NYBBLE_ALWAYS_INLINE __m128i load_scales(const uint8_t* block) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(block));
    }
};

// 8 scales; a half is four blocks of 16 bytes, low nibbles first halves and high ones second halves.
struct SuperIQ4XS {
    static constexpr int bytes = 136, offset = 128;
    static constexpr Minimum minimum = Minimum::none;
    static constexpr bool one_product = true;

    static NYBBLE_ALWAYS_INLINE __m512 scales(const uint8_t* block) {
        const __m256i low =
            _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(read_u32(block + 4))),
                                               _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28)),
                             _mm256_set1_epi32(0x0f));
        const __m256i high = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(read_u16(block + 2)),
                                                                _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14)),
                                              _mm256_set1_epi32(3));
        const __m256i scale =
            _mm256_sub_epi32(_mm256_or_si256(low, _mm256_slli_epi32(high, 4)), _mm256_set1_epi32(32));
        return _mm512_mul_ps(_mm512_zextps256_ps512(_mm256_cvtepi32_ps(scale)), broadcast_f16(block));
    }
    static NYBBLE_ALWAYS_INLINE __m512 x_scales(const float* block_scales, const float*) {
        return _mm512_zextps256_ps512(_mm256_loadu_ps(block_scales));
    }
    static NYBBLE_ALWAYS_INLINE void weights(const uint8_t* block, int half, __m512i (&w)[2]) {
        const __m512i packed = _mm512_loadu_si512(block + 8 + 64 * half);
        const __m128i levels =
            _mm_add_epi8(_mm_load_si128(reinterpret_cast<const __m128i*>(grids::kvalues_iq4nl)),
                         _mm_set1_epi8(static_cast<char>(offset)));
        const __m512i table = _mm512_broadcast_i32x4(levels);
        w[0] = _mm512_shuffle_epi8(table, masked(packed, 0x0f));
        w[1] = _mm512_shuffle_epi8(table, masked(_mm512_srli_epi16(packed, 4), 0x0f));
    }
    static NYBBLE_ALWAYS_INLINE void arrange(__m512i first, __m512i second, __m512i (&v)[2]) {
        v[0] = _mm512_shuffle_i64x2(first, second, 0x88);
        v[1] = _mm512_shuffle_i64x2(first, second, 0xdd);
    }
    static NYBBLE_ALWAYS_INLINE __m512i lanes(int half, int) {
        return _mm512_add_epi32(lanes_by_four(), _mm512_set1_epi32(4 * half));
    }
};

}  // namespace
}  // namespace nybble
