// Single kernels, for conformance tests and `nybble inspect`.
#include "kernels/kernels.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <stdexcept>
#include <vector>

#include "core/cpu_features.h"
#include "kernels/encoding_kernels.h"
#include "kernels/float_kernels.h"

namespace nb = nanobind;
using namespace nybble;

namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Matrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

Isa checked_isa(const std::string& name) {
    if (name.empty()) {
        return selected_isa();
    }
    const Isa isa = isa_from_name(name);
    if (isa == Isa::count || !cpu_features().available[static_cast<int>(isa)]) {
        throw std::invalid_argument("this machine has no instruction-set level " + name);
    }
    return isa;
}

Encoding checked_encoding(const std::string& name) {
    const Encoding encoding = encoding_from_name(name);
    if (encoding == Encoding::count) {
        throw std::invalid_argument("no CPU kernel knows the encoding " + name);
    }
    return encoding;
}

template <typename T>
nb::ndarray<nb::numpy, T> make_array(std::vector<T>&& values, std::initializer_list<size_t> shape) {
    auto* owned = new std::vector<T>(std::move(values));
    nb::capsule owner(owned, [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
    return nb::ndarray<nb::numpy, T>(owned->data(), shape, owner);
}

// Activations of `m` rows of `k` columns as the integer kernels take them.
struct QuantizedRows {
    std::vector<int8_t> storage;  // one plane after the other, each starting at a multiple of 64
    std::vector<float> scales, sums;
    Int8Rows rows{};

    QuantizedRows(Isa isa, const float* x, int64_t m, int64_t k, bool wide)
        : storage(static_cast<size_t>(2 * (m * k + 64))),
          scales(static_cast<size_t>(m * (k / 32))),
          sums(static_cast<size_t>(m * (k / 16))) {
        int8_t* values = aligned(storage.data());
        int8_t* high = wide ? aligned(values + m * k) : nullptr;
        const FloatKernels& floats = *float_kernels(isa);
        for (int64_t i = 0; i < m; ++i) {
            float* row_scales = scales.data() + i * (k / 32);
            float* row_sums = sums.data() + i * (k / 16);
            if (wide) {
                floats.quantize_int16(x + i * k, k, values + i * k, high + i * k, row_scales, row_sums);
            } else {
                floats.quantize_int8(x + i * k, k, values + i * k, row_scales, row_sums);
            }
        }
        rows = {values, scales.data(), sums.data(), k, high};
    }

   private:
    static int8_t* aligned(int8_t* p) { return p + (64 - reinterpret_cast<uintptr_t>(p) % 64) % 64; }
};

size_t check_blocks(Encoding encoding, int64_t elements, size_t bytes) {
    const EncodingInfo& info = encoding_info(encoding);
    if (elements <= 0 || elements % info.block_size != 0 || bytes != row_bytes(encoding, elements)) {
        throw std::invalid_argument("the data are not whole blocks of the encoding");
    }
    return static_cast<size_t>(elements);
}

}  // namespace

void register_kernels(nb::module_& module) {
    module.def(
        "dequantize",
        [](const std::string& name, const Bytes& data, int64_t n, const std::string& isa) {
            const Encoding encoding = checked_encoding(name);
            std::vector<float> out(check_blocks(encoding, n, data.size()));
            encoding_kernels(checked_isa(isa))[static_cast<int>(encoding)].dequantize_f32(data.data(),
                                                                                          out.data(), n);
            return make_array(std::move(out), {static_cast<size_t>(n)});
        },
        nb::arg("encoding"), nb::arg("data"), nb::arg("n"), nb::arg("isa") = "",
        "float32 values of `n` elements, by the kernel of a level (default: the one in use).");
    module.def(
        "dequantize_bf16",
        [](const std::string& name, const Bytes& data, int64_t n, const std::string& isa) -> nb::object {
            const Encoding encoding = checked_encoding(name);
            std::vector<uint16_t> out(check_blocks(encoding, n, data.size()));
            const auto kernel =
                encoding_kernels(checked_isa(isa))[static_cast<int>(encoding)].dequantize_bf16;
            if (kernel == nullptr) {
                return nb::none();
            }
            kernel(data.data(), out.data(), n);
            return nb::cast(make_array(std::move(out), {static_cast<size_t>(n)}));
        },
        nb::arg("encoding"), nb::arg("data"), nb::arg("n"), nb::arg("isa") = "",
        "bfloat16 bits, or None where the level has no such kernel.");
    module.def(
        "linear",
        [](const std::string& name, const Bytes& weight, int64_t rows, const Matrix& x,
           const std::string& path, const std::string& isa_text) -> nb::object {
            const Encoding encoding = checked_encoding(name);
            const Isa isa = checked_isa(isa_text);
            const int64_t m = static_cast<int64_t>(x.shape(0));
            const int64_t k = static_cast<int64_t>(x.shape(1));
            if (rows <= 0 || m <= 0 || weight.size() % static_cast<size_t>(rows) != 0) {
                throw std::invalid_argument("linear: wrong shapes");
            }
            const size_t stride = weight.size() / static_cast<size_t>(rows);
            check_blocks(encoding, k, stride);
            const EncodingKernels& kernels = encoding_kernels(isa)[static_cast<int>(encoding)];
            std::vector<float> y(static_cast<size_t>(m * rows));
            if (path == "f32") {
                kernels.linear_f32(weight.data(), stride, rows, x.data(), k, k, m, y.data(), rows);
            } else if (path == "int8" || path == "int16") {
                const bool wide = path == "int16";
                const LinearInt8 kernel = wide ? kernels.linear_int16 : kernels.linear_int8;
                if (kernel == nullptr || k % 32 != 0) {
                    return nb::none();
                }
                const QuantizedRows quantized(isa, x.data(), m, k, wide);
                kernel(weight.data(), stride, rows, quantized.rows, m, y.data(), rows);
            } else {
                throw std::invalid_argument("linear: path is f32, int8 or int16, not " + path);
            }
            return nb::cast(make_array(std::move(y), {static_cast<size_t>(m), static_cast<size_t>(rows)}));
        },
        nb::arg("encoding"), nb::arg("weight"), nb::arg("rows"), nb::arg("x"), nb::arg("path"),
        nb::arg("isa") = "",
        "x (m, columns) @ weight.T by one kernel: path f32, int8 or int16 (the type of the activations); "
        "None "
        "where the level has no such kernel.");
    module.def(
        "quantize_activations",
        [](const Matrix& x, const std::string& path, const std::string& isa) {
            const bool wide = path == "int16";
            const int64_t m = static_cast<int64_t>(x.shape(0));
            const int64_t k = static_cast<int64_t>(x.shape(1));
            if ((!wide && path != "int8") || k % 32 != 0) {
                throw std::invalid_argument(
                    "quantize_activations: path is int8 or int16, columns a multiple of 32");
            }
            QuantizedRows quantized(checked_isa(isa), x.data(), m, k, wide);
            const Int8Rows& rows = quantized.rows;
            std::vector<int8_t> low(rows.values, rows.values + m * k);
            std::vector<int8_t> high(static_cast<size_t>(m * k));
            if (wide) {
                high.assign(rows.high, rows.high + m * k);
            }
            return nb::make_tuple(make_array(std::move(low), {x.shape(0), x.shape(1)}),
                                  make_array(std::move(high), {x.shape(0), x.shape(1)}),
                                  make_array(std::move(quantized.scales), {x.shape(0), x.shape(1) / 32}),
                                  make_array(std::move(quantized.sums), {x.shape(0), x.shape(1) / 16}));
        },
        nb::arg("x"), nb::arg("path"), nb::arg("isa") = "",
        "(values, high, scales, sums) that stand for x (m, columns) in the integer kernels: x is about scale "
        "* "
        "(256 * high + value), one scale for 32 columns; sums are those of x over 16 columns; with int8, "
        "high is 0.");
    module.def(
        "encoding_kernels",
        [](const std::string& name, const std::string& isa_text) {
            const Encoding encoding = checked_encoding(name);
            const EncodingKernels& kernels =
                encoding_kernels(checked_isa(isa_text))[static_cast<int>(encoding)];
            nb::dict result;
            result["int8"] = kernels.linear_int8 != nullptr;
            result["int16"] = kernels.linear_int16 != nullptr;
            result["bf16"] = kernels.dequantize_bf16 != nullptr;
            return result;
        },
        nb::arg("encoding"), nb::arg("isa") = "", "Which kernels a level has for an encoding.");
}
