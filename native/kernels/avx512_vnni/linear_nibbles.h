// Integer dot products of the encodings with 32 elements a block and nibbles in 16 bytes: q4_0,
// q4_1, q5_0, q5_1, iq4_nl, mxfp4, and affine ones with groups of 32.
//
// Four blocks (128 weights) go together. Their 64 bytes of nibbles fill one register, 16 bytes a
// block, so the low nibbles are the first halves of the four blocks and the high ones the second
// halves; the activations are shuffled to match. Both products of a block end in the same four
// lanes. Scales are fetched and multiplied for 16 blocks at a time and spread by a permutation.
//
// Signed weights are stored with an offset. A small one counts as a minimum of -offset * scale; for a
// large one, whose float32 rounding could be seen, the product starts from -offset * (sum of
// activations) in integers.
#pragma once

#include "kernels/avx512_vnni/rows.h"
#include "kernels/avx512_vnni/strided.h"
#include "kernels/float_formats.h"
#include "kernels/iq_grids.h"

namespace nybble {
namespace {

// Where a block has a zero point; or, in the fifth byte to the eighth, a float32 minimum.
enum ZeroPointPlace { no_zero_point, third_byte, fifth_byte, float_minimum };

// `Format` gives: bytes of a block, `packed` = where its nibbles start, offset, has_minimum,
// zero_point_at,
// weights(low or high nibbles) -> unsigned bytes, fifth bits, and the scales of 16 blocks.
template <typename Format>
struct NibbleKernel {
    template <int R, int M, int P>
    static NYBBLE_ALWAYS_INLINE void accumulate(const uint8_t* weight, size_t stride, const Activations& x,
                                                __m512 (&sums)[R][M]) {
        const int64_t blocks = x.columns / 32;
        int64_t b = 0;
        for (; b + 16 <= blocks; b += 16) chunk<R, M, P, true>(weight, stride, x, b, 16, sums);
        if (blocks - b > 4) {
            chunk<R, M, P, false>(weight, stride, x, b, blocks - b, sums);
        } else if (b < blocks) {
            tail<R, M, P>(weight, stride, x, b, blocks - b, sums);
        }
    }

   private:
    static constexpr bool offset_in_floats =
        !Format::has_minimum && Format::offset != 0 && Format::offset <= 16;
    static constexpr bool offset_in_integers = Format::offset != 0 && !offset_in_floats;
    static constexpr bool whole_words = Format::zero_point_at != no_zero_point;
    static constexpr bool has_second_words =
        Format::zero_point_at == fifth_byte || Format::zero_point_at == float_minimum;
    static constexpr bool uses_sums =
        Format::has_minimum || offset_in_floats || Format::zero_point_at != no_zero_point;

    // `count` blocks from block b on.
    template <int R, int M, int P, bool all>
    static NYBBLE_ALWAYS_INLINE void chunk(const uint8_t* weight, size_t stride, const Activations& x,
                                           int64_t b, int64_t count, __m512 (&sums)[R][M]) {
        __m512 scales[R][M];
        __m512 x_scales[M];
        __m512 x_sums[M];
        const __mmask16 present = static_cast<__mmask16>(all ? 0xffff : (1 << count) - 1);
        for (int j = 0; j < M; ++j) {
            x_scales[j] = _mm512_maskz_loadu_ps(present, x.scales + j * (x.columns / 32) + b);
            if (uses_sums) x_sums[j] = block_sums<all>(x.sums + j * (x.columns / 16) + 2 * b, count);
        }
        for (int r = 0; r < R; ++r) {
            const uint8_t* row = weight + static_cast<size_t>(r) * stride + b * Format::bytes;
            const __m512i words = whole_words ? Strided<Format::bytes>::template load_whole<all>(row, count)
                                              : Strided<Format::bytes>::template load<all>(row, count);
            const __m512 scale = Format::scales(words);
            for (int j = 0; j < M; ++j) scales[r][j] = _mm512_mul_ps(scale, x_scales[j]);
            if (uses_sums) {
                const __m512i second = second_words<all>(row, words, count);
                const __m512 minimum = minima(words, second, scale);
                for (int j = 0; j < M; ++j) sums[r][j] = _mm512_fmadd_ps(minimum, x_sums[j], sums[r][j]);
            }
        }
        __m512i lanes = lanes_by_four();
        for (int64_t g = 0; g < count; g += 4) {
            const uint8_t* blocks = weight + (b + g) * Format::bytes;
            if (all || count - g >= 4) {
                four_blocks<R, M, P, true>(blocks, stride, x, 32 * (b + g), 4, lanes, scales, sums);
            } else {
                four_blocks<R, M, P, false>(blocks, stride, x, 32 * (b + g), count - g, lanes, scales, sums);
            }
            lanes = _mm512_add_epi32(lanes, _mm512_set1_epi32(4));
        }
    }

