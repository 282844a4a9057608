// q2_k, q4_k and q5_k: x is about d * scale * code - dmin * minimum, with small whole scales and minima
// for sub-blocks, none of them negative.
//
// First each sub-block is fitted by itself; d and dmin are such that the largest fits. Then, in turn:
// each sub-block takes, of the whole scales and minima next to what it has, those with the smallest
// error; and d and dmin are fitted to all codes by least squares. Neither step can raise the error, but
// for the rounding of d and dmin to float16.
#pragma once

#include "quantize/generic/affine_search.h"
#include "quantize/generic/legacy.h"
#include "quantize/generic/super_block.h"

namespace nybble {
namespace {

// Sums over a sub-block with given codes, and the error less sum(w x^2).
struct SubBlockSums {
    Lanes q, qq, xq, error;
};

template <bool weighted>
NYBBLE_NOINLINE SubBlockSums sub_block_sums(const float* x, Weights<weighted> w, int n, float high,
                                            Lanes total, Lanes sum_x, Lanes scale, Lanes offset) {
    const Lanes per_code = inverse(scale);
    Lanes q = lanes(0.0f), qq = lanes(0.0f), xq = lanes(0.0f);
    for (int i = 0; i < n; ++i) {
        const Lanes value = Lanes::load(x + i * N);
        const Lanes code = nearest(clamp((value - offset) * per_code, 0.0f, high));
        const Lanes weighed = w.times(i, code);
        q = q + weighed;
        qq = qq + code * weighed;
        xq = xq + value * weighed;
    }
    const Lanes cross = scale * q;
    const Lanes error =
        scale * scale * qq + offset * (cross + cross + offset * total - sum_x - sum_x) - (scale + scale) * xq;
    return {q, qq, xq, error};
}

template <int count_, int high_, int most_scale_, int most_minimum_, int neighbours_, int rounds_>
struct AffineK {
    static constexpr int count = count_, n = 256 / count_;
    static constexpr float high = high_, most_scale = most_scale_, most_minimum = most_minimum_;

    Lanes d, dmin;
    Lanes scale[count], minimum[count];  // whole numbers

    template <bool weighted, class T, int candidates>
    void fit(T& tile, Weights<weighted> w, const AffineCandidate (&tried)[candidates], int polish) {
        AffineFit parts[count];
        Lanes sum_x[count];
        float total[count];
        Lanes largest_scale = lanes(0.0f), largest_minimum = lanes(0.0f);
        for (int j = 0; j < count; ++j) {
            const Weights<weighted> own = w.from(n * j);
            const float* x = tile.x + n * j * N;
            parts[j] = search_affine<true>(x, own, n, high, tried, polish);
            total[j] = own.sum(n);
            sum_x[j] = lanes(0.0f);
            for (int i = 0; i < n; ++i) sum_x[j] = sum_x[j] + own.times(i, Lanes::load(x + i * N));
            largest_scale = Lanes::max(parts[j].scale, largest_scale);
            largest_minimum = Lanes::max(lanes(0.0f) - parts[j].offset, largest_minimum);
        }
        d = tile.as_half(largest_scale * lanes(1.0f / most_scale));
        dmin = tile.as_half(largest_minimum * lanes(1.0f / most_minimum));
        for (int j = 0; j < count; ++j) {
            scale[j] = nearest(clamp(parts[j].scale * inverse(d), 0.0f, most_scale));
            // The middle of the codes stays where it is when the scale is rounded.
            const Lanes offset = parts[j].offset + (parts[j].scale - d * scale[j]) * parts[j].mean_code;
            minimum[j] = nearest(clamp((lanes(0.0f) - offset) * inverse(dmin), 0.0f, most_minimum));
        }
        for (int round = 0; round < rounds_; ++round) {
            Lanes aa = lanes(0.0f), ab = aa, bb = aa, xa = aa, xb = aa;
            for (int j = 0; j < count; ++j) {
                const Weights<weighted> own = w.from(n * j);
                const SubBlockSums best = choose(tile.x + n * j * N, own, lanes(total[j]), sum_x[j], j);
                aa = aa + scale[j] * scale[j] * best.qq;
                ab = ab + scale[j] * minimum[j] * best.q;
                bb = bb + minimum[j] * minimum[j] * lanes(total[j]);
                xa = xa + scale[j] * best.xq;
                xb = xb + minimum[j] * sum_x[j];
            }
            refit(tile, aa, ab, bb, xa, xb);
        }
    }

    template <class T>
    NYBBLE_NOINLINE void encode(T& tile, int d_position, int dmin_position) {
        d = tile.put_half(d_position, d);
        dmin = tile.put_half(dmin_position, dmin);
        for (int j = 0; j < count; ++j) {
            to_affine_codes(tile, n * j, n, high, d * scale[j], lanes(0.0f) - dmin * minimum[j]);
        }
    }

