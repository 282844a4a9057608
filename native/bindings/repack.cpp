// Packing of affine encodings, one pass over memory.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <optional>
#include <stdexcept>

#include "core/affine_repack.h"

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

}  // namespace

void register_repack(nb::module_& m) {
    m.def("join_nibbles", &join, nb::arg("packed"), nb::arg("scales"), nb::arg("zero_points").none(),
          nb::arg("groups"), nb::arg("group_size"), nb::arg("out"),
          "Blocks of a 4-bit affine encoding from ONNX's arrays, flat uint8 all of them; see "
          "nybble.checkpoint.encodings.affine.join_nibbles.");
}
