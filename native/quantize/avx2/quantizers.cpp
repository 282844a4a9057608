// The block quantizers with AVX2.
// clang-format off: lanes.h first
#include "quantize/avx2/lanes.h"
#include "quantize/generic/table.h"
// clang-format on

namespace nybble {

QuantizeRows block_quantizer_avx2(Encoding encoding) { return quantizer_of(encoding); }

}  // namespace nybble
