// iq2_xxs, iq2_xs, iq2_s, iq3_xxs and iq3_s: x is about d * (2 scale + 1) * sign * entry of a codebook,
// a scale of four bits for each sub-block.
//
// Signs are those of the values. Where only patterns with an even number of negatives exist, the value
// that loses least, the one with the smallest w |x|, gets the wrong sign in a group that has an odd
// number. A scale is first searched for with every value at its nearest level, whatever the codebook
// holds; around the best one the entries are chosen exactly. Then d and the small scales are improved in
// turn, as in affine_k_types.h.
#pragma once

#include "quantize/generic/grid_search.h"
#include "quantize/generic/legacy.h"

namespace nybble {
namespace {

// Magnitudes in place of the 256 values, and the signs of each eight as a number: bit i is value i's.
template <bool even, bool weighted, class T>
NYBBLE_NOINLINE void split_signs(T& tile, Weights<weighted> w, uint8_t (&signs)[32 * N]) {
    for (int g = 0; g < 32; ++g) {
        Lanes bits = lanes(0.0f), count = bits, least = lanes(1e30f), place = bits;
        Lanes negatives[8];  // 1 or 0
        for (int i = 0; i < 8; ++i) {
            const Lanes value = tile.at(8 * g + i), magnitude = Lanes::abs(value);
            const Lanes negative = Lanes::select(Lanes::less(value, lanes(0.0f)), lanes(1.0f), lanes(0.0f));
            negatives[i] = negative;
            bits = bits + negative * lanes(static_cast<float>(1 << i));
            count = count + negative;
            tile.put(8 * g + i, magnitude);
            if (even) {
                const Lanes loss = w.times(8 * g + i, magnitude);
                const Mask smaller = Lanes::less(loss, least);
                least = Lanes::select(smaller, loss, least);
                place = Lanes::select(smaller, lanes(static_cast<float>(i)), place);
            }
        }
        if (even) {
            const Lanes odd = count - lanes(2.0f) * whole_part(count, 2.0f);
            const Mask wrong = Lanes::less(lanes(0.5f), odd);
            for (int i = 0; i < 8; ++i) {
                const Lanes bit = lanes(static_cast<float>(1 << i)), magnitude = tile.at(8 * g + i);
                const Lanes distance = Lanes::abs(place - lanes(static_cast<float>(i)));
                const Lanes here = Lanes::select(
                    wrong, Lanes::select(Lanes::less(distance, lanes(0.5f)), lanes(1.0f), lanes(0.0f)),
                    lanes(0.0f));
                tile.put(8 * g + i, magnitude - lanes(2.0f) * here * magnitude);
                bits = bits + here * bit * (lanes(1.0f) - lanes(2.0f) * negatives[i]);
            }
        }
        bits.store_byte(signs + g * N);
    }
}

template <class Grid, int count_, bool even_>
struct GridBlock {
    static constexpr int count = count_, n = 256 / count_, groups = n / Grid::values;
    static constexpr int all_groups = 256 / Grid::values;
    static constexpr float most = 15.0f;

    Lanes unit;          // the value of the smallest scale, 2 * 0 + 1
    Lanes scale[count];  // 0 to 15
    uint8_t signs[32 * N];
    float entries[all_groups * N];

    // `put_d` writes the unit as the type stores it and returns what it then is.
    template <bool weighted, class T, class PutD>
    NYBBLE_NOINLINE void fit(T& tile, Weights<weighted> w, const PutD& put_d) {
        split_signs<even_>(tile, w, signs);
        Lanes largest = lanes(0.0f);
        Lanes parts[count];
        for (int j = 0; j < count; ++j) {
            parts[j] = search(tile.x + n * j * N, w.from(n * j));
            largest = Lanes::max(parts[j], largest);
        }
        unit = largest * lanes(1.0f / (2.0f * most + 1.0f));
        for (int j = 0; j < count; ++j) scale[j] = nearest_scale(parts[j]);
        Lanes xa = lanes(0.0f), aa = lanes(0.0f);
        for (int j = 0; j < count; ++j) {
            const Sums best = choose(tile.x + n * j * N, w.from(n * j), j);
            const Lanes a = odd(scale[j]);
            xa = xa + a * best.xl;
            aa = aa + a * a * best.ll;
        }
        const Lanes fitted = ratio(xa, aa);
        unit = put_d(Lanes::select(Lanes::less(lanes(0.0f), fitted), fitted, unit));
        for (int j = 0; j < count; ++j) take_entries(tile.x + n * j * N, w.from(n * j), j);
    }

    int entry(int group, int lane) const { return static_cast<int>(entries[group * N + lane]); }
    int small_scale(int j, int lane) const {
        alignas(64) float s[N];
        scale[j].store(s);
        return static_cast<int>(s[lane]);
    }

