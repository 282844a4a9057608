// Which encoding has which quantizer; included by one file a level.
#pragma once

#include "core/encoding.h"
#include "quantize/blocks.h"
#include "quantize/generic/affine_k_types.h"
#include "quantize/generic/grid_types.h"
#include "quantize/generic/kernel.h"
#include "quantize/generic/legacy.h"
#include "quantize/generic/scale_k_types.h"
#include "quantize/generic/small_floats.h"
#include "quantize/generic/ternary.h"

namespace nybble {
namespace {

QuantizeRows quantizer_of(Encoding encoding) {
    switch (encoding) {
        case Encoding::q4_0:
            return quantize_rows<QuantizeQ4_0>;
        case Encoding::q4_1:
            return quantize_rows<QuantizeQ4_1>;
        case Encoding::q5_0:
            return quantize_rows<QuantizeQ5_0>;
        case Encoding::q5_1:
            return quantize_rows<QuantizeQ5_1>;
        case Encoding::q8_0:
            return quantize_rows<QuantizeQ8_0>;
        case Encoding::q1_0:
            return quantize_rows<QuantizeQ1_0>;
        case Encoding::q2_0:
            return quantize_rows<QuantizeQ2_0>;
        case Encoding::q2_k:
            return quantize_rows<QuantizeQ2K>;
        case Encoding::q3_k:
            return quantize_rows<QuantizeQ3K>;
        case Encoding::q4_k:
            return quantize_rows<QuantizeQ4K>;
        case Encoding::q5_k:
            return quantize_rows<QuantizeQ5K>;
        case Encoding::q6_k:
            return quantize_rows<QuantizeQ6K>;
        case Encoding::iq4_nl:
            return quantize_rows<QuantizeIq4Nl>;
        case Encoding::iq4_xs:
            return quantize_rows<QuantizeIq4Xs>;
        case Encoding::iq2_xxs:
            return quantize_rows<QuantizeIq2Xxs>;
        case Encoding::iq2_xs:
            return quantize_rows<QuantizeIq2Xs>;
        case Encoding::iq2_s:
            return quantize_rows<QuantizeIq2S>;
        case Encoding::iq3_xxs:
            return quantize_rows<QuantizeIq3Xxs>;
        case Encoding::iq3_s:
            return quantize_rows<QuantizeIq3S>;
        case Encoding::mxfp4:
            return quantize_rows<QuantizeMxfp4>;
        case Encoding::nvfp4:
            return quantize_rows<QuantizeNvfp4>;
        case Encoding::tq1_0:
            return quantize_rows<QuantizeTq1_0>;
        case Encoding::tq2_0:
            return quantize_rows<QuantizeTq2_0>;
        default:
            return nullptr;
    }
}

}  // namespace
}  // namespace nybble
