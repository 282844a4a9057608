// Scale and offset of a block: x is about offset + scale * code, codes 0 to `high`.
//
// As in scale_search.h, each candidate sets codes, and least squares gives the scale and the offset
// that fit them best. Sums are of u = x - base and c = code - base_code, so that what all elements have
// in common costs no precision: without weights base is the smallest value (or 0 if the offset may not be
// positive and no value is negative) and base_code 0; with weights they are the value and the code of
// the heaviest column, which can have nearly all of the weight and so adds nothing to the sums.
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
    Lanes q, qq, uq;  // of w * c, w * c^2, w * u * c
    Lanes base_code;
};

// What is the same for all candidates of a block.
struct AffineBlock {
    Lanes low, base;
    Lanes u;  // the sum of w * u
    Lanes total, per_total;
};

template <bool weighted>
NYBBLE_NOINLINE AffineSums affine_sums(const float* x, Weights<weighted> w, int n, float high,
                                       const AffineBlock& block, Lanes per_code, Lanes shift) {
    const auto code_of = [&](Lanes value) NYBBLE_LAMBDA_INLINE {
        return nearest(clamp((value - block.low) * per_code + shift, 0.0f, high));
    };
    const Lanes base_code = weighted ? code_of(block.base) : lanes(0.0f);
    Lanes q = lanes(0.0f), qq = lanes(0.0f), uq = lanes(0.0f);
    for (int i = 0; i < n; ++i) {
        const Lanes value = Lanes::load(x + i * N);
        Lanes c = code_of(value);
        if (weighted) c = c - base_code;
        const Lanes weighed = w.times(i, c);
        q = q + weighed;
        qq = qq + c * weighed;
        uq = uq + (value - block.base) * weighed;
    }
    return {q, qq, uq, base_code};
}

// The best scale and offset (from base) for given sums, and what they take off sum(w u^2).
template <bool below_zero, bool weighted>
NYBBLE_NOINLINE void solve_affine(const AffineSums& s, const AffineBlock& block, Lanes& scale, Lanes& offset,
                                  Lanes& gain) {
    const Lanes u = block.u;
    const Lanes numerator = s.uq - s.q * (u * block.per_total);
    // Where one code has nearly all the weight, what is left is rounding noise: no scale then.
    const Lanes difference = s.qq - s.q * (s.q * block.per_total);
    const Mask known = Lanes::less(s.qq * lanes(2e-5f), difference);
    scale = Lanes::select(known, ratio(numerator, difference), lanes(0.0f));
    offset = (u - scale * s.q) * block.per_total;
    gain = u * (u * block.per_total) + scale * numerator;
    if (weighted) offset = offset - scale * s.base_code;
    if (below_zero) {
        // An offset above zero, seen from base: then zero is the best that is allowed.
        const Lanes most = lanes(0.0f) - block.base;
        const Mask above = Lanes::less(most, offset);
        Lanes scale0, gain0;
        if (weighted) {
            const Lanes r = s.base_code, shifted = s.q + r * block.total;
            scale0 = ratio(s.uq + r * u - most * shifted, s.qq + r * (s.q + shifted));
            const Lanes e = most + scale0 * r;  // what the base's own code leaves of it
            gain0 = e * (u + u - e * block.total) + scale0 * (s.uq + s.uq - (e + e) * s.q - scale0 * s.qq);
        } else {
            scale0 = ratio(s.uq - most * s.q, s.qq);
            gain0 = most * (u + u - most * block.total) + scale0 * scale0 * s.qq;
        }
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
    AffineBlock block;
    block.low = low;
    block.base = weighted ? Lanes::load(x + w.heaviest(n) * N) : low;
    block.u = lanes(0.0f);
    for (int i = 0; i < n; ++i) block.u = block.u + w.times(i, Lanes::load(x + i * N) - block.base);
    block.total = lanes(w.sum(n));
    block.per_total = lanes(1.0f) / block.total;
    const Lanes per_range = inverse(top - low), below = low - block.base;

    // All values alike: code 0 stands for them, or in a block without offset code `high`.
    Lanes best_scale = lanes(0.0f), best_offset = block.u * block.per_total;
    Lanes best_gain = block.u * (block.u * block.per_total), mean = lanes(0.0f);
    if (below_zero) {
        const Lanes most = lanes(0.0f) - block.base;
        const Mask above = Lanes::less(most, best_offset);
        best_gain = Lanes::select(above, most * (block.u + block.u - most * block.total), best_gain);
        best_offset = Lanes::select(above, most, best_offset);
    }
    const auto consider = [&](const AffineSums& sums) NYBBLE_LAMBDA_INLINE {
        Lanes scale, offset, gain;
        solve_affine<below_zero, weighted>(sums, block, scale, offset, gain);
        const Mask better = Lanes::less(best_gain, gain);
        best_gain = Lanes::select(better, gain, best_gain);
        best_scale = Lanes::select(better, scale, best_scale);
        best_offset = Lanes::select(better, offset, best_offset);
        mean = Lanes::select(better, sums.base_code + sums.q * block.per_total, mean);
    };
    for (int c = 0; c < count; ++c) {
        const Lanes per_code = per_range * lanes(high + candidates[c].stretch);
        consider(affine_sums(x, w, n, high, block, per_code, lanes(candidates[c].shift)));
    }
    for (int round = 0; round < rounds; ++round) {
        const Lanes per_code = inverse(best_scale);
        consider(affine_sums(x, w, n, high, block, per_code, (below - best_offset) * per_code));
    }
    return {best_scale, block.base + best_offset, mean, low};
}

}  // namespace
}  // namespace nybble
