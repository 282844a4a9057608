// Four bytes of each of 16 blocks that lie a fixed number of bytes apart, in one register: a gather made of
// plain loads and permutations, which is quicker on every CPU with AVX-512. They are those at `offset` in
// the block, the first ones unless it says otherwise.
#pragma once

#include "kernels/intrinsics.h"

#include "core/compiler.h"

namespace nybble {
namespace {

template <int stride, int offset = 0>
struct Strided {
    static constexpr int total = 16 * stride;
    static constexpr int loads = (total + 63) / 64;
    static constexpr int pairs = (loads + 1) / 2;

    struct Tables {
        alignas(64) int32_t index[pairs][16];  // dword within a pair of loads
        alignas(64) int32_t shift[16];         // bits before the block within its dword
        uint16_t mask[pairs];                  // lanes that come from the pair
    };

    static constexpr Tables make_tables() {
        Tables t{};
        for (int k = 0; k < 16; ++k) {
            const int dword = (k * stride + offset) / 4;
            t.index[dword / 32][k] = dword % 32;
            t.mask[dword / 32] = static_cast<uint16_t>(t.mask[dword / 32] | (1 << k));
            t.shift[k] = (k * stride + offset) % 4 * 8;
        }
        return t;
    }
    static constexpr Tables tables = make_tables();

    static NYBBLE_ALWAYS_INLINE __mmask64 bytes_mask(int64_t bytes) {
        if (bytes <= 0) return 0;
        return bytes >= 64 ? ~__mmask64{0} : (__mmask64{1} << bytes) - 1;
    }

    // Words of `count` blocks (16 if all), zeros for the rest; the bytes after the block's start, as
    // many as its dword has: at least two where the stride is even.
    template <bool all>
    static NYBBLE_ALWAYS_INLINE __m512i load(const uint8_t* blocks, int64_t count) {
        __m512i part[2 * pairs];
        for (int i = 0; i < loads; ++i) {
            if (all && 64 * i + 64 <= total) {
                part[i] = _mm512_loadu_si512(blocks + 64 * i);
            } else {
                const int64_t bytes = all ? total : count * stride;
                part[i] = _mm512_maskz_loadu_epi8(bytes_mask(bytes - 64 * i), blocks + 64 * i);
            }
        }
        if (loads % 2) part[loads] = part[loads - 1];
        __m512i words = _mm512_permutex2var_epi32(part[0], _mm512_load_si512(tables.index[0]), part[1]);
        for (int i = 1; i < pairs; ++i) {
            const __m512i next =
                _mm512_permutex2var_epi32(part[2 * i], _mm512_load_si512(tables.index[i]), part[2 * i + 1]);
            words = _mm512_mask_mov_epi32(words, tables.mask[i], next);
        }
        if (stride % 4 || offset % 4) words = _mm512_srlv_epi32(words, _mm512_load_si512(tables.shift));
        return words;
    }

    // All four bytes, whatever the stride is and wherever in the blocks they are (plain loads would go
    // past the last block when they do not start with the first): a real gather where that is needed.
    template <bool all>
    static NYBBLE_ALWAYS_INLINE __m512i load_whole(const uint8_t* blocks, int64_t count) {
        if (stride % 4 == 0) return load<all>(blocks, count);
        const __m512i places =
            _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                               _mm512_set1_epi32(stride));
        const __mmask16 present = static_cast<__mmask16>(all ? 0xffff : (1 << count) - 1);
        return _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), present, places, blocks, 1);
    }
};

}  // namespace
}  // namespace nybble
