// Building a plan from Python (nybble.devices.cpu.compile).
#include "core/plan.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>

namespace nb = nanobind;
using namespace nybble;

namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Indices = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Sums = nb::ndarray<double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Products = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using ViewTuple = std::tuple<int32_t, int64_t>;
using NormTuple = std::tuple<int32_t, float, float>;

View view(const ViewTuple& tuple) { return {std::get<0>(tuple), std::get<1>(tuple)}; }

Norm norm(const NormTuple& tuple) { return {std::get<0>(tuple), std::get<1>(tuple), std::get<2>(tuple)}; }

Activation activation(const std::string& name) {
    if (name == "silu") {
        return Activation::silu;
    }
    if (name == "gelu") {
        return Activation::gelu;
    }
    if (name == "gelu_pytorch_tanh") {
        return Activation::gelu_tanh;
    }
    throw std::invalid_argument("unknown activation " + name);
}

std::vector<float> to_vector(const Floats& array) {
    return std::vector<float>(array.data(), array.data() + array.size());
}

int32_t add_weight(Plan& plan, const std::string& encoding, int64_t rows, int64_t columns,
                   const Bytes& data) {
    Weight weight;
    weight.encoding = encoding_from_name(encoding);
    if (weight.encoding == Encoding::count) {
        throw std::invalid_argument("no CPU kernel knows the encoding " + encoding);
    }
    const EncodingInfo& info = encoding_info(weight.encoding);
    if (rows <= 0 || columns <= 0 || columns % info.block_size != 0) {
        throw std::invalid_argument("weight rows are not whole blocks");
    }
    weight.rows = rows;
    weight.columns = columns;
    weight.stride = row_bytes(weight.encoding, columns);
    if (data.size() / weight.stride != static_cast<size_t>(rows) || data.size() % weight.stride != 0) {
        throw std::invalid_argument("weight data has " + std::to_string(data.size()) + " bytes instead of " +
                                    std::to_string(weight.stride) + " x " + std::to_string(rows));
    }
    weight.data = data.data();
    plan.weights.push_back(weight);
    return static_cast<int32_t>(plan.weights.size()) - 1;
}

int32_t add_tap(Plan& plan, const Sums& sum_squares, const Sums& sum_absolute,
                const std::optional<Products>& products) {
    const size_t columns = sum_squares.size();
    if (sum_absolute.size() != columns ||
        (products && (products->shape(0) != columns || products->shape(1) != columns))) {
        throw std::invalid_argument("the sums of a tap have different sizes");
    }
    plan.taps.push_back({static_cast<int64_t>(columns), sum_squares.data(), sum_absolute.data(),
                         products ? products->data() : nullptr});
    return static_cast<int32_t>(plan.taps.size()) - 1;
}

using PartTuple = std::tuple<int32_t, int64_t, int64_t, ViewTuple, int32_t, ViewTuple>;

}  // namespace

