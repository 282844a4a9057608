// Kernels on float32 rows: norms, rotary, activations, attention tiles, precise matrix products, and
// conversions of the KV cache. One table per instruction set; see kernels.h for the rules.
#pragma once

#include <cstdint>

#include "core/cpu_features.h"
#include "core/kv_encoding.h"

namespace nybble {

enum class Activation : int32_t { silu, gelu, gelu_tanh };

// Tokens in a page of the KV cache, and so columns of an attention tile.
inline constexpr int kPageTokens = 64;

// Rows and columns of a tile of add_products.
inline constexpr int kProductTile = 16;

struct FloatKernels {
    const char* name = nullptr;

    // out = x / sqrt(mean(x^2) + eps) * (weight + offset), n columns. out may be x.
    void (*rms_norm)(const float* x, const float* weight, float* out, int64_t n, float eps,
                     float offset) = nullptr;

    // out = a + b, x * factor, activation(gate) * up, cap * tanh(x / cap). out may be an input.
    void (*add)(const float* a, const float* b, float* out, int64_t n) = nullptr;
    void (*scale)(const float* x, float factor, float* out, int64_t n) = nullptr;
    void (*gated)(const float* gate, const float* up, float* out, int64_t n, Activation kind) = nullptr;
    void (*softcap)(const float* x, float cap, float* out, int64_t n) = nullptr;

    // Rotates the first rotary_dim features of one head in place. table: rotary_dim cosines, then
    // rotary_dim sines. Half-split: entry i < rotary_dim / 2 belongs to the pair (i, i + rotary_dim / 2).
    // Interleaved: entries 2i and 2i + 1 belong to the pair (2i, 2i + 1), the sine of 2i negated.
    void (*rotate)(float* head, const float* table, int64_t rotary_dim, bool interleaved) = nullptr;

    // Int8Rows of one row (see kernels.h); n is a multiple of 32.
    void (*quantize_int8)(const float* x, int64_t n, int8_t* values, float* scales, float* sums) = nullptr;

    // The same with 16 bits: values are the low bytes, high the others.
    void (*quantize_int16)(const float* x, int64_t n, int8_t* values, int8_t* high, float* scales,
                           float* sums) = nullptr;

    // y[i][j] = dot(x row i, w row j) over k in float32; rows ldx, ldw, ldy floats apart.
    void (*gemm)(const float* x, int64_t ldx, int64_t m, const float* w, int64_t ldw, int64_t n, int64_t k,
                 float* y, int64_t ldy) = nullptr;

    // c[i][j] += sum over `rows` rows t of a[t][i] * b[t][j] in float32, i and j < kProductTile; rows of
    // a and b lie together, those of c are ldc floats apart.
    void (*add_products)(const float* a, const float* b, int64_t rows, float* c, int64_t ldc) = nullptr;

    // One tile of attention with online softmax for `rows` query rows of one key-value head.
    //
    //   q    float [rows][d]          already multiplied by the attention scale
    //   k    float [d][kPageTokens]   keys of the page, transposed
    //   v    float [kPageTokens][d]
    //   lo, hi                        row r sees tile columns lo[r] <= t < hi[r]
    //   maximum, sum, acc             running softmax state: float [rows], [rows], [rows][d]
    //   scores                        scratch, float [rows][kPageTokens]
    void (*attention_tile)(const float* q, int64_t rows, int64_t d, const float* k, const float* v,
                           const int32_t* lo, const int32_t* hi, float softcap, float* maximum, float* sum,
                           float* acc, float* scores) = nullptr;

    // KV cache of one page, layer and key-value head; layouts in core/kv_encoding.h.
    void (*store_key)(KvEncoding encoding, const float* key, int64_t d, int64_t token,
                      uint8_t* page) = nullptr;
    void (*store_value)(KvEncoding encoding, const float* value, int64_t d, int64_t token,
                        uint8_t* page) = nullptr;
    void (*load_keys)(KvEncoding encoding, const uint8_t* page, int64_t d, float* out) = nullptr;
    // Tokens first <= t < last only.
    void (*load_values)(KvEncoding encoding, const uint8_t* page, int64_t d, int64_t first, int64_t last,
                        float* out) = nullptr;

    // Rounds to nearest even bfloat16.
    void (*to_bf16)(const float* x, uint16_t* out, int64_t n) = nullptr;
};

const FloatKernels* float_kernels_portable();
const FloatKernels* float_kernels_avx2();
const FloatKernels* float_kernels_avx512();

// The table of a level; `isa` must be available here (cpu_features.h).
const FloatKernels* float_kernels(Isa isa);

// Matrix product on AMX bf16 tiles; see amx/gemm.cpp for the layouts.
struct Bf16Gemm {
    // Packs 16 rows of x (ldx floats apart; only `rows` of them exist, the others become zero) of k
    // columns (a multiple of 32) into [k / 32][16 pairs of k][16 rows][2] bf16.
    void (*pack)(const float* x, int64_t ldx, int64_t rows, int64_t k, uint16_t* out) = nullptr;

    // c[tile j][tile i] (+)= w tile j . x tile i for `n_tiles` tiles of 16 weight rows and `m_tiles` of
    // 16 activation rows over k columns (a multiple of 32).
    //   w  bf16, row r at w + r * ldw
    //   x  packed tiles, tile i at x + i * x_stride
    //   c  float [n_tiles][m_tiles][16 weight rows][16 activation rows]
    void (*multiply)(const uint16_t* w, int64_t ldw, int64_t n_tiles, const uint16_t* x, int64_t x_stride,
                     int64_t m_tiles, int64_t k, float* c, bool accumulate) = nullptr;

    // out[i][j] = tile[j][i] for a 16 x 16 tile; out rows ldo floats apart, only `rows` rows and
    // `columns` columns are written.
    void (*store_transposed)(const float* tile, float* out, int64_t ldo, int64_t rows,
                             int64_t columns) = nullptr;

    // Per thread: load and release the tile configuration.
    void (*begin)() = nullptr;
    void (*end)() = nullptr;
};

const Bf16Gemm* bf16_gemm_amx();

}  // namespace nybble
