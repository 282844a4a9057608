// Rounding to the affine encodings of nybble.checkpoint.encodings.affine, with a search for the scale.
#pragma once

#include <cstdint>

#include "core/cpu_features.h"

namespace nybble {

enum class ScaleType : int32_t { f32, f16, bf16 };

struct AffineFormat {
    int32_t bits;        // 2, 3, 4 or 8
    int64_t group_size;  // group_size * bits is a multiple of 8
    ScaleType scale;
    bool has_zero_point;
};

// Which steps between codes are tried for a group.
enum class StepSearch : int32_t {
    none,    // one: the largest value, or the range, gets the outermost codes
    narrow,  // down to about 0.8 of it
    wide,    // down to 0.2 of it: groups of hundreds of values, or weighted ones
};

// What is rounded, and what for.
struct GroupTask {
    const float* values;      // groups * group_size, finite
    const float* importance;  // null, or what a squared error counts in each column: above 0
    int64_t columns;          // elements of `importance`, a multiple of group_size
    int64_t groups;
    uint8_t* out;    // encoded groups, or null
    float* rounded;  // what they stand for, or null
};

// Rounds groups. `scratch` holds 2 * group_size floats. False if a scale does not fit its type. Every
// level gives the same bits: sums are in float64, in eight lanes, without contraction.
using QuantizeGroups = bool (*)(const GroupTask& task, const AffineFormat& format, StepSearch search,
                                float* scratch);

bool quantize_groups_portable(const GroupTask& task, const AffineFormat& format, StepSearch search,
                              float* scratch);
#if NYBBLE_X86
bool quantize_groups_avx2(const GroupTask& task, const AffineFormat& format, StepSearch search,
                          float* scratch);
#endif

QuantizeGroups quantize_groups_of(Isa isa);

}  // namespace nybble
