// Rounding with feedback; included by one file a level, compiled without contraction of a * b + c.
//
// Rows do not depend on each other, so that 16 of them are turned into lanes: every operation is then a
// full vector, whatever the number of columns. What bounds it is one load, one multiplication, one
// subtraction and one store for each pair of columns.
#include <cstdint>

#include "core/compiler.h"
#include "kernels/feedback.h"

namespace nybble {
namespace {

constexpr int64_t lanes = feedback_rows;

// To the nearest integer, ties to even; |x| < 2^22.
NYBBLE_ALWAYS_INLINE float nearest(float x) { return (x + 12582912.0f) - 12582912.0f; }

// NaN becomes `low`, so that every result can be a code.
NYBBLE_ALWAYS_INLINE float clamp(float x, float low, float high) {
    x = x > low ? x : low;
    return x < high ? x : high;
}

// Rounds column j of the lanes; their values become its errors.
NYBBLE_ALWAYS_INLINE void round_column(float* NYBBLE_RESTRICT w, const float* NYBBLE_RESTRICT scale,
                                       const float* NYBBLE_RESTRICT inverse,
                                       const float* NYBBLE_RESTRICT zero, float highest, float diagonal,
                                       float* NYBBLE_RESTRICT code) {
    for (int64_t r = 0; r < lanes; ++r) {
        const float q = nearest(clamp(w[r] * inverse[r], -zero[r], highest - zero[r]));
        w[r] = (w[r] - q * scale[r]) / diagonal;
        code[r] = q + zero[r];
    }
}

// One tile of up to 16 rows. `w` is (columns, 16); its columns become errors one after another.
void round_tile(const FeedbackTask& task, int64_t first, int64_t rows, float* w, float* grid) {
    const int64_t n = task.columns;
    float* scale = grid;
    float* inverse = grid + lanes;
    float* zero = grid + 2 * lanes;
    for (int64_t r = 0; r < lanes; ++r) {  // lanes without a row repeat the last one
        const float* row = task.values + (first + (r < rows ? r : rows - 1)) * n;
        for (int64_t j = 0; j < n; ++j) w[j * lanes + r] = row[j];
    }
    int32_t group = -1;
    for (int64_t j = 0; j < n; ++j) {
        if (task.group_of[j] != group) {
            group = task.group_of[j];
            for (int64_t r = 0; r < lanes; ++r) {
                const int64_t at = (first + (r < rows ? r : rows - 1)) * task.groups + group;
                scale[r] = task.scales[at];
                inverse[r] = scale[r] == 0.0f ? 0.0f : 1.0f / scale[r];
                zero[r] = task.zero_points[at];
            }
        }
        const float* factor = task.factor + j * n;
        float* error = w + j * lanes;
        float code[lanes];
        round_column(error, scale, inverse, zero, task.highest, factor[j], code);
        for (int64_t r = 0; r < rows; ++r) {
            task.codes[(first + r) * n + j] = static_cast<uint8_t>(static_cast<int32_t>(code[r]));
        }
        for (int64_t k = j + 1; k < n; ++k) {
            float* NYBBLE_RESTRICT later = w + k * lanes;
            const float share = factor[k];
            for (int64_t r = 0; r < lanes; ++r) later[r] -= error[r] * share;
        }
    }
    for (int64_t r = 0; r < rows; ++r) {
        float* row = task.errors + (first + r) * n;
        for (int64_t j = 0; j < n; ++j) row[j] = w[j * lanes + r];
    }
}

void round_with_feedback(const FeedbackTask& task, float* scratch) {
    for (int64_t first = 0; first < task.rows; first += lanes) {
        const int64_t rows = task.rows - first < lanes ? task.rows - first : lanes;
        round_tile(task, first, rows, scratch, scratch + task.columns * lanes);
    }
}

}  // namespace
}  // namespace nybble