   private:
    struct Sums {
        Lanes xl, ll;
    };

    static NYBBLE_ALWAYS_INLINE Lanes odd(Lanes s) { return s + s + lanes(1.0f); }
    NYBBLE_ALWAYS_INLINE Lanes nearest_scale(Lanes full) const {
        return nearest(clamp(full * inverse(unit) * lanes(0.5f) - lanes(0.5f), 0.0f, most));
    }

    // A scale for one sub-block by itself.
    template <bool weighted>
    Lanes search(const float* x, Weights<weighted> w) {
        constexpr float top = Grid::level[Grid::levels - 1];
        static constexpr float ends[] = {top, 0.9f * top, 1.15f * top, 1.3f * top, 1.5f * top, 1.75f * top};
        const ScaleSums first = search_scale<Grid>(x, w, n, ends, 1);
        const Lanes scale0 = first.scale();
        constexpr int tries = Grid::entries > 512 ? 1 : 3;
        static constexpr float factors[3] = {1.0f, 0.9f, 1.1f};
        Sums total[tries];
        for (Sums& t : total) t = {lanes(0.0f), lanes(0.0f)};
        for (int g = 0; g < groups; ++g) {
            tables.template set<weighted>(x + g * Grid::values * N, w.from(g * Grid::values));
            for (int t = 0; t < tries; ++t) {
                const auto found = tables.best(scale0 * lanes(factors[t]));
                total[t].xl = total[t].xl + found.xl;
                total[t].ll = total[t].ll + found.ll;
            }
        }
        Sums best = total[0];
        for (int t = 1; t < tries; ++t) {
            const Mask better =
                Lanes::less(best.xl * best.xl * total[t].ll, total[t].xl * total[t].xl * best.ll);
            best.xl = Lanes::select(better, total[t].xl, best.xl);
            best.ll = Lanes::select(better, total[t].ll, best.ll);
        }
        return ratio(best.xl, best.ll);
    }

    // Takes the best of scale + -1, 0, 1 for sub-block j.
    template <bool weighted>
    Sums choose(const float* x, Weights<weighted> w, int j) {
        constexpr int tries = 3;
        static constexpr float steps[tries] = {0.0f, -1.0f, 1.0f};
        Lanes tried[tries];
        Sums total[tries];
        for (int t = 0; t < tries; ++t) {
            tried[t] = clamp(scale[j] + lanes(steps[t]), 0.0f, most);
            total[t] = {lanes(0.0f), lanes(0.0f)};
        }
        for (int g = 0; g < groups; ++g) {
            tables.template set<weighted>(x + g * Grid::values * N, w.from(g * Grid::values));
            for (int t = 0; t < tries; ++t) {
                const auto found = tables.best(unit * odd(tried[t]));
                total[t].xl = total[t].xl + found.xl;
                total[t].ll = total[t].ll + found.ll;
            }
        }
        Sums best = total[0];
        Lanes best_error = lanes(1e30f);
        for (int t = 0; t < tries; ++t) {
            const Lanes full = unit * odd(tried[t]);
            const Lanes error = full * (full * total[t].ll - total[t].xl - total[t].xl);
            const Mask better = Lanes::less(error, best_error);
            best_error = Lanes::select(better, error, best_error);
            best.xl = Lanes::select(better, total[t].xl, best.xl);
            best.ll = Lanes::select(better, total[t].ll, best.ll);
            scale[j] = Lanes::select(better, tried[t], scale[j]);
        }
        return best;
    }

    // The entries of sub-block j at its scale.
    template <bool weighted>
    void take_entries(const float* x, Weights<weighted> w, int j) {
        for (int g = 0; g < groups; ++g) {
            tables.template set<weighted>(x + g * Grid::values * N, w.from(g * Grid::values));
            tables.best(unit * odd(scale[j])).entry.store(entries + (j * groups + g) * N);
        }
    }

