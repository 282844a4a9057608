// The nearest entry of a codebook, exactly, in weighted error, for N groups of values at a time.
//
// An entry is two halves, each one of a few patterns of levels. The error of an entry at scale s is
//
//   sum(w x^2) + s (s ll - 2 xl),   ll = sum(w level^2), xl = sum(w x level),
//
// and both sums are those of the halves added up. So a group needs one table over the patterns of each
// half, and an entry costs one addition and one comparison.
#pragma once

#include "kernels/iq_grids.h"
#include "quantize/generic/levels.h"

namespace nybble {
namespace {

// The grids of iq2 (8 values of 3 levels) and iq3 (4 values of 8 levels). `code` is the level's number.
struct GridIq2 {
    static constexpr int values = 8, levels = 3;
    static constexpr float level[levels] = {8.0f, 25.0f, 43.0f};
    static constexpr int code(int value) { return (value - 8) / 17; }
    // The level that is nearest to x.
    static NYBBLE_ALWAYS_INLINE Lanes of(Lanes x) {
        const Lanes low = Lanes::select(Lanes::less(x, lanes(16.5f)), lanes(8.0f), lanes(25.0f));
        return Lanes::select(Lanes::less(x, lanes(34.0f)), low, lanes(43.0f));
    }
};

struct GridIq3 {
    static constexpr int values = 4, levels = 8;
    static constexpr float level[levels] = {4.0f, 12.0f, 20.0f, 28.0f, 36.0f, 44.0f, 52.0f, 62.0f};
    static constexpr int code(int value) { return (value - 4) / 8; }
    static NYBBLE_ALWAYS_INLINE Lanes of(Lanes x) {
        return nearest(clamp(x * lanes(0.125f) - lanes(0.5f), 0.0f, 7.0f)) * lanes(8.0f) + lanes(4.0f);
    }
};

struct GridIq3s {
    static constexpr int values = 4, levels = 8;
    static constexpr float level[levels] = {1.0f, 3.0f, 5.0f, 7.0f, 9.0f, 11.0f, 13.0f, 15.0f};
    static constexpr int code(int value) { return (value - 1) / 2; }
    static NYBBLE_ALWAYS_INLINE Lanes of(Lanes x) {
        return nearest(clamp(x * lanes(0.5f) - lanes(0.5f), 0.0f, 7.0f)) * lanes(2.0f) + lanes(1.0f);
    }
};

struct GridIq2Xxs : GridIq2 {
    static constexpr int entries = 256;
    static constexpr uint64_t entry(int i) { return grids::iq2xxs[i]; }
};
struct GridIq2Xs : GridIq2 {
    static constexpr int entries = 512;
    static constexpr uint64_t entry(int i) { return grids::iq2xs[i]; }
};
struct GridIq2S : GridIq2 {
    static constexpr int entries = 1024;
    static constexpr uint64_t entry(int i) { return grids::iq2s[i]; }
};
struct GridIq3Xxs : GridIq3 {
    static constexpr int entries = 256;
    static constexpr uint64_t entry(int i) { return grids::iq3xxs[i]; }
};
struct GridIq3S : GridIq3s {
    static constexpr int entries = 512;
    static constexpr uint64_t entry(int i) { return grids::iq3s[i]; }
};

// The patterns of each entry's halves: the first value's level is the highest digit.
template <class Grid>
struct Halves {
    static constexpr int half = Grid::values / 2;
    static constexpr int patterns =
        half == 2 ? Grid::levels * Grid::levels : Grid::levels * Grid::levels * Grid::levels * Grid::levels;
    struct Table {
        uint8_t pattern[2][Grid::entries];
    };
    static constexpr Table make() {
        Table t{};
        for (int e = 0; e < Grid::entries; ++e) {
            for (int h = 0; h < 2; ++h) {
                int p = 0;
                for (int i = 0; i < half; ++i) {
                    const int value = static_cast<int>((Grid::entry(e) >> (8 * (h * half + i))) & 0xff);
                    p = p * Grid::levels + Grid::code(value);
                }
                t.pattern[h][e] = static_cast<uint8_t>(p);
            }
        }
        return t;
    }
    static constexpr Table table = make();
};

// The tables of one group.
template <class Grid>
struct GroupTables {
    static constexpr int half = Grid::values / 2, patterns = Halves<Grid>::patterns;
    alignas(64) float xl[2][patterns * N], ll[2][patterns * N], cost[2][patterns * N];

