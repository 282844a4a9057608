// Rounding to affine encodings; included by one file a level, which is compiled without contraction of
// a * b + c, so that all levels give the bits of the NumPy reference (quantize_groups in affine.py).
//
// Each candidate is a step for the codes; the scale that fits those codes best is then found by least
// squares, and the candidate with the smallest squared error wins, the first of equals. Squared errors
// may be weighted by column.
#include <cstdint>
#include <cstring>

#include "core/compiler.h"
#include "kernels/generic/half.h"
#include "kernels/quantize.h"

namespace nybble {
namespace {

constexpr int lanes = 8;
constexpr float smallest = 3.0092655e-36f;  // 2^-118: steps of smaller values could be infinite

// To the nearest integer, ties to even; |x| < 2^22.
NYBBLE_ALWAYS_INLINE float nearest(float x) { return (x + 12582912.0f) - 12582912.0f; }

NYBBLE_ALWAYS_INLINE float clamp(float x, float low, float high) {
    x = x < low ? low : x;
    return x > high ? high : x;
}

NYBBLE_ALWAYS_INLINE double total(const double (&sums)[lanes]) {
    return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

struct Sums {
    double vq, qq;
};

// The values of a group, and what their errors count (null: all alike).
struct Group {
    const float* v;
    const float* weight;
    int64_t n;
};

// Adds an element to the sums of v * q and q * q. Products of two floats are exact in float64.
template <bool weighted>
NYBBLE_ALWAYS_INLINE void accumulate(double v, [[maybe_unused]] double weight, double q, double& vq,
                                     double& qq) {
    if constexpr (weighted) {
        vq += (weight * v) * q;
        qq += (weight * q) * q;
    } else {
        vq += v * q;
        qq += q * q;
    }
}

// q = clamp(nearest(v * inverse) + zero, low, high) - zero, and the sums.
template <bool weighted>
NYBBLE_ALWAYS_INLINE Sums round_group(const Group& group, float inverse, float zero, float low, float high,
                                      float* q) {
    const float* v = group.v;
    const float* weight = weighted ? group.weight : group.v;
    double vq[lanes] = {};
    double qq[lanes] = {};
    int64_t i = 0;
    for (; i + lanes <= group.n; i += lanes) {
        for (int j = 0; j < lanes; ++j) {
            const float code = clamp(nearest(v[i + j] * inverse) + zero, low, high) - zero;
            q[i + j] = code;
            accumulate<weighted>(static_cast<double>(v[i + j]), static_cast<double>(weight[i + j]),
                                 static_cast<double>(code), vq[j], qq[j]);
        }
    }
    for (int j = 0; i < group.n; ++i, ++j) {
        const float code = clamp(nearest(v[i] * inverse) + zero, low, high) - zero;
        q[i] = code;
        accumulate<weighted>(static_cast<double>(v[i]), static_cast<double>(weight[i]),
                             static_cast<double>(code), vq[j], qq[j]);
    }
    return {total(vq), total(qq)};
}

template <bool weighted>
double sum_of_squares(const Group& group) {
    const float* v = group.v;
    const float* weight = weighted ? group.weight : group.v;
    double vv[lanes] = {};
    double unused[lanes] = {};
    int64_t i = 0;
    for (; i + lanes <= group.n; i += lanes) {
        for (int j = 0; j < lanes; ++j) {
            accumulate<weighted>(static_cast<double>(v[i + j]), static_cast<double>(weight[i + j]),
                                 static_cast<double>(v[i + j]), vv[j], unused[j]);
        }
    }
    for (int j = 0; i < group.n; ++i, ++j) {
        accumulate<weighted>(static_cast<double>(v[i]), static_cast<double>(weight[i]),
                             static_cast<double>(v[i]), vv[j], unused[j]);
    }
    return total(vv);
}

// As it is stored; writes the bytes.
float store_scale(float scale, ScaleType type, uint8_t* out) {
    if (type == ScaleType::f32) {
        memcpy(out, &scale, 4);
        return scale;
    }
    const uint16_t bits = type == ScaleType::f16 ? float_to_half(scale) : float_to_bf16(scale);
    memcpy(out, &bits, 2);
    return type == ScaleType::f16 ? half_to_float(bits) : bf16_to_float(bits);
}

bool is_finite(float x) { return x - x == 0.0f; }

// The best so far of one group.
struct Best {
    double error;
    float zero;
    float step = 0.0f;  // the scale as it is stored
    bool found = false;
    uint8_t scale[4] = {};
};

// Takes the codes in `q` if they are better, and then swaps the buffers.
void consider(const Sums& sums, double squares, float zero, ScaleType type, float*& q, float*& best_q,
              Best& best) {
    if (!(sums.qq > 0)) return;
    uint8_t bytes[4];
    const float scale = store_scale(static_cast<float>(sums.vq / sums.qq), type, bytes);
    if (!is_finite(scale)) return;
    const double s = static_cast<double>(scale);
    const double error = squares - s * (2.0 * sums.vq - s * sums.qq);
    if (best.found && !(error < best.error)) return;
    best.found = true;
    best.error = error;
    best.zero = zero;
    best.step = scale;
    memcpy(best.scale, bytes, sizeof bytes);
    float* swap = q;
    q = best_q;
    best_q = swap;
}

// Shares of the range that are tried where the search is wide.
constexpr float wide_shares[] = {0.75f, 0.7f, 0.65f, 0.6f, 0.55f, 0.5f,
                                 0.45f, 0.4f, 0.35f, 0.3f, 0.25f, 0.2f};

float largest_of(const Group& group) {
    float largest = 0.0f;
    float magnitude = 0.0f;
    for (int64_t i = 0; i < group.n; ++i) {
        const float absolute = group.v[i] < 0 ? -group.v[i] : group.v[i];
        if (absolute > magnitude) {
            magnitude = absolute;
            largest = group.v[i];
        }
    }
    return largest;
}

// The value of largest magnitude gets a code near either end, or one beyond it.
template <bool weighted>
void search_symmetric(const Group& group, const AffineFormat& format, bool wide, float*& q, float*& best_q,
                      Best& best) {
    struct Candidate {
        float sign, offset;
    };
    constexpr Candidate candidates[] = {
        {-1.0f, 0.0f}, {-1.0f, -0.5f}, {-1.0f, -1.0f}, {1.0f, -1.0f}, {-1.0f, 0.5f}, {-1.0f, 1.0f},
        {-1.0f, 1.5f}, {1.0f, -0.5f},  {1.0f, 0.0f},   {1.0f, 0.5f},  {1.0f, -1.5f}, {-1.0f, -1.5f},
    };
    const float half = static_cast<float>(1 << (format.bits - 1));
    const float largest = largest_of(group);
    const double squares = sum_of_squares<weighted>(group);
    const auto attempt = [&](float inverse) {
        const Sums sums = round_group<weighted>(group, inverse, 0.0f, -half, half - 1.0f, q);
        consider(sums, squares, half, format.scale, q, best_q, best);
    };
    for (const Candidate& c : candidates) attempt(c.sign * (half + c.offset) / largest);
    if (!wide) return;
    for (const float share : wide_shares) attempt(-half / (largest * share));
}

struct Range {
    float low, size;  // zero is always in it
};

Range range_of(const Group& group) {
    float low = 0.0f;
    float high = 0.0f;
    for (int64_t i = 0; i < group.n; ++i) {
        low = group.v[i] < low ? group.v[i] : low;
        high = group.v[i] > high ? group.v[i] : high;
    }
    return {low, high - low};
}

// The codes span the range of the values, zero included, or less; three zero points.
template <bool weighted>
void search_zero_point(const Group& group, const AffineFormat& format, bool wide, float*& q, float*& best_q,
                       Best& best) {
    constexpr float shares[] = {1.0f, 0.96f, 0.92f, 0.88f, 0.84f, 0.8f};
    constexpr float moves[] = {0.0f, -1.0f, 1.0f};
    const float highest = static_cast<float>((1 << format.bits) - 1);
    const Range range = range_of(group);
    if (!is_finite(range.size)) return;
    const double squares = sum_of_squares<weighted>(group);
    const float middle = nearest(-range.low * (highest / range.size));
    const auto attempt = [&](float share, float zero) {
        if (zero < 0.0f || zero > highest) return;
        const float inverse = highest / (range.size * share);
        const Sums sums = round_group<weighted>(group, inverse, zero, 0.0f, highest, q);
        consider(sums, squares, zero, format.scale, q, best_q, best);
    };
    for (const float share : shares) {
        for (const float move : moves) attempt(share, middle + move);
    }
    if (!wide) return;
    for (const float share : wide_shares) attempt(share, middle);
}

// Without a search: the scale follows from the extremes alone, and is rounded before the codes are made.
void round_plainly(const Group& group, const AffineFormat& format, float* best_q, Best& best) {
    const float half = static_cast<float>(1 << (format.bits - 1));
    const float highest = static_cast<float>((1 << format.bits) - 1);
    const Range range = range_of(group);
    const float scale = format.has_zero_point ? range.size / highest : largest_of(group) / -half;
    best.step = store_scale(scale, format.scale, best.scale);
    best.found = is_finite(best.step);
    if (!best.found) return;
    const float inverse = best.step == 0.0f ? 0.0f : 1.0f / best.step;
    best.zero = format.has_zero_point ? clamp(nearest(-range.low * inverse), 0.0f, highest) : half;
    const float low = -best.zero;
    const float high = format.has_zero_point ? highest - best.zero : half - 1.0f;
    for (int64_t i = 0; i < group.n; ++i) best_q[i] = nearest(clamp(group.v[i] * inverse, low, high));
}

template <bool weighted>
void search_group(const Group& group, const AffineFormat& format, bool wide, float*& q, float*& best_q,
                  Best& best) {
    if (format.has_zero_point) {
        search_zero_point<weighted>(group, format, wide, q, best_q, best);
    } else {
        search_symmetric<weighted>(group, format, wide, q, best_q, best);
    }
}

void pack_codes(const float* q, float zero, const AffineFormat& format, uint8_t* out) {
    const auto code = [&](int64_t i) { return static_cast<uint32_t>(static_cast<int32_t>(q[i] + zero)); };
    const int64_t n = format.group_size;
    if (format.bits == 8) {
        for (int64_t i = 0; i < n; ++i) out[i] = static_cast<uint8_t>(code(i));
    } else if (format.bits == 4) {
        const int64_t half = n % 32 == 0 ? 16 : 1;
        for (int64_t start = 0; start < n; start += 2 * half) {
            for (int64_t i = start; i < start + half; ++i) {
                *out++ = static_cast<uint8_t>(code(i) | (code(i + half) << 4));
            }
        }
    } else {
        uint32_t bits = 0;
        int count = 0;
        for (int64_t i = 0; i < n; ++i) {
            bits |= code(i) << count;
            for (count += format.bits; count >= 8; count -= 8, bits >>= 8)
                *out++ = static_cast<uint8_t>(bits);
        }
    }
}

bool quantize_groups(const GroupTask& task, const AffineFormat& format, StepSearch search, float* scratch) {
    const int64_t n = format.group_size;
    const int64_t scale_bytes = format.scale == ScaleType::f32 ? 4 : 2;
    const float half = static_cast<float>(1 << (format.bits - 1));
    const bool wide = search == StepSearch::wide;
    float* q = scratch;
    float* best_q = scratch + n;
    uint8_t* out = task.out;
    int64_t column = 0;
    for (int64_t g = 0; g < task.groups; ++g) {
        const float* values = task.values + g * n;
        const Group group{values, task.importance == nullptr ? nullptr : task.importance + column, n};
        column = column + n == task.columns ? 0 : column + n;
        Best best;
        best.zero = half;
        bool nothing = true;  // all values are as good as zero
        for (int64_t i = 0; i < n && nothing; ++i) {
            nothing = (values[i] < 0 ? -values[i] : values[i]) < smallest;
        }
        if (nothing) {
            best.zero = format.has_zero_point ? 0.0f : half;
            for (int64_t i = 0; i < n; ++i) best_q[i] = 0.0f;
        } else {
            if (search == StepSearch::none) {
                round_plainly(group, format, best_q, best);
            } else if (group.weight == nullptr) {
                search_group<false>(group, format, wide, q, best_q, best);
            } else {
                search_group<true>(group, format, wide, q, best_q, best);
            }
            if (!best.found) return false;
        }
        if (task.rounded != nullptr) {
            float* rounded = task.rounded + g * n;
            for (int64_t i = 0; i < n; ++i) rounded[i] = best_q[i] * best.step;
        }
        if (out == nullptr) continue;
        memcpy(out, best.scale, static_cast<size_t>(scale_bytes));
        out += scale_bytes;
        if (format.has_zero_point) *out++ = static_cast<uint8_t>(best.zero);
        pack_codes(best_q, best.zero, format, out);
        out += n * format.bits / 8;
    }
    return true;
}

}  // namespace
}  // namespace nybble
