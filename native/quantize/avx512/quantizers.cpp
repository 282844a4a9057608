// The block quantizers with AVX-512.
// clang-format off: lanes.h first
#include "quantize/avx512/lanes.h"
#include "quantize/generic/table.h"
// clang-format on

namespace nybble {

QuantizeRows block_quantizer_avx512(Encoding encoding) { return quantizer_of(encoding); }

}  // namespace nybble
