// Rounding to affine encodings; included by one file a level, which is compiled without contraction of
// a * b + c, so that all levels give the bits of the NumPy reference (quantize_groups in affine.py).
//
// Each candidate is a step for the codes; the scale that fits those codes best is then found by least
// squares, and the candidate with the smallest squared error wins, the first of equals.
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

// q = clamp(nearest(v * inverse) + zero, low, high) - zero, and the sums of v * q and q * q.
NYBBLE_ALWAYS_INLINE Sums round_group(const float* v, int64_t n, float inverse, float zero, float low,
                                      float high, float* q) {
    double vq[lanes] = {};
    double qq[lanes] = {};
    int64_t i = 0;
    for (; i + lanes <= n; i += lanes) {
        for (int j = 0; j < lanes; ++j) {
            const float code = clamp(nearest(v[i + j] * inverse) + zero, low, high) - zero;
            q[i + j] = code;
            vq[j] += static_cast<double>(v[i + j]) * static_cast<double>(code);
            qq[j] += static_cast<double>(code) * static_cast<double>(code);
        }
    }
    for (int j = 0; i < n; ++i, ++j) {
        const float code = clamp(nearest(v[i] * inverse) + zero, low, high) - zero;
        q[i] = code;
        vq[j] += static_cast<double>(v[i]) * static_cast<double>(code);
        qq[j] += static_cast<double>(code) * static_cast<double>(code);
    }
    return {total(vq), total(qq)};
}

double sum_of_squares(const float* v, int64_t n) {
    double sums[lanes] = {};
    int64_t i = 0;
    for (; i + lanes <= n; i += lanes) {
        for (int j = 0; j < lanes; ++j)
            sums[j] += static_cast<double>(v[i + j]) * static_cast<double>(v[i + j]);
    }
    for (int j = 0; i < n; ++i, ++j) sums[j] += static_cast<double>(v[i]) * static_cast<double>(v[i]);
    return total(sums);
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
    memcpy(best.scale, bytes, sizeof bytes);
    float* swap = q;
    q = best_q;
    best_q = swap;
}

// The value of largest magnitude gets a code near either end.
void search_symmetric(const float* v, const AffineFormat& format, float*& q, float*& best_q, Best& best) {
    struct Candidate {
        float sign, offset;
    };
    constexpr Candidate candidates[] = {
        {-1.0f, 0.0f}, {-1.0f, -0.5f}, {-1.0f, -1.0f}, {1.0f, -1.0f}, {-1.0f, 0.5f}, {-1.0f, 1.0f},
        {-1.0f, 1.5f}, {1.0f, -0.5f},  {1.0f, 0.0f},   {1.0f, 0.5f},  {1.0f, -1.5f}, {-1.0f, -1.5f},
    };
    const int64_t n = format.group_size;
    const float half = static_cast<float>(1 << (format.bits - 1));
    float largest = 0.0f;
    float magnitude = 0.0f;
    for (int64_t i = 0; i < n; ++i) {
        const float absolute = v[i] < 0 ? -v[i] : v[i];
        if (absolute > magnitude) {
            magnitude = absolute;
            largest = v[i];
        }
    }
    if (magnitude < smallest) return;
    const double squares = sum_of_squares(v, n);
    for (const Candidate& c : candidates) {
        const float inverse = c.sign * (half + c.offset) / largest;
        const Sums sums = round_group(v, n, inverse, 0.0f, -half, half - 1.0f, q);
        consider(sums, squares, half, format.scale, q, best_q, best);
    }
}

// The codes span the range of the values, zero included, or somewhat less; three zero points.
void search_zero_point(const float* v, const AffineFormat& format, float*& q, float*& best_q, Best& best) {
    constexpr float shares[] = {1.0f, 0.96f, 0.92f, 0.88f, 0.84f, 0.8f};
    constexpr float moves[] = {0.0f, -1.0f, 1.0f};
    const int64_t n = format.group_size;
    const float highest = static_cast<float>((1 << format.bits) - 1);
    float low = 0.0f;
    float high = 0.0f;
    for (int64_t i = 0; i < n; ++i) {
        low = v[i] < low ? v[i] : low;
        high = v[i] > high ? v[i] : high;
    }
    const float range = high - low;
    if (!is_finite(range)) return;
    const double squares = sum_of_squares(v, n);
    const float middle = nearest(-low * (highest / range));
    for (const float share : shares) {
        const float inverse = highest / (range * share);
        for (const float move : moves) {
            const float zero = middle + move;
            if (zero < 0.0f || zero > highest) continue;
            const Sums sums = round_group(v, n, inverse, zero, 0.0f, highest, q);
            consider(sums, squares, zero, format.scale, q, best_q, best);
        }
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

bool quantize_groups(const float* values, int64_t groups, const AffineFormat& format, float* scratch,
                     uint8_t* out) {
    const int64_t scale_bytes = format.scale == ScaleType::f32 ? 4 : 2;
    const float half = static_cast<float>(1 << (format.bits - 1));
    float* q = scratch;
    float* best_q = scratch + format.group_size;
    for (int64_t g = 0; g < groups; ++g, values += format.group_size) {
        Best best;
        best.zero = half;
        bool nothing = true;  // all values are as good as zero
        for (int64_t i = 0; i < format.group_size && nothing; ++i) {
            nothing = (values[i] < 0 ? -values[i] : values[i]) < smallest;
        }
        if (nothing) {
            best.zero = format.has_zero_point ? 0.0f : half;
            for (int64_t i = 0; i < format.group_size; ++i) best_q[i] = 0.0f;
        } else {
            if (format.has_zero_point) {
                search_zero_point(values, format, q, best_q, best);
            } else {
                search_symmetric(values, format, q, best_q, best);
            }
            if (!best.found) return false;
        }
        memcpy(out, best.scale, static_cast<size_t>(scale_bytes));
        out += scale_bytes;
        if (format.has_zero_point) *out++ = static_cast<uint8_t>(best.zero);
        pack_codes(best_q, best.zero, format, out);
        out += format.group_size * format.bits / 8;
    }
    return true;
}

}  // namespace
}  // namespace nybble
