// The values that a code can stand for, before the scale: evenly spaced ones, the 16 of iq4_nl, and the
// 4-bit floats. `of` gives the level that is nearest to x, `code` the code of a level.
#pragma once

#include "kernels/iq_grids.h"
#include "quantize/generic/tile.h"

namespace nybble {
namespace {

// low, low + 1, ..., high; code 0 is low.
template <int low_, int high_>
struct EvenLevels {
    static constexpr float low = low_, high = high_;
    static NYBBLE_ALWAYS_INLINE Lanes of(Lanes x) { return nearest(clamp(x, low, high)); }
    static NYBBLE_ALWAYS_INLINE Lanes code(Lanes level) { return level - lanes(low); }
};

struct Iq4Tables {
    float middle[32], code[32], level[16];
};

constexpr Iq4Tables make_iq4_tables() {
    Iq4Tables t{};
    for (int i = 0; i < 16; ++i) t.level[i] = static_cast<float>(grids::kvalues_iq4nl[i]);
    int below = 0;  // the code of the level that is nearest at the start of the part
    for (int part = 0; part < 32; ++part) {
        const float start = static_cast<float>(8 * part - 128);
        t.code[part] = static_cast<float>(below);
        t.middle[part] = 1e9f;
        const float middle = below < 15 ? 0.5f * (t.level[below] + t.level[below + 1]) : 1e9f;
        if (middle < start + 8.0f) {
            t.middle[part] = middle;
            ++below;
        }
    }
    return t;
}

constexpr Iq4Tables iq4_tables = make_iq4_tables();

// -127, ..., 113 (kvalues_iq4nl). Within 8 units of length there is at most one middle between two
// levels, so that the eighth of x says which two levels come into question.
struct Iq4Levels {
    static constexpr float low = -127.0f, high = 113.0f;
    static NYBBLE_ALWAYS_INLINE Lanes code_of(Lanes x) {
        const Lanes inside = clamp(x, -127.0f, 113.0f);
        const Lanes part = nearest(inside * lanes(0.125f) + lanes(15.5f));
        const Lanes below = Lanes::lookup32(iq4_tables.code, part);
        const Lanes middle = Lanes::lookup32(iq4_tables.middle, part);
        return Lanes::select(Lanes::less(middle, inside), below + lanes(1.0f), below);
    }
    static NYBBLE_ALWAYS_INLINE Lanes of(Lanes x) { return Lanes::lookup16(iq4_tables.level, code_of(x)); }
};

// 0, 1, 2, 3, 4, 6, 8, 12 and their negatives: e2m1 doubled.
struct E2m1Levels {
    static NYBBLE_ALWAYS_INLINE Lanes of(Lanes x) {
        const Lanes inside = clamp(x, -12.0f, 12.0f), magnitude = Lanes::abs(inside);
        // A number whose unit in the last place is the step: adding it rounds to the step.
        const Lanes coarse =
            Lanes::select(Lanes::less(magnitude, lanes(8.0f)), lanes(0x1.8p24f), lanes(0x1.8p25f));
        const Lanes large = Lanes::select(Lanes::less(magnitude, lanes(4.0f)), lanes(0x1.8p23f), coarse);
        return (inside + large) - large;
    }
    static NYBBLE_ALWAYS_INLINE Lanes code_of(Lanes x) {
        const Lanes level = of(x), m = Lanes::abs(level);
        const Lanes half = Lanes::min(m * lanes(0.5f) + lanes(2.0f), lanes(7.0f));
        const Lanes code = Lanes::select(Lanes::less(m, lanes(5.0f)), m, half);
        return Lanes::select(Lanes::less(level, lanes(0.0f)), code + lanes(8.0f), code);
    }
};

}  // namespace
}  // namespace nybble
