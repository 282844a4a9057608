// The table of encodings: one row each, in the order of the enum.
#include "core/encoding.h"

namespace nybble {

namespace {

constexpr EncodingInfo table[] = {
    {"f32", 1, 4},
    {"f16", 1, 2},
    {"bf16", 1, 2},
    {"q4_0", 32, 18},
    {"q4_1", 32, 20},
    {"q5_0", 32, 22},
    {"q5_1", 32, 24},
    {"q8_0", 32, 34},
    {"q8_1", 32, 36},
    {"q2_k", 256, 84},
    {"q3_k", 256, 110},
    {"q4_k", 256, 144},
    {"q5_k", 256, 176},
    {"q6_k", 256, 210},
    {"q8_k", 256, 292},
    {"iq1_s", 256, 50},
    {"iq1_m", 256, 56},
    {"iq2_xxs", 256, 66},
    {"iq2_xs", 256, 74},
    {"iq2_s", 256, 82},
    {"iq3_xxs", 256, 98},
    {"iq3_s", 256, 110},
    {"iq4_nl", 32, 18},
    {"iq4_xs", 256, 136},
    {"tq1_0", 256, 54},
    {"tq2_0", 256, 66},
    {"mxfp4", 32, 17},
    {"nvfp4", 64, 36},
    {"q1_0", 128, 18},
    {"q2_0", 64, 18},
    {"int4_g32_f32", 32, 20},
    {"int4_g32_f16_z", 32, 19},
    {"int4_g32_f32_z", 32, 21},
    {"int8_g32_f32", 32, 36},
    {"int4_g32_f32_m", 32, 24},
    {"int8_g32_f32_m", 32, 40},
};

static_assert(sizeof(table) / sizeof(table[0]) == static_cast<size_t>(Encoding::count));

}  // namespace

const EncodingInfo& encoding_info(Encoding encoding) { return table[static_cast<size_t>(encoding)]; }

Encoding encoding_from_name(std::string_view name) {
    for (int32_t i = 0; i < static_cast<int32_t>(Encoding::count); ++i) {
        if (name == table[i].name) return static_cast<Encoding>(i);
    }
    return Encoding::count;
}

}  // namespace nybble