void register_plan(nb::module_& module) {
    module.attr("OUTPUT") = kOutput;
    module.attr("NONE") = kNone;
    nb::class_<Plan>(module, "Plan", "A flat list of CPU operators over numbered buffers.")
        .def(nb::init<>())
        .def_rw("vocab_size", &Plan::vocab_size)
        .def_rw("context_length", &Plan::context_length)
        .def_rw("hidden_size", &Plan::hidden_size)
        .def_rw("adapters", &Plan::adapters)
        .def("validate", &Plan::validate)
        .def("add_weight", &add_weight, "The memory of `data` must outlive every session of this plan.")
        .def("add_vector",
             [](Plan& plan, const Floats& values) {
                 plan.vectors.push_back(to_vector(values));
                 return static_cast<int32_t>(plan.vectors.size()) - 1;
             })
        .def("add_permutation",
             [](Plan& plan, const Indices& columns) {
                 plan.permutations.emplace_back(columns.data(), columns.data() + columns.size());
                 return static_cast<int32_t>(plan.permutations.size()) - 1;
             })
        .def("add_slots",
             [](Plan& plan, const Indices& slots) {
                 plan.slots.emplace_back(slots.data(), slots.data() + slots.size());
                 return static_cast<int32_t>(plan.slots.size()) - 1;
             })
        .def("add_tap", &add_tap, nb::arg("sum_squares"), nb::arg("sum_absolute"), nb::arg("products").none(),
             "The arrays must outlive every session of this plan, which adds to them.")
        .def("add_buffer",
             [](Plan& plan, int64_t width, bool selected) {
                 plan.buffers.push_back(width);
                 plan.buffer_selected.push_back(selected);
                 return static_cast<int32_t>(plan.buffers.size()) - 1;
             })
        .def("add_rope",
             [](Plan& plan, int64_t rotary_dim, bool interleaved, const Floats& frequencies_short,
                float factor_short, const Floats& frequencies_long, float factor_long) {
                 Rope rope;
                 rope.rotary_dim = rotary_dim;
                 rope.interleaved = interleaved;
                 rope.inverse_frequency[0] = to_vector(frequencies_short);
                 rope.inverse_frequency[1] = to_vector(frequencies_long);
                 rope.attention_factor[0] = factor_short;
                 rope.attention_factor[1] = factor_long;
                 plan.ropes.push_back(std::move(rope));
                 return static_cast<int32_t>(plan.ropes.size()) - 1;
             })
        .def("add_kv_group",
             [](Plan& plan, int64_t window, int64_t layers, int64_t kv_heads, int64_t head_dim) {
                 plan.groups.push_back({window, layers, kv_heads, head_dim});
                 return static_cast<int64_t>(plan.groups.size()) - 1;
             })
        .def("embedding",
             [](Plan& plan, int32_t weight, float scale, ViewTuple out) {
                 plan.ops.push_back({EmbeddingOp{weight, scale, view(out)}, false});
             })
        .def("norm",
             [](Plan& plan, NormTuple weights, ViewTuple in, ViewTuple out, int64_t width, int64_t group,
                bool selected) {
                 plan.ops.push_back({NormOp{norm(weights), view(in), view(out), width, group}, selected});
             })
        .def("linear",
             [](Plan& plan, ViewTuple in, int64_t columns, NormTuple weights, bool gated,
                const std::string& kind, const std::vector<PartTuple>& parts, bool selected) {
                 LinearOp op;
                 op.in = view(in);
                 op.columns = columns;
                 op.norm = norm(weights);
                 op.gated = gated;
                 op.activation = activation(kind);
                 for (const auto& [weight, row, rows, out, bias, residual] : parts) {
                     op.parts.push_back({weight, row, rows, view(out), bias, view(residual)});
                 }
                 plan.ops.push_back({std::move(op), selected});
             })
        .def("attention",
             [](Plan& plan, ViewTuple q, ViewTuple k, ViewTuple v, ViewTuple out, int64_t heads,
                int64_t kv_heads, int64_t head_dim, int64_t group, int64_t layer, int64_t window, float scale,
                float softcap, NormTuple q_norm, NormTuple k_norm, int32_t rope) {
                 plan.ops.push_back(
                     {AttentionOp{view(q), view(k), view(v), view(out), heads, kv_heads, head_dim, group,
                                  layer, window, scale, softcap, norm(q_norm), norm(k_norm), rope},
                      false});
             })
        .def("add",
             [](Plan& plan, ViewTuple a, ViewTuple b, ViewTuple out, int64_t width, bool selected) {
                 plan.ops.push_back({ElementwiseOp{ElementwiseKind::add, view(a), view(b), view(out), width,
                                                   1, Activation::silu},
                                     selected});
             })
        .def("scale",
             [](Plan& plan, ViewTuple a, ViewTuple out, int64_t width, float factor, bool selected) {
                 plan.ops.push_back({ElementwiseOp{ElementwiseKind::scale, view(a), View{}, view(out), width,
                                                   factor, Activation::silu},
                                     selected});
             })
        .def("softcap",
             [](Plan& plan, ViewTuple a, ViewTuple out, int64_t width, float cap, bool selected) {
                 plan.ops.push_back({ElementwiseOp{ElementwiseKind::softcap, view(a), View{}, view(out),
                                                   width, cap, Activation::silu},
                                     selected});
             })
        .def("gated",
             [](Plan& plan, ViewTuple gate, ViewTuple up, ViewTuple out, int64_t width,
                const std::string& kind, bool selected) {
                 plan.ops.push_back({ElementwiseOp{ElementwiseKind::gated, view(gate), view(up), view(out),
                                                   width, 1, activation(kind)},
                                     selected});
             })
        .def("gather_columns",
             [](Plan& plan, ViewTuple in, ViewTuple out, int64_t width, int32_t permutation, bool selected) {
                 plan.ops.push_back({GatherColumnsOp{view(in), view(out), width, permutation}, selected});
             })
        .def("scale_by_sequence",
             [](Plan& plan, ViewTuple in, ViewTuple out, int64_t width, int64_t out_width, int32_t slots,
                int32_t scales, bool selected) {
                 plan.ops.push_back(
                     {ScaleBySequenceOp{view(in), view(out), width, out_width, slots, scales}, selected});
             })
        .def("hidden", [](Plan& plan, ViewTuple out) { plan.ops.push_back({HiddenOp{view(out)}, false}); })
        .def("tap",
             [](Plan& plan, ViewTuple in, int64_t columns, NormTuple weights, int32_t tap, bool selected) {
                 plan.ops.push_back({TapOp{view(in), columns, norm(weights), tap}, selected});
             })
        .def("select", [](Plan& plan, ViewTuple in, ViewTuple out, int64_t width) {
            plan.ops.push_back({SelectOp{view(in), view(out), width}, true});
        });
}
