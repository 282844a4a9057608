// The float kernels, written once on Vec; included by <isa>/float_kernels.cpp after <isa>/vec.h.
// Everything here has internal linkage: each instruction set gets its own copy.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/float_kernels.h"

namespace nybble {
namespace {

constexpr int N = Vec::N;

// exp(x) to about 2 ulp: x = n ln 2 + r, polynomial of Cephes' expf for exp(r). Clamped where the
// result would not be a normal number.
NYBBLE_ALWAYS_INLINE Vec exp(Vec x) {
    x = Vec::min(Vec::max(x, Vec::set1(-87.0F)), Vec::set1(88.0F));
    const Vec n = Vec::round(x * Vec::set1(1.44269504088896341F));
    Vec r = Vec::fma(n, Vec::set1(-0.693359375F), x);
    r = Vec::fma(n, Vec::set1(2.12194440e-4F), r);
    Vec p = Vec::set1(1.9875691500e-4F);
    p = Vec::fma(p, r, Vec::set1(1.3981999507e-3F));
    p = Vec::fma(p, r, Vec::set1(8.3334519073e-3F));
    p = Vec::fma(p, r, Vec::set1(4.1665795894e-2F));
    p = Vec::fma(p, r, Vec::set1(1.6666665459e-1F));
    p = Vec::fma(p, r, Vec::set1(5.0000001201e-1F));
    p = Vec::fma(p, r * r, r + Vec::set1(1.0F));
    return Vec::ldexp(p, n);
}

// tanh(x) = 1 - 2 / (exp(2x) + 1), and x - x^3/3 + 2x^5/15 near zero, where that would cancel.

NYBBLE_ALWAYS_INLINE Vec tanh(Vec x) {
    const Vec one = Vec::set1(1.0F);
    const Vec big = one - Vec::set1(2.0F) / (exp(x + x) + one);
    const Vec x2 = x * x;
    Vec p = Vec::fma(x2, Vec::set1(-0.0539682540F), Vec::set1(0.1333333333F));
    p = Vec::fma(p, x2, Vec::set1(-0.3333333333F));
    const Vec small = Vec::fma(p * x2, x, x);
    const Vec limit = Vec::set1(0.15F);
    const Vec magnitude = Vec::abs(x);
    // Exactly one of the two terms is kept.
    return Vec::zero_below(magnitude, limit, big) + (small - Vec::zero_below(magnitude, limit, small));
}

void rms_norm(const float* x, const float* weight, float* out, int64_t n, float eps, float offset) {
    Vec sum0 = Vec::zero();
    Vec sum1 = Vec::zero();
    int64_t i = 0;
    for (; i + 2 * N <= n; i += 2 * N) {
        const Vec a = Vec::load(x + i);
        const Vec b = Vec::load(x + i + N);
        sum0 = Vec::fma(a, a, sum0);
        sum1 = Vec::fma(b, b, sum1);
    }
    float total = Vec::reduce_add(sum0 + sum1);
    for (; i < n; ++i) {
        total += x[i] * x[i];
    }
    const float scale = 1.0F / std::sqrt(total / static_cast<float>(n) + eps);
    const Vec factor = Vec::set1(scale);
    const Vec shift = Vec::set1(offset);
    for (i = 0; i + N <= n; i += N) {
        (Vec::load(x + i) * factor * (Vec::load(weight + i) + shift)).store(out + i);
    }
    for (; i < n; ++i) {
        out[i] = x[i] * scale * (weight[i] + offset);
    }
}

void add(const float* a, const float* b, float* out, int64_t n) {
    int64_t i = 0;
    for (; i + N <= n; i += N) {
        (Vec::load(a + i) + Vec::load(b + i)).store(out + i);
    }
    for (; i < n; ++i) {
        out[i] = a[i] + b[i];
    }
}

void scale(const float* x, float factor, float* out, int64_t n) {
    const Vec f = Vec::set1(factor);
    int64_t i = 0;
    for (; i + N <= n; i += N) {
        (Vec::load(x + i) * f).store(out + i);
    }
    for (; i < n; ++i) {
        out[i] = x[i] * factor;
    }
}

NYBBLE_ALWAYS_INLINE Vec silu(Vec x) { return x / (Vec::set1(1.0F) + exp(Vec::zero() - x)); }

NYBBLE_ALWAYS_INLINE Vec gelu_tanh(Vec x) {
    const Vec inner = x * Vec::fma(x * x, Vec::set1(0.7978845608F * 0.044715F), Vec::set1(0.7978845608F));
    return x * Vec::set1(0.5F) * (Vec::set1(1.0F) + tanh(inner));
}

// Applies `function` to blocks of N, the last one through a padded buffer, so that every element
// goes through the same arithmetic wherever it lies.
template <typename Function>
NYBBLE_ALWAYS_INLINE void elementwise2(const float* a, const float* b, float* out, int64_t n,
                                       Function function) {
    int64_t i = 0;
    for (; i + N <= n; i += N) {
        function(Vec::load(a + i), Vec::load(b + i)).store(out + i);
    }
    const int64_t rest = n - i;
    if (rest > 0) {
        float pa[N] = {};
        float pb[N] = {};
        for (int64_t j = 0; j < N && j < rest; ++j) {
            pa[j] = a[i + j];
            pb[j] = b[i + j];
        }
        function(Vec::load(pa), Vec::load(pb)).store(pa);
        for (int64_t j = 0; j < N && j < rest; ++j) {
            out[i + j] = pa[j];
        }
    }
}

void gated(const float* gate, const float* up, float* out, int64_t n, Activation kind) {
    switch (kind) {
        case Activation::silu:
            elementwise2(gate, up, out, n, [](Vec g, Vec u) NYBBLE_LAMBDA_INLINE { return silu(g) * u; });
            break;
        case Activation::gelu_tanh:
            elementwise2(gate, up, out, n,
                         [](Vec g, Vec u) NYBBLE_LAMBDA_INLINE { return gelu_tanh(g) * u; });
            break;
        case Activation::gelu:
            for (int64_t i = 0; i < n; ++i) {
                out[i] = 0.5F * gate[i] * (1.0F + std::erf(gate[i] * 0.70710678118F)) * up[i];
            }
            break;
    }
}

void softcap(const float* x, float cap, float* out, int64_t n) {
    const Vec c = Vec::set1(cap);
    const Vec inverse = Vec::set1(1.0F / cap);
    elementwise2(x, x, out, n, [=](Vec a, Vec) NYBBLE_LAMBDA_INLINE { return c * tanh(a * inverse); });
}

void rotate(float* head, const float* table, int64_t rotary_dim, bool interleaved) {
    const float* cosine = table;
    const float* sine = table + rotary_dim;
    if (interleaved) {
        int64_t i = 0;
        for (; i + N <= rotary_dim; i += N) {
            const Vec x = Vec::load(head + i);
            Vec::fma(x, Vec::load(cosine + i), Vec::swap_pairs(x) * Vec::load(sine + i)).store(head + i);
        }
        for (; i + 1 < rotary_dim; i += 2) {
            const float a = head[i];
            const float b = head[i + 1];
            head[i] = a * cosine[i] + b * sine[i];
            head[i + 1] = b * cosine[i + 1] + a * sine[i + 1];
        }
        return;
    }
    const int64_t half = rotary_dim / 2;
    int64_t i = 0;
    for (; i + N <= half; i += N) {
        const Vec a = Vec::load(head + i);
        const Vec b = Vec::load(head + i + half);
        const Vec c = Vec::load(cosine + i);
        const Vec s = Vec::load(sine + i);
        (a * c - b * s).store(head + i);
        Vec::fma(b, c, a * s).store(head + i + half);
    }
    for (; i < half; ++i) {
        const float a = head[i];
        const float b = head[i + half];
        head[i] = a * cosine[i] - b * sine[i];
        head[i + half] = b * cosine[i] + a * sine[i];
    }
}

void quantize_int8(const float* x, int64_t n, int8_t* values, float* scales, float* sums) {
    constexpr int kVecs = 32 / N;
    for (int64_t block = 0; block < n / 32; ++block) {
        Vec v[kVecs];
        Vec largest = Vec::zero();
        for (int i = 0; i < kVecs; ++i) {
            v[i] = Vec::load(x + block * 32 + i * N);
            largest = Vec::max(largest, Vec::abs(v[i]));
        }
        const float amax = Vec::reduce_max(largest);
        const float step = amax / 127.0F;
        const Vec inverse = Vec::set1(amax > 0 ? 127.0F / amax : 0.0F);
        Vec half[2] = {Vec::zero(), Vec::zero()};
        for (int i = 0; i < kVecs; ++i) {
            const Vec rounded = Vec::round(v[i] * inverse);
            rounded.store_i8(values + block * 32 + i * N);
            Vec& sum = half[i * N / 16];
            sum = sum + rounded;
        }
        scales[block] = step;
        sums[2 * block] = Vec::reduce_add(half[0]) * step;
        sums[2 * block + 1] = Vec::reduce_add(half[1]) * step;
    }
}

void quantize_int16(const float* x, int64_t n, int8_t* values, int8_t* high, float* scales, float* sums) {
    constexpr int kVecs = 32 / N;
    constexpr float kLargest = 127.0F * 256.0F;
    for (int64_t block = 0; block < n / 32; ++block) {
        Vec v[kVecs];
        Vec largest = Vec::zero();
        for (int i = 0; i < kVecs; ++i) {
            v[i] = Vec::load(x + block * 32 + i * N);
            largest = Vec::max(largest, Vec::abs(v[i]));
        }
        const float amax = Vec::reduce_max(largest);
        const float step = amax / kLargest;
        const Vec inverse = Vec::set1(amax > 0 ? kLargest / amax : 0.0F);
        Vec half[2] = {Vec::zero(), Vec::zero()};
        for (int i = 0; i < kVecs; ++i) {
            const Vec rounded = Vec::round(v[i] * inverse);
            // The half makes ties impossible: the low byte comes out in -128 .. 127.
            const Vec upper = Vec::round((rounded + Vec::set1(0.5F)) * Vec::set1(1.0F / 256.0F));
            upper.store_i8(high + block * 32 + i * N);
            (rounded - upper * Vec::set1(256.0F)).store_i8(values + block * 32 + i * N);
            Vec& sum = half[i * N / 16];
            sum = sum + rounded;
        }
        scales[block] = step;
        sums[2 * block] = Vec::reduce_add(half[0]) * step;
        sums[2 * block + 1] = Vec::reduce_add(half[1]) * step;
    }
}

// ROWS x COLUMNS dot products over k at once; each has its own accumulator, so its value does not
// depend on its neighbours.
template <int ROWS, int COLUMNS>
NYBBLE_ALWAYS_INLINE void dot_block(const float* x, int64_t ldx, const float* w, int64_t ldw, int64_t k,
                                    float* y, int64_t ldy) {
    Vec acc[ROWS][COLUMNS];
    for (int i = 0; i < ROWS; ++i) {
        for (int j = 0; j < COLUMNS; ++j) {
            acc[i][j] = Vec::zero();
        }
    }
    int64_t p = 0;
    for (; p + N <= k; p += N) {
        Vec b[COLUMNS];
        for (int j = 0; j < COLUMNS; ++j) {
            b[j] = Vec::load(w + j * ldw + p);
        }
        for (int i = 0; i < ROWS; ++i) {
            const Vec a = Vec::load(x + i * ldx + p);
            for (int j = 0; j < COLUMNS; ++j) {
                acc[i][j] = Vec::fma(a, b[j], acc[i][j]);
            }
        }
    }
    for (int i = 0; i < ROWS; ++i) {
        for (int j = 0; j < COLUMNS; ++j) {
            float total = Vec::reduce_add(acc[i][j]);
            for (int64_t q = p; q < k; ++q) {
                total += x[i * ldx + q] * w[j * ldw + q];
            }
            y[i * ldy + j] = total;
        }
    }
}

void gemm(const float* x, int64_t ldx, int64_t m, const float* w, int64_t ldw, int64_t n, int64_t k, float* y,
          int64_t ldy) {
    constexpr int R = Vec::kRows;
    constexpr int C = 4;
    int64_t i = 0;
    for (; i + R <= m; i += R) {
        int64_t j = 0;
        for (; j + C <= n; j += C) {
            dot_block<R, C>(x + i * ldx, ldx, w + j * ldw, ldw, k, y + i * ldy + j, ldy);
        }
        for (; j < n; ++j) {
            dot_block<R, 1>(x + i * ldx, ldx, w + j * ldw, ldw, k, y + i * ldy + j, ldy);
        }
    }
    for (; i < m; ++i) {
        int64_t j = 0;
        for (; j + C <= n; j += C) {
            dot_block<1, C>(x + i * ldx, ldx, w + j * ldw, ldw, k, y + i * ldy + j, ldy);
        }
        for (; j < n; ++j) {
            dot_block<1, 1>(x + i * ldx, ldx, w + j * ldw, ldw, k, y + i * ldy + j, ldy);
        }
    }
}

// As many rows of the tile at a time as registers hold: all with 32 registers of 16, four with 16 of 8.
// Bound by multiply-adds: each takes one value of a from the first-level cache.
void add_products(const float* a, const float* b, int64_t rows, float* c, int64_t ldc) {
    constexpr int kRows = N == 16 ? 16 : 4;
    constexpr int kVecs = kProductTile / N;
    for (int first = 0; first < kProductTile; first += kRows) {
        Vec acc[kRows][kVecs];
        for (int i = 0; i < kRows; ++i) {
            for (int v = 0; v < kVecs; ++v) {
                acc[i][v] = Vec::zero();
            }
        }
        for (int64_t t = 0; t < rows; ++t) {
            Vec y[kVecs];
            for (int v = 0; v < kVecs; ++v) {
                y[v] = Vec::load(b + t * kProductTile + v * N);
            }
            for (int i = 0; i < kRows; ++i) {
                const Vec x = Vec::set1(a[t * kProductTile + first + i]);
                for (int v = 0; v < kVecs; ++v) {
                    acc[i][v] = Vec::fma(x, y[v], acc[i][v]);
                }
            }
        }
        for (int i = 0; i < kRows; ++i) {
            for (int v = 0; v < kVecs; ++v) {
                float* to = c + (first + i) * ldc + v * N;
                (Vec::load(to) + acc[i][v]).store(to);
            }
        }
    }
}

}  // namespace
}  // namespace nybble

#include "kernels/generic/attention.inc.h"
#include "kernels/generic/kv_cache.inc.h"

namespace nybble {
namespace {

void to_bf16(const float* x, uint16_t* out, int64_t n) {
    int64_t i = 0;
    for (; i + N <= n; i += N) Vec::load(x + i).store_bf16(out + i);
    for (; i < n; ++i) out[i] = float_to_bf16(x[i]);
}

constexpr FloatKernels make_table(const char* name) {
    FloatKernels t;
    t.name = name;
    t.rms_norm = rms_norm;
    t.add = add;
    t.scale = scale;
    t.gated = gated;
    t.softcap = softcap;
    t.rotate = rotate;
    t.quantize_int8 = quantize_int8;
    t.quantize_int16 = quantize_int16;
    t.gemm = gemm;
    t.add_products = add_products;
    t.attention_tile = attention_tile;
    t.store_key = store_key;
    t.store_value = store_value;
    t.load_keys = load_keys;
    t.load_values = load_values;
    t.to_bf16 = to_bf16;
    return t;
}

}  // namespace
}  // namespace nybble