    // The last 1 to 4 blocks: the scales of all R rows (at most 4) share a register, 4 lanes a row. The
    // operations of a row are those of chunk(), so it does not matter which of the two it meets.
    template <int R, int M, int P>
    static NYBBLE_ALWAYS_INLINE void tail(const uint8_t* weight, size_t stride, const Activations& x,
                                          int64_t b, int64_t count, __m512 (&sums)[R][M]) {
        static_assert(R <= 4);
        const __m512i words = first_words_of<R>(weight + b * Format::bytes, stride, count);
        const __m512 scale = Format::scales(words);
        const __m512i second =
            has_second_words ? first_words_of<R>(weight + b * Format::bytes + 4, stride, count) : words;
        const __m512 minimum = minima(words, second, scale);
        const __mmask8 present = static_cast<__mmask8>((1 << count) - 1);
        __m512 scales[1][M];
        for (int j = 0; j < M; ++j) {
            const __m128 x_scales = _mm_maskz_loadu_ps(present, x.scales + j * (x.columns / 32) + b);
            scales[0][j] = _mm512_mul_ps(scale, _mm512_broadcast_f32x4(x_scales));
            if (uses_sums) {
                const __m512 x_sums = block_sums<false>(x.sums + j * (x.columns / 16) + 2 * b, count);
                for (int r = 0; r < R; ++r) {
                    sums[r][j] = _mm512_fmadd_ps(quarter(minimum, r), x_sums, sums[r][j]);
                }
            }
        }
        const uint8_t* blocks = weight + b * Format::bytes;
        if (count == 4) {
            four_blocks<R, M, P, true>(blocks, stride, x, 32 * b, 4, lanes_by_four(), scales, sums);
        } else {
            four_blocks<R, M, P, false>(blocks, stride, x, 32 * b, count, lanes_by_four(), scales, sums);
        }
    }

    // The first four bytes of 1 to 4 blocks of each of R rows, 4 lanes a row, zeros elsewhere.
    template <int R>
    static NYBBLE_ALWAYS_INLINE __m512i first_words_of(const uint8_t* blocks, size_t stride, int64_t count) {
        __m128i parts[4];
        for (int r = 0; r < 4; ++r) {
            parts[r] =
                r < R ? first_words(blocks + static_cast<size_t>(r) * stride, count) : _mm_setzero_si128();
        }
        __m512i words = _mm512_castsi128_si512(parts[0]);
        words = _mm512_inserti32x4(words, parts[1], 1);
        words = _mm512_inserti32x4(words, parts[2], 2);
        return _mm512_inserti32x4(words, parts[3], 3);
    }

    // The first four bytes of each of 1 to 4 blocks, then zeros.
    static NYBBLE_ALWAYS_INLINE __m128i first_words(const uint8_t* blocks, int64_t count) {
        int32_t words[4] = {0, 0, 0, 0};
        for (int i = 0; i < 4; ++i) {
            if (i < count) memcpy(&words[i], blocks + i * Format::bytes, sizeof words[i]);
        }
        return _mm_setr_epi32(words[0], words[1], words[2], words[3]);
    }

