// Rounding with feedback: columns are rounded one after another, and what each one lost is made up for
// by the columns after it (OBQ, GPTQ: arXiv:2210.17323).
#pragma once

#include <cstdint>

#include "core/cpu_features.h"

namespace nybble {

// Some neighbouring columns of a matrix. Matrices are row-major without gaps.
struct FeedbackTask {
    const float* values;  // (rows, columns), the errors of earlier columns already in them
    int64_t rows;
    int64_t columns;
    const float* factor;       // (columns, columns): this part of the upper Cholesky factor of H^-1
    const float* scales;       // (rows, groups)
    const float* zero_points;  // (rows, groups): codes that mean 0
    int64_t groups;
    const int32_t* group_of;  // (columns): which group a column is in
    float highest;            // the largest code
    uint8_t* codes;           // (rows, columns)
    float* errors;            // (rows, columns): (value - rounded) / factor[j][j] of column j
};

// Rows that are worked on together; `scratch` holds feedback_rows * (columns + 3) floats.
constexpr int64_t feedback_rows = 16;

// Every level gives the same bits as the plain loop over columns: products are rounded before sums.
using RoundWithFeedback = void (*)(const FeedbackTask& task, float* scratch);

void round_with_feedback_portable(const FeedbackTask& task, float* scratch);
#if NYBBLE_X86
void round_with_feedback_avx2(const FeedbackTask& task, float* scratch);
void round_with_feedback_avx512(const FeedbackTask& task, float* scratch);
#endif

RoundWithFeedback round_with_feedback_of(Isa isa);

}  // namespace nybble
