// Block layouts of the affine encodings with groups of 32, in the form of blocks.h. They come from
// AWQ, GPTQ, compressed-tensors and ONNX files (those with a minimum from GGUF through ONNX);
// nybble.checkpoint.encodings.affine describes them.
#pragma once

#include "kernels/blocks.h"

namespace nybble {
namespace {

NYBBLE_ALWAYS_INLINE float read_f32(const uint8_t* p) { return float_from_bits(read_u32(p)); }

// | scale float32 4 | nibbles 16 |    x = scale * (q - 8)
struct BlockInt4F32 {
    static constexpr int size = 32, bytes = 20;
    static constexpr bool has_minimum = false;
    static void unpack(const uint8_t* block, int8_t* q, float* scale, float*) {
        fill_groups(scale, 2, read_f32(block));
        unpack_nibbles(block + 4, 8, q);
    }
};

// | scale 2 | zero point 1 | nibbles 16 |    x = scale * (q - zero point)
struct BlockInt4F16Z {
    static constexpr int size = 32, bytes = 19;
    static constexpr bool has_minimum = false;
    static void unpack(const uint8_t* block, int8_t* q, float* scale, float*) {
        fill_groups(scale, 2, read_f16(block));
        unpack_nibbles(block + 3, block[2], q);
    }
};

// | scale float32 4 | zero point 1 | nibbles 16 |    x = scale * (q - zero point)
struct BlockInt4F32Z {
    static constexpr int size = 32, bytes = 21;
    static constexpr bool has_minimum = false;
    static void unpack(const uint8_t* block, int8_t* q, float* scale, float*) {
        fill_groups(scale, 2, read_f32(block));
        unpack_nibbles(block + 5, block[4], q);
    }
};

// | scale float32 4 | bytes 32 |    x = scale * (q - 128)
struct BlockInt8F32 {
    static constexpr int size = 32, bytes = 36;
    static constexpr bool has_minimum = false;
    static void unpack(const uint8_t* block, int8_t* q, float* scale, float*) {
        fill_groups(scale, 2, read_f32(block));
        for (int i = 0; i < 32; ++i) q[i] = static_cast<int8_t>(block[4 + i] - 128);
    }
};

// | scale float32 4 | minimum float32 4 | nibbles 16 |    x = scale * q + minimum
struct BlockInt4F32M {
    static constexpr int size = 32, bytes = 24;
    static constexpr bool has_minimum = true;
    static void unpack(const uint8_t* block, int8_t* q, float* scale, float* minimum) {
        fill_groups(scale, 2, read_f32(block));
        fill_groups(minimum, 2, read_f32(block + 4));
        unpack_nibbles(block + 8, 0, q);
    }
};

// | scale float32 4 | minimum float32 4 | bytes 32, at most 127 |    x = scale * q + minimum
struct BlockInt8F32M {
    static constexpr int size = 32, bytes = 40;
    static constexpr bool has_minimum = true;
    static void unpack(const uint8_t* block, int8_t* q, float* scale, float* minimum) {
        fill_groups(scale, 2, read_f32(block));
        fill_groups(minimum, 2, read_f32(block + 4));
        memcpy(q, block + 8, 32);
    }
};

}  // namespace
}  // namespace nybble