    // Lanes 4r to 4r + 3 in lanes 0 to 3, zeros after them.
    static NYBBLE_ALWAYS_INLINE __m512 quarter(__m512 v, int r) {
        const __m512i index = _mm512_add_epi32(
            _mm512_setr_epi32(0, 1, 2, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0), _mm512_set1_epi32(4 * r));
        return _mm512_maskz_permutexvar_ps(0xf, index, v);
    }

    // The four bytes after the first four, where something is there.
    template <bool all>
    static NYBBLE_ALWAYS_INLINE __m512i second_words(const uint8_t* row, __m512i words, int64_t count) {
        if constexpr (Format::zero_point_at == float_minimum) {
            return Strided<Format::bytes, 4>::template load<all>(row, count);
        } else if constexpr (has_second_words) {
            return Strided<Format::bytes>::template load_whole<all>(row + 4, count);
        } else {
            return words;
        }
    }

    static NYBBLE_ALWAYS_INLINE __m512 minima(__m512i words, __m512i second, __m512 scale) {
        if (Format::zero_point_at == float_minimum) return _mm512_castsi512_ps(second);
        if (Format::zero_point_at != no_zero_point) {
            const __m512i bytes = Format::zero_point_at == fifth_byte ? second : _mm512_srli_epi32(words, 16);
            const __m512 points = _mm512_cvtepi32_ps(_mm512_and_si512(bytes, _mm512_set1_epi32(0xff)));
            return _mm512_sub_ps(_mm512_setzero_ps(), _mm512_mul_ps(scale, points));
        }
        return offset_in_floats ? _mm512_mul_ps(scale, _mm512_set1_ps(-static_cast<float>(Format::offset)))
                                : floats_from_low_f16(_mm512_srli_epi32(words, 16));
    }

    // With S = 1 all rows' scales are in one register, 4 lanes a row.
    template <int R, int M, int P, bool all, int S>
    static NYBBLE_ALWAYS_INLINE void four_blocks(const uint8_t* blocks, size_t stride, const Activations& x,
                                                 int64_t column, int64_t count, __m512i lanes,
                                                 const __m512 (&scales)[S][M], __m512 (&sums)[R][M]) {
        static_assert(S == R || S == 1);
        __m512i x_low[M][P];
        __m512i x_high[M][P];
        __m512i start[M];
        for (int j = 0; j < M; ++j) {
            start[j] = _mm512_setzero_si512();
            for (int plane = P - 1; plane >= 0; --plane) {
                const int8_t* p = x.planes[plane] + j * x.columns + column;
                const __m512i first =
                    all ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8(mask_of(32 * count), p);
                const __m512i second = all ? _mm512_loadu_si512(p + 64)
                                           : _mm512_maskz_loadu_epi8(mask_of(32 * count - 64), p + 64);
                x_low[j][plane] = _mm512_shuffle_i64x2(first, second, 0x88);
                x_high[j][plane] = _mm512_shuffle_i64x2(first, second, 0xdd);
                if (offset_in_integers) {
                    const __m512i offset = _mm512_set1_epi8(static_cast<char>(Format::offset));
                    start[j] = _mm512_slli_epi32(start[j], 8);
                    start[j] = _mm512_dpbusd_epi32(start[j], offset, x_low[j][plane]);
                    start[j] = _mm512_dpbusd_epi32(start[j], offset, x_high[j][plane]);
                }
            }
            start[j] = _mm512_sub_epi32(_mm512_setzero_si512(), start[j]);
        }
        for (int r = 0; r < R; ++r) {
            const uint8_t* row = blocks + static_cast<size_t>(r) * stride;
            prefetch(row + prefetch_distance<R>(stride));
            prefetch(row + prefetch_distance<R>(stride) + 64);
            const __m512i places = S == R ? lanes : _mm512_add_epi32(lanes, _mm512_set1_epi32(4 * r));
            const __m512i packed = load_packed<all>(row + Format::packed, count);
            const __m512i nibble = _mm512_set1_epi8(0x0f);
            __m512i low = _mm512_and_si512(packed, nibble);
            __m512i high = _mm512_and_si512(_mm512_srli_epi16(packed, 4), nibble);
            Format::template finish<all>(row, count, low, high);
            for (int j = 0; j < M; ++j) {
                __m512i product = _mm512_dpbusd_epi32(start[j], low, x_low[j][0]);
                product = _mm512_dpbusd_epi32(product, high, x_high[j][0]);
                if (P == 2) {
                    const __m512i upper = _mm512_dpbusd_epi32(_mm512_setzero_si512(), low, x_low[j][P - 1]);
                    product = join_planes(product, _mm512_dpbusd_epi32(upper, high, x_high[j][P - 1]));
                }
                sums[r][j] =
                    _mm512_fmadd_ps(_mm512_cvtepi32_ps(product),
                                    _mm512_permutexvar_ps(places, scales[S == R ? r : 0][j]), sums[r][j]);
            }
        }
    }

