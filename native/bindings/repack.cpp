// Packing of affine encodings, one pass over memory, and rounding to them.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/affine_repack.h"
#include "core/cpu_features.h"
#include "kernels/quantize.h"

namespace nb = nanobind;
using namespace nybble;

namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OutBytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void join(Bytes packed, Bytes scales, std::optional<Bytes> zero_points, int64_t groups, int64_t group_size,
          OutBytes out) {
    if (groups < 0 || group_size <= 0 || group_size % 32 != 0 || group_size > (int64_t{1} << 30) ||
        groups > (int64_t{1} << 40) / group_size) {
        throw std::invalid_argument("groups must be whole numbers of 32 elements");
    }
    const int64_t scale_bytes = groups == 0 ? 0 : static_cast<int64_t>(scales.size()) / groups;
    const int64_t header = scale_bytes + (zero_points ? 1 : 0);
    if (static_cast<int64_t>(packed.size()) != groups * group_size / 2 ||
        static_cast<int64_t>(scales.size()) != groups * scale_bytes || (groups > 0 && scale_bytes == 0) ||
        (zero_points && static_cast<int64_t>(zero_points->size()) != groups) ||
        static_cast<int64_t>(out.size()) != groups * (header + group_size / 2)) {
        throw std::invalid_argument("the arrays do not fit each other");
    }
    const uint8_t* points = zero_points ? zero_points->data() : nullptr;
    nb::gil_scoped_release release;
    join_nibbles(packed.data(), scales.data(), scale_bytes, points, groups, group_size, out.data());
}

using Values = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OutValues = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

AffineFormat affine_format(int bits, int64_t group_size, const std::string& scale, bool has_zero_point) {
    AffineFormat format{bits, group_size, ScaleType::f32, has_zero_point};
    if (scale == "f16") {
        format.scale = ScaleType::f16;
    } else if (scale == "bf16") {
        format.scale = ScaleType::bf16;
    } else if (scale != "f32") {
        throw std::invalid_argument("scales are f32, f16 or bf16");
    }
    if ((bits != 2 && bits != 3 && bits != 4 && bits != 8) || group_size <= 0 ||
        group_size > (int64_t{1} << 20) || group_size * bits % 8 != 0) {
        throw std::invalid_argument("2, 3, 4 or 8 bits, and whole bytes a group");
    }
    return format;
}

StepSearch step_search(const std::string& name) {
    if (name == "none") return StepSearch::none;
    if (name == "narrow") return StepSearch::narrow;
    if (name == "wide") return StepSearch::wide;
    throw std::invalid_argument("a search is none, narrow or wide");
}

// False if a scale does not fit its type.
bool quantize(Values values, int bits, int64_t group_size, const std::string& scale, bool has_zero_point,
              std::optional<OutBytes> out, const std::string& isa_name, const std::string& search,
              std::optional<Values> importance, std::optional<OutValues> rounded) {
    const AffineFormat format = affine_format(bits, group_size, scale, has_zero_point);
    const Isa isa = isa_name.empty() ? selected_isa() : isa_from_name(isa_name);
    if (isa == Isa::count || !cpu_features().available[static_cast<int>(isa)]) {
        throw std::invalid_argument("this machine has no instruction-set level " + isa_name);
    }
    const int64_t groups = static_cast<int64_t>(values.size()) / group_size;
    const int64_t block =
        (format.scale == ScaleType::f32 ? 4 : 2) + (has_zero_point ? 1 : 0) + group_size * bits / 8;
    const int64_t columns = importance ? static_cast<int64_t>(importance->size()) : group_size;
    if (static_cast<int64_t>(values.size()) != groups * group_size || columns == 0 ||
        columns % group_size != 0 || static_cast<int64_t>(values.size()) % columns != 0 ||
        (out && static_cast<int64_t>(out->size()) != groups * block) ||
        (rounded && rounded->size() != values.size())) {
        throw std::invalid_argument("the arrays do not fit each other");
    }
    const GroupTask task{values.data(),
                         importance ? importance->data() : nullptr,
                         columns,
                         groups,
                         out ? out->data() : nullptr,
                         rounded ? rounded->data() : nullptr};
    const StepSearch steps = step_search(search);
    std::vector<float> scratch(static_cast<size_t>(2 * group_size));
    nb::gil_scoped_release release;
    return quantize_groups_of(isa)(task, format, steps, scratch.data());
}

}  // namespace

void register_repack(nb::module_& m) {
    m.def("join_nibbles", &join, nb::arg("packed"), nb::arg("scales"), nb::arg("zero_points").none(),
          nb::arg("groups"), nb::arg("group_size"), nb::arg("out"),
          "Blocks of a 4-bit affine encoding from ONNX's arrays, flat uint8 all of them; see "
          "nybble.checkpoint.encodings.affine.join_nibbles.");
    m.def("quantize_affine", &quantize, nb::arg("values"), nb::arg("bits"), nb::arg("group_size"),
          nb::arg("scale"), nb::arg("has_zero_point"), nb::arg("out").none(), nb::arg("isa") = "",
          nb::arg("search") = "narrow", nb::arg("importance").none() = nb::none(),
          nb::arg("rounded").none() = nb::none(),
          "Encoded groups of float32 values, and what they stand for; False if a scale does not fit. Values "
          "must be finite, and importance (one for each column) above 0.");
}
