// How keys and values lie in a page of the KV cache.
//
// A page holds kPageTokens (64) tokens. For one layer and one key-value head of head_dim d:
//
//   keys    transposed, so that a tile of scores is a plain sum over rows
//     f32, f16, bf16   [d][64]
//     q8_0             int8 [d][64], then f16 scale [d / 32][64]
//     q4_0             byte [d / 2][64], then f16 scale [d / 32][64]
//   values  one row a token
//     f32, f16, bf16   [64][d]
//     q8_0             int8 [64][d], then f16 scale [64][d / 32]
//     q4_0             byte [64][d / 2], then f16 scale [64][d / 32]
//
// q4_0 as in GGUF: byte i of a block of 32 holds element i low and element i + 16 high, minus 8.
#pragma once

#include <cstdint>

namespace nybble {

enum class KvEncoding : int32_t { f32, f16, bf16, q8_0, q4_0, count };

// Bytes of keys (or of values, the same) of one page, layer and key-value head.
inline int64_t kv_page_bytes(KvEncoding encoding, int64_t d) {
    switch (encoding) {
        case KvEncoding::f32:
            return 64 * d * 4;
        case KvEncoding::f16:
        case KvEncoding::bf16:
            return 64 * d * 2;
        case KvEncoding::q8_0:
            return 64 * (d + d / 32 * 2);
        case KvEncoding::q4_0:
            return 64 * (d / 2 + d / 32 * 2);
        default:
            return 0;
    }
}

}  // namespace nybble
