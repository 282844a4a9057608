// The scale of a block without minimum: x is about scale * level.
//
// Each candidate sets a step for the levels; the scale that then fits best is, by least squares,
// sum(w x l) / sum(w l l), and it takes sum(w x l)^2 / sum(w l l) off the squared error. The best
// candidate is improved by choosing levels and fitting in turn.
#pragma once

#include "quantize/generic/levels.h"

namespace nybble {
namespace {

// Sums over a block: of w * x * level and w * level * level.
struct ScaleSums {
    Lanes xl, ll;
    NYBBLE_ALWAYS_INLINE Lanes scale() const { return ratio(xl, ll); }
    // What the error is less, as scale * scale * ll would have it.
    NYBBLE_ALWAYS_INLINE Lanes gain() const { return ratio(xl * xl, ll); }
};

template <class Levels, bool weighted>
NYBBLE_NOINLINE ScaleSums scale_sums(const float* x, Weights<weighted> w, int n, Lanes per_level) {
    Lanes xl = lanes(0.0f), ll = lanes(0.0f);
    for (int i = 0; i < n; ++i) {
        const Lanes value = Lanes::load(x + i * N);
        const Lanes level = Levels::of(value * per_level);
        const Lanes weighed = w.times(i, level);
        xl = xl + value * weighed;
        ll = ll + level * weighed;
    }
    return {xl, ll};
}

// The value of largest magnitude, with its sign.
NYBBLE_NOINLINE Lanes largest_of(const float* x, int n) {
    Lanes magnitude = lanes(0.0f), largest = lanes(0.0f);
    for (int i = 0; i < n; ++i) {
        const Lanes value = Lanes::load(x + i * N);
        const Lanes absolute = Lanes::abs(value);
        largest = Lanes::select(Lanes::less(magnitude, absolute), value, largest);
        magnitude = Lanes::max(absolute, magnitude);
    }
    return largest;
}

// `ends` are the levels that the largest value may get; two are tried at a time.
template <class Levels, bool weighted, int count>
NYBBLE_NOINLINE ScaleSums search_scale(const float* x, Weights<weighted> w, int n, const float (&ends)[count],
                                       int rounds) {
    static_assert(count % 2 == 0);
    const Lanes per_largest = inverse(largest_of(x, n));
    ScaleSums best{lanes(0.0f), lanes(1.0f)};
    for (int c = 0; c < count; c += 2) {
        const Lanes first = per_largest * lanes(ends[c]), second = per_largest * lanes(ends[c + 1]);
        ScaleSums a{lanes(0.0f), lanes(0.0f)}, b = a;
        for (int i = 0; i < n; ++i) {
            const Lanes value = Lanes::load(x + i * N);
            const Lanes la = Levels::of(value * first), lb = Levels::of(value * second);
            const Lanes wa = w.times(i, la), wb = w.times(i, lb);
            a.xl = a.xl + value * wa;
            a.ll = a.ll + la * wa;
            b.xl = b.xl + value * wb;
            b.ll = b.ll + lb * wb;
        }
        const ScaleSums both[] = {a, b};
        for (const ScaleSums& sums : both) {
            const Mask better = Lanes::less(best.xl * best.xl * sums.ll, sums.xl * sums.xl * best.ll);
            best.xl = Lanes::select(better, sums.xl, best.xl);
            best.ll = Lanes::select(better, sums.ll, best.ll);
        }
    }
    for (int round = 0; round < rounds; ++round) {
        const ScaleSums sums = scale_sums<Levels>(x, w, n, inverse(best.scale()));
        const Mask better = Lanes::less(best.xl * best.xl * sums.ll, sums.xl * sums.xl * best.ll);
        best.xl = Lanes::select(better, sums.xl, best.xl);
        best.ll = Lanes::select(better, sums.ll, best.ll);
    }
    return best;
}

}  // namespace
}  // namespace nybble