   private:
    // Takes the best of scale + -1, 0, 1 and, around the minimum that then suits, + -1, 0, 1.
    template <bool weighted>
    NYBBLE_NOINLINE SubBlockSums choose(const float* x, Weights<weighted> w, Lanes total, Lanes sum_x,
                                        int j) {
        const Lanes old_scale = scale[j], old_minimum = minimum[j];
        SubBlockSums best =
            sub_block_sums(x, w, n, high, total, sum_x, d * old_scale, lanes(0.0f) - dmin * old_minimum);
        const Lanes mean = best.q / total;
        for (int step = -1; step <= 1; ++step) {
            const Lanes s = clamp(old_scale + lanes(static_cast<float>(step)), 0.0f, most_scale);
            const Lanes middle = nearest(old_minimum + (s - old_scale) * d * mean * inverse(dmin));
            for (int other = -neighbours_; other <= neighbours_; ++other) {
                if (step == 0 && other == 0) continue;
                const Lanes m = clamp(middle + lanes(static_cast<float>(other)), 0.0f, most_minimum);
                const SubBlockSums sums =
                    sub_block_sums(x, w, n, high, total, sum_x, d * s, lanes(0.0f) - dmin * m);
                const Mask better = Lanes::less(sums.error, best.error);
                best.q = Lanes::select(better, sums.q, best.q);
                best.qq = Lanes::select(better, sums.qq, best.qq);
                best.xq = Lanes::select(better, sums.xq, best.xq);
                best.error = Lanes::select(better, sums.error, best.error);
                scale[j] = Lanes::select(better, s, scale[j]);
                minimum[j] = Lanes::select(better, m, minimum[j]);
            }
        }
        return best;
    }

    // Least squares of x = d a - dmin b with a = scale * code and b = minimum.
    template <class T>
    NYBBLE_NOINLINE void refit(T& tile, Lanes aa, Lanes ab, Lanes bb, Lanes xa, Lanes xb) {
        const Lanes determinant = aa * bb - ab * ab;
        const Mask both = Lanes::less(aa * bb * lanes(1e-5f), determinant);
        const Lanes d2 = ratio(xa * bb - xb * ab, determinant), m2 = ratio(xa * ab - xb * aa, determinant);
        const Mask positive = Lanes::less(lanes(0.0f), Lanes::min(d2, m2));
        // With one of them held the other has a solution of its own.
        const Lanes alone = ratio(xa + dmin * ab, aa);
        const Lanes d1 = Lanes::select(Lanes::less(lanes(0.0f), alone), alone, d);
        const Lanes next_d = Lanes::select(both, Lanes::select(positive, d2, d1), d1);
        const Lanes next_m = Lanes::select(both, Lanes::select(positive, m2, dmin), dmin);
        d = tile.as_half(next_d);
        dmin = tile.as_half(next_m);
    }
};

struct QuantizeQ2K {
    static constexpr int size = 256, bytes = 84;
    static constexpr AffineCandidate tried[] = {
        {0.0f, 0.0f},    {0.3f, -0.15f}, {0.6f, -0.3f},   {0.9f, -0.45f}, {0.5f, 0.0f},
        {0.5f, -0.5f},   {1.0f, 0.0f},   {1.0f, -1.0f},   {-0.3f, 0.15f}, {1.2f, -0.6f},
        {1.5f, 0.0f},    {1.5f, -1.5f},  {0.75f, -0.75f}, {0.75f, 0.0f},  {0.25f, 0.0f},
        {0.25f, -0.25f}, {1.5f, -0.75f}, {1.0f, -0.5f},   {2.0f, -1.0f},  {-0.6f, 0.3f}};
    template <bool weighted>
    static void encode(Tile<size, bytes>& tile, Weights<weighted> w) {
        AffineK<16, 3, 15, 15, 1, 3> k;
        k.fit(tile, w, tried, 4);
        k.encode(tile, 80, 82);
        for (int j = 0; j < 16; ++j) tile.put_byte(j, k.scale[j] + k.minimum[j] * lanes(16.0f));
        put_two_bits(tile, 0, 16);
        put_two_bits(tile, 128, 48);
    }
};

// The twelve bytes of scales and minima of q4_k and q5_k; the lower four of each have all six bits
// together, the upper four are split.
template <class T>
NYBBLE_ALWAYS_INLINE void put_six_bits(T& tile, const Lanes* scale, const Lanes* minimum) {
    for (int j = 0; j < 4; ++j) {
        const Lanes high_scale = whole_part(scale[j + 4], 16.0f),
                    high_minimum = whole_part(minimum[j + 4], 16.0f);
        tile.put_byte(4 + j, scale[j] + high_scale * lanes(64.0f));
        tile.put_byte(8 + j, minimum[j] + high_minimum * lanes(64.0f));
        tile.put_byte(12 + j, scale[j + 4] - high_scale * lanes(16.0f) +
                                  (minimum[j + 4] - high_minimum * lanes(16.0f)) * lanes(16.0f));
    }
}

struct QuantizeQ4K {
    static constexpr int size = 256, bytes = 144;
    template <bool weighted>
    static void encode(Tile<size, bytes>& tile, Weights<weighted> w) {
        AffineK<8, 15, 63, 63, 1, 3> k;
        k.fit(tile, w, many_candidates, 4);
        k.encode(tile, 0, 2);
        put_six_bits(tile, k.scale, k.minimum);
        for (int r = 0; r < 4; ++r) {
            for (int i = 0; i < 32; ++i) {
                tile.put_byte(16 + 32 * r + i, tile.at(64 * r + i) + tile.at(64 * r + 32 + i) * lanes(16.0f));
            }
        }
    }
};

struct QuantizeQ5K {
    static constexpr int size = 256, bytes = 176;
    template <bool weighted>
    static void encode(Tile<size, bytes>& tile, Weights<weighted> w) {
        AffineK<8, 31, 63, 63, 1, 3> k;
        k.fit(tile, w, many_candidates, 4);
        k.encode(tile, 0, 2);
        put_six_bits(tile, k.scale, k.minimum);
        put_high_bit(tile, 16.0f, 16);
        for (int r = 0; r < 4; ++r) {
            for (int i = 0; i < 32; ++i) {
                tile.put_byte(48 + 32 * r + i, tile.at(64 * r + i) + tile.at(64 * r + 32 + i) * lanes(16.0f));
            }
        }
    }
};

}  // namespace
}  // namespace nybble