    GroupTables<Grid> tables;
};

NYBBLE_ALWAYS_INLINE void put_u32(uint8_t* out, int position, int lane, uint32_t value) {
    for (int b = 0; b < 4; ++b) out[(position + b) * N + lane] = static_cast<uint8_t>(value >> (8 * b));
}

// A scale of four bits and four sign patterns of seven: the eighth sign follows from the others.
template <class B>
NYBBLE_ALWAYS_INLINE uint32_t scale_and_signs(const B& b, int j, int lane) {
    uint32_t word = static_cast<uint32_t>(b.small_scale(j, lane)) << 28;
    for (int k = 0; k < 4; ++k)
        word |= static_cast<uint32_t>(b.signs[(4 * j + k) * N + lane] & 0x7f) << (7 * k);
    return word;
}

struct QuantizeIq2Xxs {
    static constexpr int size = 256, bytes = 66;
    template <bool weighted>
    static void encode(Tile<size, bytes>& tile, Weights<weighted> w) {
        GridBlock<GridIq2Xxs, 8, true> b;
        b.fit(tile, w, [&](Lanes unit) { return tile.put_half(0, unit * lanes(8.0f)) * lanes(0.125f); });
        for (int j = 0; j < 8; ++j) {
            for (int lane = 0; lane < N; ++lane) {
                for (int k = 0; k < 4; ++k) {
                    tile.out[(2 + 8 * j + k) * N + lane] = static_cast<uint8_t>(b.entry(4 * j + k, lane));
                }
                put_u32(tile.out, 6 + 8 * j, lane, scale_and_signs(b, j, lane));
            }
        }
    }
};

struct QuantizeIq2Xs {
    static constexpr int size = 256, bytes = 74;
    template <bool weighted>
    static void encode(Tile<size, bytes>& tile, Weights<weighted> w) {
        GridBlock<GridIq2Xs, 16, true> b;
        b.fit(tile, w, [&](Lanes unit) { return tile.put_half(0, unit * lanes(8.0f)) * lanes(0.125f); });
        for (int k = 0; k < 32; ++k) {
            for (int lane = 0; lane < N; ++lane) {
                const int word = b.entry(k, lane) | (b.signs[k * N + lane] & 0x7f) << 9;
                tile.out[(2 + 2 * k) * N + lane] = static_cast<uint8_t>(word);
                tile.out[(3 + 2 * k) * N + lane] = static_cast<uint8_t>(word >> 8);
            }
        }
        for (int j = 0; j < 8; ++j) tile.put_byte(66 + j, b.scale[2 * j] + b.scale[2 * j + 1] * lanes(16.0f));
    }
};

struct QuantizeIq2S {
    static constexpr int size = 256, bytes = 82;
    template <bool weighted>
    static void encode(Tile<size, bytes>& tile, Weights<weighted> w) {
        GridBlock<GridIq2S, 16, false> b;
        b.fit(tile, w, [&](Lanes unit) { return tile.put_half(0, unit * lanes(8.0f)) * lanes(0.125f); });
        for (int lane = 0; lane < N; ++lane) {
            for (int k = 0; k < 32; ++k) {
                tile.out[(2 + k) * N + lane] = static_cast<uint8_t>(b.entry(k, lane));
                tile.out[(34 + k) * N + lane] = b.signs[k * N + lane];
            }
            for (int q = 0; q < 8; ++q) {
                int high = 0;
                for (int k = 0; k < 4; ++k) high |= (b.entry(4 * q + k, lane) >> 8) << (2 * k);
                tile.out[(66 + q) * N + lane] = static_cast<uint8_t>(high);
            }
        }
        for (int j = 0; j < 8; ++j) tile.put_byte(74 + j, b.scale[2 * j] + b.scale[2 * j + 1] * lanes(16.0f));
    }
};

struct QuantizeIq3Xxs {
    static constexpr int size = 256, bytes = 98;
    template <bool weighted>
    static void encode(Tile<size, bytes>& tile, Weights<weighted> w) {
        GridBlock<GridIq3Xxs, 8, true> b;
        b.fit(tile, w, [&](Lanes unit) { return tile.put_half(0, unit * lanes(4.0f)) * lanes(0.25f); });
        for (int lane = 0; lane < N; ++lane) {
            for (int k = 0; k < 64; ++k)
                tile.out[(2 + k) * N + lane] = static_cast<uint8_t>(b.entry(k, lane));
            for (int j = 0; j < 8; ++j) put_u32(tile.out, 66 + 4 * j, lane, scale_and_signs(b, j, lane));
        }
    }
};

struct QuantizeIq3S {
    static constexpr int size = 256, bytes = 110;
    template <bool weighted>
    static void encode(Tile<size, bytes>& tile, Weights<weighted> w) {
        GridBlock<GridIq3S, 8, false> b;
        b.fit(tile, w, [&](Lanes unit) { return tile.put_half(0, unit); });
        for (int lane = 0; lane < N; ++lane) {
            for (int k = 0; k < 64; ++k)
                tile.out[(2 + k) * N + lane] = static_cast<uint8_t>(b.entry(k, lane));
            for (int q = 0; q < 8; ++q) {
                int high = 0;
                for (int k = 0; k < 8; ++k) high |= (b.entry(8 * q + k, lane) >> 8) << k;
                tile.out[(66 + q) * N + lane] = static_cast<uint8_t>(high);
            }
            for (int k = 0; k < 32; ++k) tile.out[(74 + k) * N + lane] = b.signs[k * N + lane];
        }
        for (int j = 0; j < 4; ++j)
            tile.put_byte(106 + j, b.scale[2 * j] + b.scale[2 * j + 1] * lanes(16.0f));
    }
};

}  // namespace
}  // namespace nybble
