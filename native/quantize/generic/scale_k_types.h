// q3_k, q6_k and iq4_xs: x is about d * scale * level, with small whole scales of either sign for
// sub-blocks. The same steps as in affine_k_types.h without the minimum.
#pragma once

#include "quantize/generic/legacy.h"
#include "quantize/generic/super_block.h"

namespace nybble {
namespace {

template <class Levels, int count_, int least_scale_>
struct ScaleK {
    static constexpr int count = count_, n = 256 / count_;
    static constexpr float least_scale = least_scale_, most_scale = -least_scale_ - 1;

    Lanes d;
    Lanes scale[count];  // whole numbers

    template <bool weighted, class T, int candidates>
    void fit(T& tile, Weights<weighted> w, const float (&ends)[candidates], int polish, int rounds) {
        Lanes parts[count];
        Lanes magnitude = lanes(0.0f), largest = lanes(0.0f);
        for (int j = 0; j < count; ++j) {
            parts[j] = search_scale<Levels>(tile.x + n * j * N, w.from(n * j), n, ends, polish).scale();
            const Lanes absolute = Lanes::abs(parts[j]);
            largest = Lanes::select(Lanes::less(magnitude, absolute), parts[j], largest);
            magnitude = Lanes::max(absolute, magnitude);
        }
        d = tile.as_half(largest * lanes(1.0f / least_scale));
        for (int j = 0; j < count; ++j) {
            scale[j] = nearest(clamp(parts[j] * inverse(d), least_scale, most_scale));
        }
        for (int round = 0; round < rounds; ++round) {
            Lanes xa = lanes(0.0f), aa = lanes(0.0f);
            for (int j = 0; j < count; ++j) {
                const ScaleSums best = choose(tile.x + n * j * N, w.from(n * j), j);
                xa = xa + scale[j] * best.xl;
                aa = aa + scale[j] * scale[j] * best.ll;
            }
            const Lanes fitted = ratio(xa, aa);
            d = tile.as_half(Lanes::select(Lanes::less(lanes(0.0f), Lanes::abs(fitted)), fitted, d));
        }
    }

    template <class T>
    NYBBLE_ALWAYS_INLINE void encode(T& tile, int d_position) {
        d = tile.put_half(d_position, d);
    }

