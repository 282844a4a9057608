// Quantizers of GGUF's block types: from float32 to the blocks with, as nearly as is known how, the
// smallest squared error, each column weighed by its importance.
//
// Blocks are computed side by side, one in each lane (portable/lanes.h); every level of instruction set
// and any number of threads write the same bytes.
#pragma once

#include <cstdint>

#include "core/cpu_features.h"
#include "core/encoding.h"

namespace nybble {

enum class Quantized : int { done, not_finite, scale_too_large };

// values: `rows` rows of `columns`, a whole number of blocks. importance: `columns` finite numbers that
// are not negative, or null: then all columns count alike. out: the rows' blocks, if they can be made.
using QuantizeRows = Quantized (*)(const float* values, int64_t rows, int64_t columns,
                                   const float* importance, uint8_t* out);

// The quantizer of an encoding at a level; null where there is none.
QuantizeRows block_quantizer(Encoding encoding, Isa isa);

// Runs it in several threads.
Quantized quantize_blocks(QuantizeRows quantize, Encoding encoding, const float* values, int64_t rows,
                          int64_t columns, const float* importance, int threads, uint8_t* out);

QuantizeRows block_quantizer_portable(Encoding encoding);
#if NYBBLE_X86
QuantizeRows block_quantizer_avx2(Encoding encoding);
QuantizeRows block_quantizer_avx512(Encoding encoding);
#endif

}  // namespace nybble
