// Encodings that kernels understand, by the names of nybble.checkpoint.encodings. Of the affine ones
// (int4_g32_f32 and so on) only groups of 32; their zero points are at most 16 (max_zero_point), and codes
// beside a minimum at most 127 (max_code_with_minimum).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace nybble {

enum class Encoding : int32_t {
    f32,
    f16,
    bf16,
    q4_0,
    q4_1,
    q5_0,
    q5_1,
    q8_0,
    q8_1,
    q2_k,
    q3_k,
    q4_k,
    q5_k,
    q6_k,
    q8_k,
    iq1_s,
    iq1_m,
    iq2_xxs,
    iq2_xs,
    iq2_s,
    iq3_xxs,
    iq3_s,
    iq4_nl,
    iq4_xs,
    tq1_0,
    tq2_0,
    mxfp4,
    nvfp4,
    q1_0,
    q2_0,
    int4_g32_f32,
    int4_g32_f16_z,
    int4_g32_f32_z,
    int8_g32_f32,
    int4_g32_f32_m,
    int8_g32_f32_m,
    count,
};

// The largest zero point of the 4-bit affine encodings here: AWQ's and ONNX's fit in 4 bits, GPTQ's is
// one more.
constexpr int max_zero_point = 16;

// The largest code of int8_g32_f32_m: kernels multiply signed bytes. GGUF's are of five bits.
constexpr int max_code_with_minimum = 127;

struct EncodingInfo {
    const char* name;
    int32_t block_size;   // elements
    int32_t block_bytes;  // bytes
};

// Row of the table; defined in encoding.cpp.
const EncodingInfo& encoding_info(Encoding encoding);

// Encoding of that name, or Encoding::count if there is none.
Encoding encoding_from_name(std::string_view name);

// Bytes of a row of `columns` elements (a multiple of the block size).
inline size_t row_bytes(Encoding encoding, int64_t columns) {
    const EncodingInfo& info = encoding_info(encoding);
    return static_cast<size_t>(columns / info.block_size) * static_cast<size_t>(info.block_bytes);
}

}  // namespace nybble
