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

// Writes `groups` encoded groups. `scratch` holds 2 * group_size floats. False if a scale does not fit
// its type. Every level gives the same bits: sums are in float64, in eight lanes, without contraction.
using QuantizeGroups = bool (*)(const float* values, int64_t groups, const AffineFormat& format,
                                float* scratch, uint8_t* out);

bool quantize_groups_portable(const float* values, int64_t groups, const AffineFormat& format, float* scratch,
                              uint8_t* out);
#if NYBBLE_X86
bool quantize_groups_avx2(const float* values, int64_t groups, const AffineFormat& format, float* scratch,
                          uint8_t* out);
#endif

QuantizeGroups quantize_groups_of(Isa isa);

}  // namespace nybble
