// One tile of attention with online softmax, on Vec; included by float_kernels.inc.h, whose exp, scale
// and softcap it uses.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/float_kernels.h"

namespace nybble {
namespace {

template <int COUNT>
struct RowCount {
    static constexpr int value = COUNT;
};

// Calls run(RowCount<n>, first row) for groups of kRows rows, and once for what is left.
template <typename Run>
NYBBLE_ALWAYS_INLINE void by_rows(int64_t rows, const Run& run) {
    int64_t r = 0;
    for (; r + Vec::kRows <= rows; r += Vec::kRows) {
        run(RowCount<Vec::kRows>{}, r);
    }
    switch (rows - r) {
        case 3:
            run(RowCount < Vec::kRows<3 ? 1 : 3>{}, r);
            break;
        case 2:
            run(RowCount < Vec::kRows<2 ? 1 : 2>{}, r);
            break;
        case 1:
            run(RowCount<1>{}, r);
            break;
        default:
            break;
    }
}

// scores[r][0..64) = q[r] . k for ROWS rows and 4 vectors of columns at a time.
template <int ROWS>
NYBBLE_ALWAYS_INLINE void score_rows(const float* q, int64_t d, const float* k, float* scores) {
    for (int t = 0; t < kPageTokens; t += 4 * N) {
        Vec acc[ROWS][4];
        for (int r = 0; r < ROWS; ++r) {
            for (int j = 0; j < 4; ++j) {
                acc[r][j] = Vec::zero();
            }
        }
        for (int64_t i = 0; i < d; ++i) {
            const float* row = k + i * kPageTokens + t;
            Vec b[4];
            for (int j = 0; j < 4; ++j) {
                b[j] = Vec::load(row + j * N);
            }
            for (int r = 0; r < ROWS; ++r) {
                const Vec a = Vec::set1(q[r * d + i]);
                for (int j = 0; j < 4; ++j) {
                    acc[r][j] = Vec::fma(a, b[j], acc[r][j]);
                }
            }
        }
        for (int r = 0; r < ROWS; ++r) {
            for (int j = 0; j < 4; ++j) {
                acc[r][j].store(scores + r * kPageTokens + t + j * N);
            }
        }
    }
}

// acc[r][0..d) += scores[r][t] * v[t] for tile columns first <= t < last.
template <int ROWS>
NYBBLE_ALWAYS_INLINE void weigh_rows(const float* scores, int64_t d, const float* v, int first, int last,
                                     float* acc) {
    int64_t i = 0;
    for (; i + 4 * N <= d; i += 4 * N) {
        Vec sum[ROWS][4];
        for (int r = 0; r < ROWS; ++r) {
            for (int j = 0; j < 4; ++j) {
                sum[r][j] = Vec::load(acc + r * d + i + j * N);
            }
        }
        for (int t = first; t < last; ++t) {
            Vec b[4];
            for (int j = 0; j < 4; ++j) {
                b[j] = Vec::load(v + t * d + i + j * N);
            }
            for (int r = 0; r < ROWS; ++r) {
                const Vec a = Vec::set1(scores[r * kPageTokens + t]);
                for (int j = 0; j < 4; ++j) {
                    sum[r][j] = Vec::fma(a, b[j], sum[r][j]);
                }
            }
        }
        for (int r = 0; r < ROWS; ++r) {
            for (int j = 0; j < 4; ++j) {
                sum[r][j].store(acc + r * d + i + j * N);
            }
        }
    }
    for (; i + N <= d; i += N) {
        Vec sum[ROWS];
        for (int r = 0; r < ROWS; ++r) {
            sum[r] = Vec::load(acc + r * d + i);
        }
        for (int t = first; t < last; ++t) {
            const Vec b = Vec::load(v + t * d + i);
            for (int r = 0; r < ROWS; ++r) {
                sum[r] = Vec::fma(Vec::set1(scores[r * kPageTokens + t]), b, sum[r]);
            }
        }
        for (int r = 0; r < ROWS; ++r) {
            sum[r].store(acc + r * d + i);
        }
    }
    for (; i < d; ++i) {
        for (int r = 0; r < ROWS; ++r) {
            float sum = acc[r * d + i];
            for (int t = first; t < last; ++t) {
                sum += scores[r * kPageTokens + t] * v[t * d + i];
            }
            acc[r * d + i] = sum;
        }
    }
}

void attention_tile(const float* q, int64_t rows, int64_t d, const float* k, const float* v,
                    const int32_t* lo, const int32_t* hi, float cap, float* maximum, float* sum, float* acc,
                    float* scores) {
    constexpr float kMasked = -1e30F;
    int first = kPageTokens;
    int last = 0;
    for (int64_t r = 0; r < rows; ++r) {
        if (lo[r] < hi[r]) {
            first = lo[r] < first ? lo[r] : first;
            last = hi[r] > last ? hi[r] : last;
        }
    }
    if (first >= last) {
        return;
    }
    by_rows(rows, [&](auto count, int64_t r) NYBBLE_LAMBDA_INLINE {
        score_rows<decltype(count)::value>(q + r * d, d, k, scores + r * kPageTokens);
    });
    for (int64_t r = 0; r < rows; ++r) {
        float* row = scores + r * kPageTokens;
        if (cap > 0) {
            softcap(row, cap, row, kPageTokens);
        }
        for (int t = 0; t < lo[r]; ++t) {
            row[t] = kMasked;
        }
        for (int t = hi[r] > 0 ? hi[r] : 0; t < kPageTokens; ++t) {
            row[t] = kMasked;
        }
        Vec largest = Vec::load(row);
        for (int t = N; t < kPageTokens; t += N) {
            largest = Vec::max(largest, Vec::load(row + t));
        }
        const float old_maximum = maximum[r];
        const float tile_maximum = Vec::reduce_max(largest);
        const float new_maximum = tile_maximum > old_maximum ? tile_maximum : old_maximum;
        const Vec shift = Vec::set1(new_maximum);
        const Vec limit = Vec::set1(0.5F * kMasked);
        Vec total = Vec::zero();
        for (int t = 0; t < kPageTokens; t += N) {
            const Vec x = Vec::load(row + t);
            const Vec p = Vec::zero_below(x, limit, exp(x - shift));
            p.store(row + t);
            total = total + p;
        }
        const float tile_sum = Vec::reduce_add(total);
        if (new_maximum > old_maximum) {
            const float correction =
                old_maximum < 0.5F * kMasked ? 0.0F : std::exp(old_maximum - new_maximum);
            sum[r] = sum[r] * correction + tile_sum;
            scale(acc + r * d, correction, acc + r * d, d);
            maximum[r] = new_maximum;
        } else {
            sum[r] += tile_sum;
        }
    }
    by_rows(rows, [&](auto count, int64_t r) NYBBLE_LAMBDA_INLINE {
        weigh_rows<decltype(count)::value>(scores + r * kPageTokens, d, v, first, last, acc + r * d);
    });
}

}  // namespace
}  // namespace nybble
