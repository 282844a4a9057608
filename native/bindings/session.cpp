// Sessions and sequences; forward() runs without the GIL.
#include "core/session.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

namespace nb = nanobind;
using namespace nybble;

namespace {

using Tokens = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Hidden = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Output = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

KvEncoding kv_encoding(const std::string& name) {
    if (name == "f32") return KvEncoding::f32;
    if (name == "f16") return KvEncoding::f16;
    if (name == "bf16") return KvEncoding::bf16;
    if (name == "q8_0") return KvEncoding::q8_0;
    if (name == "q4_0") return KvEncoding::q4_0;
    throw std::invalid_argument("unknown KV cache encoding " + name +
                                "; there are f32, f16, bf16, q8_0 and q4_0");
}

std::unique_ptr<Session> make_session(const Plan& plan, int threads, const std::string& kv,
                                      int64_t kv_limit_bytes, int64_t max_rows, bool precise) {
    SessionOptions options;
    options.threads = threads;
    options.kv_encoding = kv_encoding(kv);
    options.kv_limit_bytes = kv_limit_bytes;
    options.max_rows = max_rows;
    options.precise = precise;
    options.isa = selected_isa();
    for (const KvGroup& group : plan.groups) {
        if ((options.kv_encoding == KvEncoding::q8_0 || options.kv_encoding == KvEncoding::q4_0) &&
            group.head_dim % 32 != 0) {
            throw std::invalid_argument("a " + kv +
                                        " KV cache needs a head_dim that is a multiple of 32, not " +
                                        std::to_string(group.head_dim) + "; use f16");
        }
    }
    return std::make_unique<Session>(plan, options);
}

void check_sequence(Session& session, const KvSequence* sequence, const std::vector<ForwardItem>& items) {
    if (!sequence->belongs_to(session.cache())) {
        throw std::invalid_argument("forward: a sequence belongs to another session");
    }
    for (const ForwardItem& other : items) {
        if (other.sequence == sequence) {
            throw std::invalid_argument("forward: a sequence occurs twice in one batch");
        }
    }
}

void run(Session& session, const std::vector<ForwardItem>& items, const Output& output) {
    if (static_cast<int64_t>(output.shape(0)) != Session::output_rows(items) ||
        static_cast<int64_t>(output.shape(1)) != session.plan().vocab_size) {
        throw std::invalid_argument("forward: the output array has the wrong shape");
    }
    float* data = output.data();
    nb::gil_scoped_release release;
    session.forward(items, data);
}

// items: (sequence, tokens, rows: 0 none, 1 last, 2 all; rope set)
using ItemTuple = std::tuple<KvSequence*, Tokens, int, int>;

void forward(Session& session, const std::vector<ItemTuple>& tuples, Output output) {
    std::vector<ForwardItem> items;
    items.reserve(tuples.size());
    for (const auto& [sequence, tokens, rows, rope_set] : tuples) {
        if (rope_set < 0 || rope_set > 1 || rows < 0 || rows > 2 || sequence == nullptr) {
            throw std::invalid_argument("forward: an item is out of range");
        }
        check_sequence(session, sequence, items);
        items.push_back({sequence, tokens.data(), static_cast<int64_t>(tokens.size()),
                         static_cast<LogitRows>(rows), rope_set, nullptr});
    }
    run(session, items, output);
}

// items: (sequence, hidden states, rope set)
using HiddenItem = std::tuple<KvSequence*, Hidden, int>;

void forward_hidden(Session& session, const std::vector<HiddenItem>& tuples, Output output) {
    std::vector<ForwardItem> items;
    items.reserve(tuples.size());
    for (const auto& [sequence, hidden, rope_set] : tuples) {
        if (rope_set < 0 || rope_set > 1 || sequence == nullptr ||
            static_cast<int64_t>(hidden.shape(1)) != session.plan().hidden_size) {
            throw std::invalid_argument("forward_hidden: an item is out of range");
        }
        check_sequence(session, sequence, items);
        items.push_back({sequence, nullptr, static_cast<int64_t>(hidden.shape(0)), LogitRows::all, rope_set,
                         hidden.data()});
    }
    run(session, items, output);
}

}  // namespace

void register_session(nb::module_& module) {
    nb::exception<CacheFull>(module, "CacheFull", PyExc_MemoryError);
    nb::exception<ForwardCancelled>(module, "ForwardCancelled", PyExc_RuntimeError);

    nb::class_<KvSequence>(module, "Sequence", "One sequence's pages of the KV cache.")
        .def_prop_ro("length", &KvSequence::length)
        .def_rw("adapter_weights", &KvSequence::adapter_weights,
                "The weight of each of the plan's LoRA adapters; empty: all are off.")
        .def("truncate", &KvSequence::truncate,
             "Forget tokens from a length on; False where a sliding window has dropped what that needs.")
        .def("clear", &KvSequence::clear)
        .def("fork", &KvSequence::fork, nb::keep_alive<0, 1>());

    nb::class_<Session>(module, "Session", "A plan with threads, buffers and a KV cache.")
        .def("new_sequence", &Session::new_sequence, nb::keep_alive<0, 1>())
        .def("forward", &forward)
        .def("forward_hidden", &forward_hidden,
             "As forward, from hidden states: (sequence, float32 (tokens, hidden_size), rope set) each; the "
             "output has every row.")
        .def("owns", [](Session& session,
                        const KvSequence& sequence) { return sequence.belongs_to(session.cache()); })
        .def("cancel", &Session::cancel)
        .def_prop_ro("threads", &Session::threads)
        .def_prop_ro("max_rows", [](const Session& session) { return session.options().max_rows; })
        .def_prop_ro("buffer_bytes", &Session::buffer_bytes)
        .def_prop_ro("uses_amx", &Session::uses_amx)
        .def_prop_ro("cache_bytes_in_use", [](Session& session) { return session.cache().bytes_in_use(); })
        .def_prop_ro("cache_bytes_allocated",
                     [](Session& session) { return session.cache().bytes_allocated(); });
    module.def("make_session", &make_session, nb::keep_alive<0, 1>());
}
