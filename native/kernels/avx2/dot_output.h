// An Output of dequantize.h that multiplies the weights it is given with up to four activation rows,
// 32 weights at a time. Shared by the integer products of AVX2 and AVX-VNNI.
//
// `Products` holds the activations and knows how to multiply:
//
//   prepare(q)                   what multiply needs of 32 signed weights, for all activation rows
//   multiply(weights, j, at)     exact int32 sums with row j; lanes 0-3 belong to elements 0-15
//   scale(j, at)                 the multiplier of those sums, in every lane
//   half_sums(j, at)             lanes 0 and 1: sums of the activations of either half
#pragma once

#include "kernels/avx2/dequantize.h"
#include "kernels/avx2/floats.h"
#include "kernels/iq_blocks.h"

namespace nybble {
namespace {

template <typename Products, int M>
struct DotOutput {
    Products products;
    __m256 sums[M];
    __m128 minima[M];  // lanes 0 and 1

    NYBBLE_ALWAYS_INLINE void put(__m256i q, float s, int64_t at) { multiply(q, _mm256_set1_ps(s), at); }
    NYBBLE_ALWAYS_INLINE void put(__m256i q, float s0, float s1, int64_t at) {
        multiply(q, _mm256_blend_ps(_mm256_set1_ps(s0), _mm256_set1_ps(s1), 0xf0), at);
    }
    NYBBLE_ALWAYS_INLINE void put_with_minimum(__m256i q, float s, float m, int64_t at) {
        put(q, s, at);
        add_minimum(_mm_set1_ps(m), at);
    }
    NYBBLE_ALWAYS_INLINE void put_with_minimum(__m256i q, float s0, float s1, float m0, float m1,
                                               int64_t at) {
        put(q, s0, s1, at);
        add_minimum(_mm_unpacklo_ps(_mm_set_ss(m0), _mm_set_ss(m1)), at);
    }

   private:
    NYBBLE_ALWAYS_INLINE void multiply(__m256i q, __m256 scale, int64_t at) {
        const auto weights = products.prepare(q);
        for (int j = 0; j < M; ++j) {
            const __m256 product = _mm256_cvtepi32_ps(products.multiply(weights, j, at));
            sums[j] = _mm256_fmadd_ps(product, _mm256_mul_ps(scale, products.scale(j, at)), sums[j]);
        }
    }
    NYBBLE_ALWAYS_INLINE void add_minimum(__m128 minimum, int64_t at) {
        for (int j = 0; j < M; ++j) minima[j] = _mm_fmadd_ps(minimum, products.half_sums(j, at), minima[j]);
    }
};

NYBBLE_ALWAYS_INLINE __m128 load_pair(const float* p) {
    return _mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}

// What a row of weights comes to in the end.
NYBBLE_ALWAYS_INLINE float total_of(__m256 sums, __m128 minima) {
    return sum_of(_mm256_add_ps(sums, _mm256_zextps128_ps256(minima)));
}

// Gives `outputs[r]` the blocks of weight row r, `columns` elements of them, and fetches the same
// columns of the R rows that follow.
template <typename Vector, int R, typename Output>
NYBBLE_ALWAYS_INLINE void put_rows(const uint8_t* weight, size_t stride, int64_t columns,
                                   Output (&outputs)[R]) {
    for (int64_t at = 0; at < columns; at += Vector::size, weight += Vector::bytes) {
        for (int r = 0; r < R; ++r) {
            const uint8_t* block = weight + static_cast<size_t>(r) * stride;
            for (int line = 0; line < Vector::bytes; line += 64) {
                _mm_prefetch(reinterpret_cast<const char*>(block + static_cast<size_t>(R) * stride + line),
                             _MM_HINT_T0);
            }
            Vector::put(block, outputs[r], at);
        }
    }
}

// Encodings without a vector unpacking of their own: the scalar one, then the same products.
template <typename Block>
struct ScalarUnpacking : Block {
    template <typename Output>
    static NYBBLE_ALWAYS_INLINE void put(const uint8_t* block, Output& output, int64_t at) {
        int8_t q[Block::size];
        float s[Block::size / 16];
        float m[Block::size / 16];
        Block::unpack(block, q, s, m);
        for (int i = 0; i < Block::size; i += 32) {
            output.put(load_32(reinterpret_cast<const uint8_t*>(q + i)), s[i / 16], s[i / 16 + 1], at + i);
        }
    }
};

// Calls visit(Vector{}, encoding) for every block encoding.
template <typename Visit>
NYBBLE_ALWAYS_INLINE void for_each_dot_block(const Visit& visit) {
    for_each_rare_block(
        [&](auto block, Encoding encoding) { visit(ScalarUnpacking<decltype(block)>{}, encoding); });
    for_each_vector_block(visit);
}

}  // namespace
}  // namespace nybble
