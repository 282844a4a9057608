// What the quantization methods in nybble.quantize compute natively: rounding with feedback.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "core/cpu_features.h"
#include "kernels/feedback.h"

namespace nb = nanobind;
using namespace nybble;

namespace {

using Matrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void feedback(Matrix values, Matrix factor, Matrix scales, Matrix zero_points,
              nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu> group_of, int bits,
              nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu> codes,
              nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu> errors,
              const std::string& isa_name) {
    const size_t rows = values.shape(0);
    const size_t columns = values.shape(1);
    const size_t groups = scales.shape(1);
    if (bits < 1 || bits > 8 || factor.shape(0) != columns || factor.shape(1) != columns ||
        scales.shape(0) != rows || zero_points.shape(0) != rows || zero_points.shape(1) != groups ||
        group_of.shape(0) != columns || codes.shape(0) != rows || codes.shape(1) != columns ||
        errors.shape(0) != rows || errors.shape(1) != columns) {
        throw std::invalid_argument("the arrays do not fit each other");
    }
    for (size_t j = 0; j < columns; ++j) {
        if (group_of.data()[j] < 0 || static_cast<size_t>(group_of.data()[j]) >= groups) {
            throw std::invalid_argument("group_of names a group that is not there");
        }
    }
    const Isa isa = isa_name.empty() ? selected_isa() : isa_from_name(isa_name);
    if (isa == Isa::count || !cpu_features().available[static_cast<int>(isa)]) {
        throw std::invalid_argument("this machine has no instruction-set level " + isa_name);
    }
    const FeedbackTask task{values.data(),
                            static_cast<int64_t>(rows),
                            static_cast<int64_t>(columns),
                            factor.data(),
                            scales.data(),
                            zero_points.data(),
                            static_cast<int64_t>(groups),
                            group_of.data(),
                            static_cast<float>((1 << bits) - 1),
                            codes.data(),
                            errors.data()};
    std::vector<float> scratch(static_cast<size_t>(feedback_rows) * (columns + 3));
    nb::gil_scoped_release release;
    round_with_feedback_of(isa)(task, scratch.data());
}

}  // namespace

void register_quantize_methods(nb::module_& m) {
    m.def("round_with_feedback", &feedback, nb::arg("values"), nb::arg("factor"), nb::arg("scales"),
          nb::arg("zero_points"), nb::arg("group_of"), nb::arg("bits"), nb::arg("codes"), nb::arg("errors"),
          nb::arg("isa") = "",
          "Rounds columns one after another, each making up for those before it; see "
          "nybble.quantize.gptq_reference.round_with_feedback.");
}
