// Packing of affine encodings: from the arrays of ONNX's MatMulNBits to blocks.
#pragma once

#include <cstdint>

namespace nybble {

// Writes `groups` groups one after another, each
//
//   | scale scale_bytes | zero point 1, if there are any | nibbles group_size / 2 |
//
// `packed` holds element 2i low and 2i + 1 high in byte i; in the output byte i of each 16 holds
// elements i and i + 16 of 32, as in GGUF's blocks. group_size is a multiple of 32. `zero_points`
// (one a group) may be null.
void join_nibbles(const uint8_t* packed, const uint8_t* scales, int64_t scale_bytes,
                  const uint8_t* zero_points, int64_t groups, int64_t group_size, uint8_t* out);

}  // namespace nybble
