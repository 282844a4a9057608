// The executor's walk over the plan, and its operators that touch each row once.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/executor.h"

namespace nybble {

Executor::Executor(Session& session, MicroBatch& batch)
    : session_(session), batch_(batch), floats_(*session.floats_) {}

void Executor::prepare() {
    const Plan& plan = session_.plan_;
    int64_t floats = 0;
    for (const Rope& rope : plan.ropes) {
        rope_offset_.push_back(floats);
        floats += batch_.rows() * 2 * rope.rotary_dim;
    }
    session_.shared_->rope.get(floats);

    const int64_t selected = static_cast<int64_t>(batch_.selected.size());
    for (const Op& op : plan.ops) {
        if (const auto* linear = std::get_if<LinearOp>(&op.body)) {
            prepare_linear(*linear, op.selected ? selected : batch_.rows());
        } else if (const auto* tap = std::get_if<TapOp>(&op.body)) {
            prepare_tap(*tap, op.selected ? selected : batch_.rows());
        } else if (const auto* attention = std::get_if<AttentionOp>(&op.body)) {
            plan_attention(*attention);
        }
    }
    int64_t partial = 0;
    for (const AttentionTasks& tasks : attention_) {
        const int64_t group = tasks.shape.query_heads / tasks.shape.kv_heads;
        partial = std::max(partial, tasks.partials * group * (tasks.shape.head_dim + 2));
    }
    session_.shared_->partial.get(partial);
}

void Executor::run() {
    session_.pool_.run([](void* self, Worker& worker) { static_cast<Executor*>(self)->walk(worker); }, this);
}

void Executor::walk(Worker& worker) {
    if (session_.gemm_ != nullptr) {
        session_.gemm_->begin();
    }
    rope_tables(worker);
    const int64_t all_rows = batch_.rows();
    const int64_t selected_rows = static_cast<int64_t>(batch_.selected.size());
    int step = 0;
    for (const Op& op : session_.plan_.ops) {
        const int64_t rows = op.selected ? selected_rows : all_rows;
        if (rows == 0) {
            continue;
        }
        std::visit(
            [&](const auto& body) {
                using Body = std::decay_t<decltype(body)>;
                if constexpr (std::is_same_v<Body, EmbeddingOp>) {
                    embedding(body, worker);
                } else if constexpr (std::is_same_v<Body, HiddenOp>) {
                    hidden(body, worker);
                } else if constexpr (std::is_same_v<Body, TapOp>) {
                    tap(body, rows, worker);
                } else if constexpr (std::is_same_v<Body, NormOp>) {
                    norm(body, rows, worker);
                } else if constexpr (std::is_same_v<Body, LinearOp>) {
                    linear(body, rows, worker);
                } else if constexpr (std::is_same_v<Body, AttentionOp>) {
                    attention(body, worker);
                } else if constexpr (std::is_same_v<Body, ElementwiseOp>) {
                    elementwise(body, rows, worker);
                } else if constexpr (std::is_same_v<Body, GatherColumnsOp>) {
                    gather_columns(body, rows, worker);
                } else if constexpr (std::is_same_v<Body, ScaleBySequenceOp>) {
                    scale_by_sequence(body, op.selected, rows, worker);
                } else {
                    select(body, worker);
                }
            },
            op.body);
        // One thread reads the flag and all act on what it saw: otherwise some would stop and the
        // others wait for them at a barrier.
        if (worker.index() == 0) {
            stop_flags_[step & 1] = session_.cancel_.load(std::memory_order_relaxed);
        }
        worker.barrier();
        if (stop_flags_[step & 1]) {
            if (worker.index() == 0) {
                stopped_ = true;
            }
            break;
        }
        ++step;
    }
    if (session_.gemm_ != nullptr) {
        session_.gemm_->end();
    }
}

void Executor::rope_tables(Worker& worker) {
    const Plan& plan = session_.plan_;
    const int64_t rows = batch_.rows();
    for (size_t i = 0; i < plan.ropes.size(); ++i) {
        const Rope& rope = plan.ropes[i];
        float* table = session_.shared_->rope.data() + rope_offset_[i];
        const int64_t half = rope.rotary_dim / 2;
        for (int64_t row = worker.index(); row < rows; row += worker.count()) {
            const int32_t set =
                batch_.segments[static_cast<size_t>(batch_.row_segment[static_cast<size_t>(row)])].rope_set;
            const float factor = rope.attention_factor[set];
            const float position = static_cast<float>(batch_.positions[static_cast<size_t>(row)]);
            float* cosine = table + row * 2 * rope.rotary_dim;
            float* sine = cosine + rope.rotary_dim;
            for (int64_t j = 0; j < half; ++j) {
                const float angle = position * rope.inverse_frequency[set][static_cast<size_t>(j)];
                const float c = std::cos(angle) * factor;
                const float s = std::sin(angle) * factor;
                if (rope.interleaved) {
                    cosine[2 * j] = c;
                    cosine[2 * j + 1] = c;
                    sine[2 * j] = -s;
                    sine[2 * j + 1] = s;
                } else {
                    cosine[j] = c;
                    cosine[j + half] = c;
                    sine[j] = s;
                    sine[j + half] = s;
                }
            }
        }
    }
    worker.barrier();
}

void Executor::embedding(const EmbeddingOp& op, Worker& worker) {
    const Weight& weight = session_.plan_.weights[static_cast<size_t>(op.weight)];
    const EncodingKernels& kernels = session_.kernels(weight.encoding);
    for (int64_t row = worker.index(); row < batch_.rows(); row += worker.count()) {
        float* out = at(op.out, row);
        const int64_t token = batch_.tokens[static_cast<size_t>(row)];
        kernels.dequantize_f32(weight.data + static_cast<size_t>(token) * weight.stride, out, weight.columns);
        if (op.scale != 1.0F) {
            floats_.scale(out, op.scale, out, weight.columns);
        }
    }
}

void Executor::hidden(const HiddenOp& op, Worker& worker) {
    const int64_t size = session_.plan_.hidden_size;
    for (int64_t row = worker.index(); row < batch_.rows(); row += worker.count()) {
        const Segment& segment =
            batch_.segments[static_cast<size_t>(batch_.row_segment[static_cast<size_t>(row)])];
        std::memcpy(at(op.out, row), segment.hidden + (row - segment.row) * size,
                    static_cast<size_t>(size) * sizeof(float));
    }
}

void Executor::norm(const NormOp& op, int64_t rows, Worker& worker) {
    for (int64_t row = worker.index(); row < rows; row += worker.count()) {
        for (int64_t i = 0; i < op.width; i += op.group) {
            floats_.rms_norm(at(op.in, row) + i, vector(op.norm.weight), at(op.out, row) + i, op.group,
                             op.norm.eps, op.norm.offset);
        }
    }
}

void Executor::elementwise(const ElementwiseOp& op, int64_t rows, Worker& worker) {
    // One row is cut among the threads: the last operators work on a whole vocabulary.
    const int64_t block = 4096;
    const int64_t blocks = (op.width + block - 1) / block;
    for (int64_t task = worker.index(); task < rows * blocks; task += worker.count()) {
        const int64_t row = task / blocks;
        const int64_t first = task % blocks * block;
        const int64_t n = std::min(block, op.width - first);
        const float* a = at(op.a, row) + first;
        float* out = at(op.out, row) + first;
        switch (op.kind) {
            case ElementwiseKind::add:
                floats_.add(a, at(op.b, row) + first, out, n);
                break;
            case ElementwiseKind::scale:
                floats_.scale(a, op.factor, out, n);
                break;
            case ElementwiseKind::softcap:
                floats_.softcap(a, op.factor, out, n);
                break;
            case ElementwiseKind::gated:
                floats_.gated(a, at(op.b, row) + first, out, n, op.activation);
                break;
            case ElementwiseKind::copy:
                std::memmove(out, a, static_cast<size_t>(n) * sizeof(float));
                break;
        }
    }
}

void Executor::gather_columns(const GatherColumnsOp& op, int64_t rows, Worker& worker) {
    const int32_t* columns = session_.plan_.permutations[static_cast<size_t>(op.permutation)].data();
    for (int64_t row = worker.index(); row < rows; row += worker.count()) {
        const float* in = at(op.in, row);
        float* out = at(op.out, row);
        for (int64_t i = 0; i < op.width; ++i) {
            out[i] = in[columns[i]];
        }
    }
}

void Executor::scale_by_sequence(const ScaleBySequenceOp& op, bool selected, int64_t rows, Worker& worker) {
    const int32_t* slots = session_.plan_.slots[static_cast<size_t>(op.slots)].data();
    const float* scales = vector(op.scales);
    for (int64_t row = worker.index(); row < rows; row += worker.count()) {
        const int32_t token =
            selected ? batch_.selected[static_cast<size_t>(row)] : static_cast<int32_t>(row);
        const int32_t segment = batch_.row_segment[static_cast<size_t>(token)];
        const std::vector<float>& weights =
            batch_.segments[static_cast<size_t>(segment)].sequence->adapter_weights;
        const float* in = at(op.in, row);
        float* out = at(op.out, row);
        for (int64_t i = 0; i < op.width; ++i) {
            const float weight = weights.empty() ? 0.0F : weights[static_cast<size_t>(slots[i])];
            const float factor = weight * scales[i];
            out[i] = factor == 0.0F ? 0.0F : in[i] * factor;
        }
        std::fill(out + op.width, out + op.out_width, 0.0F);
    }
}

void Executor::select(const SelectOp& op, Worker& worker) {
    const int64_t rows = static_cast<int64_t>(batch_.selected.size());
    for (int64_t i = worker.index(); i < rows; i += worker.count()) {
        std::memcpy(at(op.out, i), at(op.in, batch_.selected[static_cast<size_t>(i)]),
                    static_cast<size_t>(op.width) * sizeof(float));
    }
}

}  // namespace nybble