    static NYBBLE_ALWAYS_INLINE __mmask64 mask_of(int64_t bytes) {
        return Strided<Format::bytes>::bytes_mask(bytes);
    }

    template <bool all>
    static NYBBLE_ALWAYS_INLINE __m512i load_packed(const uint8_t* p, int64_t count) {
        const __m128i zero = _mm_setzero_si128();
        __m512i v = _mm512_castsi128_si512(load_16(p));
        v = _mm512_inserti32x4(v, all || count > 1 ? load_16(p + Format::bytes) : zero, 1);
        v = _mm512_inserti32x4(v, all || count > 2 ? load_16(p + 2 * Format::bytes) : zero, 2);
        return _mm512_inserti32x4(v, all || count > 3 ? load_16(p + 3 * Format::bytes) : zero, 3);
    }

    static NYBBLE_ALWAYS_INLINE __m128i load_16(const uint8_t* p) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    }
};

struct PlainNibbles {
    static constexpr ZeroPointPlace zero_point_at = no_zero_point;
    template <bool all>
    static NYBBLE_ALWAYS_INLINE void finish(const uint8_t*, int64_t, __m512i&, __m512i&) {}
    static NYBBLE_ALWAYS_INLINE __m512 scales(__m512i words) { return floats_from_low_f16(words); }
};

struct NibblesQ4_0 : PlainNibbles {
    static constexpr int bytes = 18, packed = 2, offset = 8;
    static constexpr bool has_minimum = false;
};

struct NibblesQ4_1 : PlainNibbles {
    static constexpr int bytes = 20, packed = 4, offset = 0;
    static constexpr bool has_minimum = true;
};

// Fifth bits: the first halves of four blocks make one mask of 64 bits, the second halves another.
template <int high_bits, int block_bytes>
struct FiveBits {
    static constexpr ZeroPointPlace zero_point_at = no_zero_point;
    template <bool all>
    static NYBBLE_ALWAYS_INLINE void finish(const uint8_t* row, int64_t count, __m512i& low, __m512i& high) {
        const __m512i sixteen = _mm512_set1_epi8(16);
        low = _mm512_mask_add_epi8(low, bits<all>(row + high_bits, count), low, sixteen);
        high = _mm512_mask_add_epi8(high, bits<all>(row + high_bits + 2, count), high, sixteen);
    }
    template <bool all>
    static NYBBLE_ALWAYS_INLINE __mmask64 bits(const uint8_t* p, int64_t count) {
        uint64_t mask = read_u16(p);
        if (all || count > 1) mask |= static_cast<uint64_t>(read_u16(p + block_bytes)) << 16;
        if (all || count > 2) mask |= static_cast<uint64_t>(read_u16(p + 2 * block_bytes)) << 32;
        if (all || count > 3) mask |= static_cast<uint64_t>(read_u16(p + 3 * block_bytes)) << 48;
        return mask;
    }
    static NYBBLE_ALWAYS_INLINE __m512 scales(__m512i words) { return floats_from_low_f16(words); }
};

struct NibblesQ5_0 : FiveBits<2, 22> {
    static constexpr int bytes = 22, packed = 6, offset = 16;
    static constexpr bool has_minimum = false;
};

struct NibblesQ5_1 : FiveBits<4, 24> {
    static constexpr int bytes = 24, packed = 8, offset = 0;
    static constexpr bool has_minimum = true;
};

// A 16-entry table of unsigned bytes: the code's level plus `offset`.
NYBBLE_ALWAYS_INLINE __m512i look_up(const int8_t* levels, int offset, __m512i codes) {
    const __m128i table = _mm_add_epi8(_mm_load_si128(reinterpret_cast<const __m128i*>(levels)),
                                       _mm_set1_epi8(static_cast<char>(offset)));
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), codes);
}