    template <bool weighted>
    NYBBLE_NOINLINE void set(const float* x, Weights<weighted> w) {
        for (int h = 0; h < 2; ++h) {
            lanes(0.0f).store(xl[h]);
            lanes(0.0f).store(ll[h]);
            int count = 1;
            for (int i = 0; i < half; ++i) {
                extend(x + (h * half + i) * N, w.from(h * half + i), count, xl[h], ll[h]);
                count *= Grid::levels;
            }
        }
    }

    struct Found {
        Lanes entry, xl, ll;
    };

    // The best entry at a scale, in each lane.
    NYBBLE_NOINLINE Found best(Lanes scale) {
        for (int h = 0; h < 2; ++h) {
            for (int p = 0; p < patterns; ++p) {
                const Lanes twice = Lanes::load(xl[h] + p * N);
                (scale * Lanes::load(ll[h] + p * N) - (twice + twice)).store(cost[h] + p * N);
            }
        }
        const auto& pattern = Halves<Grid>::table.pattern;
        // Four at a time, so that one comparison need not wait for the one before.
        constexpr int ways = 4;
        Lanes least[ways], entry[ways];
        for (int k = 0; k < ways; ++k) {
            least[k] = lanes(1e30f);
            entry[k] = lanes(0.0f);
        }
        for (int e = 0; e < Grid::entries; e += ways) {
            for (int k = 0; k < ways; ++k) {
                const Lanes sum = Lanes::load(cost[0] + pattern[0][e + k] * N) +
                                  Lanes::load(cost[1] + pattern[1][e + k] * N);
                const Mask better = Lanes::less(sum, least[k]);
                least[k] = Lanes::min(sum, least[k]);
                entry[k] = Lanes::select(better, lanes(static_cast<float>(e + k)), entry[k]);
            }
        }
        for (int k = 1; k < ways; ++k) {
            const Mask better = Lanes::less(least[k], least[0]);
            least[0] = Lanes::select(better, least[k], least[0]);
            entry[0] = Lanes::select(better, entry[k], entry[0]);
        }
        return {entry[0], part(xl, entry[0]), part(ll, entry[0])};
    }

   private:
    // Sums of `count` patterns become those of the patterns with one value more. From the last to the
    // first, as each leaves its place to others.
    template <bool weighted>
    static void extend(const float* x, Weights<weighted> w, int count, float* sum_xl, float* sum_ll) {
        const Lanes value = Lanes::load(x);
        for (int p = count - 1; p >= 0; --p) {
            const Lanes old_xl = Lanes::load(sum_xl + p * N), old_ll = Lanes::load(sum_ll + p * N);
            for (int c = Grid::levels - 1; c >= 0; --c) {
                const Lanes level = lanes(Grid::level[c]), weighed = w.times(0, level);
                const int place = (p * Grid::levels + c) * N;
                (old_xl + value * weighed).store(sum_xl + place);
                (old_ll + level * weighed).store(sum_ll + place);
            }
        }
    }

    static Lanes part(const float (&table)[2][patterns * N], Lanes entry) {
        alignas(64) float index[N], sum[N];
        entry.store(index);
        const auto& pattern = Halves<Grid>::table.pattern;
        for (int lane = 0; lane < N; ++lane) {
            const int e = static_cast<int>(index[lane]);
            sum[lane] = table[0][pattern[0][e] * N + lane] + table[1][pattern[1][e] * N + lane];
        }
        return Lanes::load(sum);
    }
};

}  // namespace
}  // namespace nybble
