// The block quantizers in plain C++.
// clang-format off: lanes.h first
#include "quantize/portable/lanes.h"
#include "quantize/generic/table.h"
// clang-format on

namespace nybble {

QuantizeRows block_quantizer_portable(Encoding encoding) { return quantizer_of(encoding); }

}  // namespace nybble