struct NibblesIQ4NL : PlainNibbles {
    static constexpr int bytes = 18, packed = 2, offset = 128;
    static constexpr bool has_minimum = false;
    template <bool all>
    static NYBBLE_ALWAYS_INLINE void finish(const uint8_t*, int64_t, __m512i& low, __m512i& high) {
        low = look_up(grids::kvalues_iq4nl, offset, low);
        high = look_up(grids::kvalues_iq4nl, offset, high);
    }
};

struct NibblesMXFP4 {
    static constexpr ZeroPointPlace zero_point_at = no_zero_point;
    static constexpr int bytes = 17, packed = 1, offset = 12;
    static constexpr bool has_minimum = false;
    template <bool all>
    static NYBBLE_ALWAYS_INLINE void finish(const uint8_t*, int64_t, __m512i& low, __m512i& high) {
        low = look_up(grids::kvalues_mxfp4, offset, low);
        high = look_up(grids::kvalues_mxfp4, offset, high);
    }
    // 2^(e - 128); e below 2 makes a subnormal number (float_from_e8m0_half).
    static NYBBLE_ALWAYS_INLINE __m512 scales(__m512i words) {
        const __m512i one = _mm512_set1_epi32(1);
        const __m512i e = _mm512_and_si512(words, _mm512_set1_epi32(0xff));
        const __m512i normal = _mm512_slli_epi32(_mm512_sub_epi32(e, one), 23);
        const __m512i subnormal = _mm512_sllv_epi32(_mm512_set1_epi32(0x00200000), e);
        const __mmask16 small = _mm512_cmple_epu32_mask(e, one);
        return _mm512_castsi512_ps(_mm512_mask_mov_epi32(normal, small, subnormal));
    }
};

// Affine encodings; scales are float32 or float16.
struct NibblesInt4F32 : PlainNibbles {
    static constexpr int bytes = 20, packed = 4, offset = 8;
    static constexpr bool has_minimum = false;
    static NYBBLE_ALWAYS_INLINE __m512 scales(__m512i words) { return _mm512_castsi512_ps(words); }
};

struct NibblesInt4F16Z : PlainNibbles {
    static constexpr int bytes = 19, packed = 3, offset = 0;
    static constexpr bool has_minimum = false;
    static constexpr ZeroPointPlace zero_point_at = third_byte;
};

struct NibblesInt4F32Z : PlainNibbles {
    static constexpr int bytes = 21, packed = 5, offset = 0;
    static constexpr bool has_minimum = false;
    static constexpr ZeroPointPlace zero_point_at = fifth_byte;
    static NYBBLE_ALWAYS_INLINE __m512 scales(__m512i words) { return _mm512_castsi512_ps(words); }
};

struct NibblesInt4F32M : PlainNibbles {
    static constexpr int bytes = 24, packed = 8, offset = 0;
    static constexpr bool has_minimum = true;
    static constexpr ZeroPointPlace zero_point_at = float_minimum;
    static NYBBLE_ALWAYS_INLINE __m512 scales(__m512i words) { return _mm512_castsi512_ps(words); }
};

}  // namespace
}  // namespace nybble
