// Scale and offset of a block: x is about offset + scale * code, codes 0 to `high`.
//
// As in scale_search.h, each candidate sets codes, and least squares gives the scale and the offset
// that fit them best. Sums are of u = x - low, where low is the smallest value (or 0 if the offset may
// not be positive and no value is negative), so that an offset much larger than the range costs no
// precision.
#pragma once

#include "quantize/generic/levels.h"

namespace nybble {
namespace {

// The codes are those of (1 + stretch / high) times the range, moved up by `shift` codes.
struct AffineCandidate {
    float stretch, shift;
};

struct AffineFit {
    Lanes scale, offset;
    Lanes mean_code;  // weighted
    Lanes low;        // the smallest value, or 0 if the offset may not be positive and that is smaller
};

struct AffineSums {
    Lanes q, qq, uq;  // of w * code, w * code^2, w * u * code
};

template <bool weighted>
NYBBLE_NOINLINE AffineSums affine_sums(const float* x, Weights<weighted> w, int n, float high, Lanes low,
                                       Lanes per_code, Lanes shift) {
    Lanes q = lanes(0.0f), qq = lanes(0.0f), uq = lanes(0.0f);
    for (int i = 0; i < n; ++i) {
        const Lanes u = Lanes::load(x + i * N) - low;
        const Lanes code = nearest(clamp(u * per_code + shift, 0.0f, high));
        const Lanes weighed = w.times(i, code);
        q = q + weighed;
        qq = qq + code * weighed;
        uq = uq + u * weighed;
    }
    return {q, qq, uq};
}

// The best scale and offset for given sums, and what they take off sum(w u^2).
template <bool below_zero>
NYBBLE_NOINLINE void solve_affine(const AffineSums& s, Lanes total, Lanes per_total, Lanes u, Lanes low,
                                  Lanes& scale, Lanes& offset, Lanes& gain) {
    const Lanes numerator = s.uq - s.q * (u * per_total);
    // Where one code has nearly all the weight, what is left is rounding noise: no scale then.
    const Lanes difference = s.qq - s.q * (s.q * per_total);
    const Mask known = Lanes::less(s.qq * lanes(2e-5f), difference);
    scale = Lanes::select(known, ratio(numerator, difference), lanes(0.0f));
    offset = (u - scale * s.q) * per_total;
    gain = u * (u * per_total) + scale * numerator;
    if (below_zero) {
        // An offset above zero, seen from low: then zero is the best that is allowed.
        const Lanes most = lanes(0.0f) - low;
        const Mask above = Lanes::less(most, offset);
        const Lanes scale0 = ratio(s.uq - most * s.q, s.qq);
        const Lanes gain0 = most * (u + u - most * total) + scale0 * scale0 * s.qq;
        scale = Lanes::select(above, scale0, scale);
        offset = Lanes::select(above, most, offset);
        gain = Lanes::select(above, gain0, gain);
    }
}

// `below_zero`: the offset must not be positive.
template <bool below_zero, bool weighted, int count>
NYBBLE_NOINLINE AffineFit search_affine(const float* x, Weights<weighted> w, int n, float high,
                                        const AffineCandidate (&candidates)[count], int rounds) {
    Lanes low = Lanes::load(x), top = low;
    for (int i = 1; i < n; ++i) {
        const Lanes value = Lanes::load(x + i * N);
        low = Lanes::min(value, low);
        top = Lanes::max(value, top);
    }
    if (below_zero) low = Lanes::min(low, lanes(0.0f));
    Lanes u = lanes(0.0f);
    for (int i = 0; i < n; ++i) u = u + w.times(i, Lanes::load(x + i * N) - low);
    const Lanes total = lanes(w.sum(n)), per_total = lanes(1.0f) / total;
    const Lanes per_range = inverse(top - low);

    // All values alike: code 0 stands for them, or in a block without offset code `high`.
    Lanes best_scale = lanes(0.0f), best_offset = u * per_total, best_gain = u * (u * per_total);
    Lanes mean = lanes(0.0f);
    if (below_zero) {
        const Lanes most = lanes(0.0f) - low;
        const Mask above = Lanes::less(most, best_offset);
        best_gain = Lanes::select(above, most * (u + u - most * total), best_gain);
        best_offset = Lanes::select(above, most, best_offset);
    }
    const auto consider = [&](const AffineSums& sums) NYBBLE_LAMBDA_INLINE {
        Lanes scale, offset, gain;
        solve_affine<below_zero>(sums, total, per_total, u, low, scale, offset, gain);
        const Mask better = Lanes::less(best_gain, gain);
        best_gain = Lanes::select(better, gain, best_gain);
        best_scale = Lanes::select(better, scale, best_scale);
        best_offset = Lanes::select(better, offset, best_offset);
        mean = Lanes::select(better, sums.q * per_total, mean);
    };
    for (int c = 0; c < count; ++c) {
        const Lanes per_code = per_range * lanes(high + candidates[c].stretch);
        consider(affine_sums(x, w, n, high, low, per_code, lanes(candidates[c].shift)));
    }
    for (int round = 0; round < rounds; ++round) {
        const Lanes per_code = inverse(best_scale);
        consider(affine_sums(x, w, n, high, low, per_code, lanes(0.0f) - best_offset * per_code));
    }
    return {best_scale, low + best_offset, mean, low};
}

}  // namespace
}  // namespace nybble