   private:
    // Takes the best of scale + -1, 0, 1.
    template <bool weighted>
    NYBBLE_NOINLINE ScaleSums choose(const float* x, Weights<weighted> w, int j) {
        const Lanes old = scale[j];
        ScaleSums best{lanes(0.0f), lanes(0.0f)};
        Lanes best_error = lanes(1e30f);
        static constexpr float steps[] = {0.0f, -1.0f, 1.0f};
        for (const float step : steps) {
            const Lanes s = clamp(old + lanes(step), least_scale, most_scale);
            const Lanes full = d * s;
            const ScaleSums sums = scale_sums<Levels>(x, w, n, inverse(full));
            const Lanes error = full * (full * sums.ll - sums.xl - sums.xl);
            const Mask better = Lanes::less(error, best_error);
            best.xl = Lanes::select(better, sums.xl, best.xl);
            best.ll = Lanes::select(better, sums.ll, best.ll);
            best_error = Lanes::select(better, error, best_error);
            scale[j] = Lanes::select(better, s, scale[j]);
        }
        return best;
    }
};

struct QuantizeQ3K {
    static constexpr int size = 256, bytes = 110;
    static constexpr float ends[] = {-4.0f, 3.5f,  -3.5f, -4.5f, 3.0f,  -3.0f, 4.0f,  -5.0f, -4.2f, 3.8f,
                                     2.6f,  -2.7f, -3.8f, 3.2f,  -3.2f, 2.8f,  -2.4f, 4.4f,  -5.6f, 2.3f};
    template <bool weighted>
    static void encode(Tile<size, bytes>& tile, Weights<weighted> w) {
        using Levels = EvenLevels<-4, 3>;
        ScaleK<Levels, 16, -32> k;
        k.fit(tile, w, ends, 3, 3);
        k.encode(tile, 108);
        for (int j = 0; j < 16; ++j) to_codes<Levels>(tile, 16 * j, 16, k.d * k.scale[j]);
        put_high_bit(tile, 4.0f, 0);
        put_two_bits(tile, 0, 32);
        put_two_bits(tile, 128, 64);
        Lanes low[16], high[16];
        for (int j = 0; j < 16; ++j) {
            const Lanes code = k.scale[j] + lanes(32.0f);
            high[j] = whole_part(code, 16.0f);
            low[j] = code - high[j] * lanes(16.0f);
        }
        for (int j = 0; j < 8; ++j) tile.put_byte(96 + j, low[j] + low[j + 8] * lanes(16.0f));
        for (int j = 0; j < 4; ++j) {
            tile.put_byte(104 + j, high[j] + high[j + 4] * lanes(4.0f) + high[j + 8] * lanes(16.0f) +
                                       high[j + 12] * lanes(64.0f));
        }
    }
};

struct QuantizeQ6K {
    static constexpr int size = 256, bytes = 210;
    static constexpr float ends[] = {-32.0f, 31.0f, -31.0f, -33.0f, 31.5f,  -30.4f, -32.4f, 30.5f,
                                     -31.5f, 30.0f, -29.7f, 32.0f,  -33.6f, 29.4f,  -29.0f, 31.2f};
    template <bool weighted>
    static void encode(Tile<size, bytes>& tile, Weights<weighted> w) {
        using Levels = EvenLevels<-32, 31>;
        ScaleK<Levels, 16, -128> k;
        k.fit(tile, w, ends, 2, 3);
        k.encode(tile, 208);
        for (int j = 0; j < 16; ++j) {
            to_codes<Levels>(tile, 16 * j, 16, k.d * k.scale[j]);
            tile.put_byte(192 + j, Lanes::select(Lanes::less(k.scale[j], lanes(0.0f)),
                                                 k.scale[j] + lanes(256.0f), k.scale[j]));
        }
        for (int r = 0; r < 2; ++r) {
            for (int i = 0; i < 32; ++i) {
                Lanes upper = lanes(0.0f), low[4];
                for (int p = 0; p < 4; ++p) {
                    const Lanes code = tile.at(128 * r + 32 * p + i), high = whole_part(code, 16.0f);
                    upper = upper + high * lanes(static_cast<float>(1 << (2 * p)));
                    low[p] = code - high * lanes(16.0f);
                }
                tile.put_byte(64 * r + i, low[0] + low[2] * lanes(16.0f));
                tile.put_byte(64 * r + 32 + i, low[1] + low[3] * lanes(16.0f));
                tile.put_byte(128 + 32 * r + i, upper);
            }
        }
    }
};

struct QuantizeIq4Xs {
    static constexpr int size = 256, bytes = 136;
    template <bool weighted>
    static void encode(Tile<size, bytes>& tile, Weights<weighted> w) {
        ScaleK<Iq4Levels, 8, -32> k;
        k.fit(tile, w, QuantizeIq4Nl::ends, 3, 3);
        k.encode(tile, 0);
        Lanes high[8], low[8];
        for (int j = 0; j < 8; ++j) {
            const Lanes per_level = inverse(k.d * k.scale[j]);
            for (int i = 32 * j; i < 32 * j + 32; ++i)
                tile.put(i, Iq4Levels::code_of(tile.at(i) * per_level));
            put_nibbles(tile, 32 * j, 8 + 16 * j);
            const Lanes code = k.scale[j] + lanes(32.0f);
            high[j] = whole_part(code, 16.0f);
            low[j] = code - high[j] * lanes(16.0f);
        }
        for (int b = 0; b < 2; ++b) {
            tile.put_byte(2 + b, high[4 * b] + high[4 * b + 1] * lanes(4.0f) +
                                     high[4 * b + 2] * lanes(16.0f) + high[4 * b + 3] * lanes(64.0f));
        }
        for (int b = 0; b < 4; ++b) tile.put_byte(4 + b, low[2 * b] + low[2 * b + 1] * lanes(16.0f));
    }
};

}  // namespace
}  // namespace nybble
