// Quantizers of GGUF's block types.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "core/cpu_features.h"
#include "core/encoding.h"
#include "quantize/blocks.h"

namespace nb = nanobind;
using namespace nybble;

namespace {

using Values = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Column = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OutBytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

constexpr int most_threads = 1024;

const char* quantize(const std::string& name, Values values, std::optional<Column> importance, int threads,
                     OutBytes out, const std::string& isa_name) {
    const Encoding encoding = encoding_from_name(name);
    const Isa isa = isa_name.empty() ? selected_isa() : isa_from_name(isa_name);
    if (isa == Isa::count || !cpu_features().available[static_cast<int>(isa)]) {
        throw std::invalid_argument("this machine has no instruction-set level " + isa_name);
    }
    const QuantizeRows kernel = encoding == Encoding::count ? nullptr : block_quantizer(encoding, isa);
    if (kernel == nullptr) throw std::invalid_argument("there is no native quantizer for " + name);
    const int64_t rows = static_cast<int64_t>(values.shape(0));
    const int64_t columns = static_cast<int64_t>(values.shape(1));
    if (columns % encoding_info(encoding).block_size != 0 ||
        out.size() != static_cast<size_t>(rows) * row_bytes(encoding, columns) ||
        (importance && static_cast<int64_t>(importance->size()) != columns) || threads < 1 ||
        threads > most_threads) {
        throw std::invalid_argument("the arrays do not fit each other");
    }
    if (rows == 0 || columns == 0) return "";
    const float* weights = importance ? importance->data() : nullptr;
    Quantized state;
    {
        nb::gil_scoped_release release;
        state = quantize_blocks(kernel, encoding, values.data(), rows, columns, weights, threads, out.data());
    }
    switch (state) {
        case Quantized::not_finite:
            return "not finite";
        case Quantized::scale_too_large:
            return "too large";
        default:
            return "";
    }
}

}  // namespace

void register_quantize(nb::module_& m) {
    m.def("quantize_blocks", &quantize, nb::arg("encoding"), nb::arg("values"), nb::arg("importance").none(),
          nb::arg("threads"), nb::arg("out"), nb::arg("isa") = "",
          "Blocks of float32 values (rows, columns); importance (columns,) or None. Returns what is wrong: "
          "nothing, \"not finite\", or \"too large\" where a scale does not fit its type. See "
          "nybble.quantize.blocks.");
}
