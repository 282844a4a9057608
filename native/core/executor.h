// Runs a plan over one micro-batch: every thread walks the list of operators; linear.cpp,
// attention.cpp, tap.cpp and elementwise.cpp hold the operators.
#pragma once

#include <cstdint>
#include <vector>

#include "core/aligned.h"
#include "core/session.h"

namespace nybble {

struct Session::Scratch {
    Growing<float> floats;       // normed rows, gate and up, dequantized weights
    Growing<float> more_floats;  // attention: q, acc, scores, sums; products of tiles; panels of a tap
    Growing<float> tiles;        // attention: keys and values of a page
    Growing<int8_t> int8_values;
    Growing<int8_t> int8_high;
    Growing<float> int8_scales;
    Growing<float> int8_sums;
    Growing<uint16_t> panel;  // dequantized bf16 weights, or packed activations (shared), halves of a tap
    Growing<float> partial;   // shared: partial attention results
    Growing<float> rope;      // shared: cosine and sine tables
};

// What the threads share while a micro-batch runs.
class Executor {
   public:
    Executor(Session& session, MicroBatch& batch);

    void run();
    bool cancelled() const { return stopped_; }

    // All shared scratch is sized here, before the threads start: workers must not allocate what
    // others read.
    void prepare();

   private:
    void walk(Worker& worker);
    void embedding(const EmbeddingOp& op, Worker& worker);
    void hidden(const HiddenOp& op, Worker& worker);
    void norm(const NormOp& op, int64_t rows, Worker& worker);
    void linear(const LinearOp& op, int64_t rows, Worker& worker);
    void attention(const AttentionOp& op, Worker& worker);
    void elementwise(const ElementwiseOp& op, int64_t rows, Worker& worker);
    void gather_columns(const GatherColumnsOp& op, int64_t rows, Worker& worker);
    void scale_by_sequence(const ScaleBySequenceOp& op, bool selected, int64_t rows, Worker& worker);
    void select(const SelectOp& op, Worker& worker);
    void rope_tables(Worker& worker);

    // linear.cpp
    enum class Path { precise, int8, bf16 };
    Path choose_path(const LinearOp& op, int64_t rows) const;
    void prepare_linear(const LinearOp& op, int64_t rows);
    void linear_int8(const LinearOp& op, int64_t rows, Worker& worker);
    void linear_bf16(const LinearOp& op, int64_t rows, Worker& worker);
    void linear_precise(const LinearOp& op, int64_t rows, Worker& worker);
    void finish_rows(const LinearOp& op, const float* gate, const float* up, int64_t stride, int64_t rows,
                     const LinearPart& part, int64_t first, int64_t count);
    void normed_rows(const LinearOp& op, int64_t first, int64_t last, float* out) const;

    // tap.cpp
    void prepare_tap(const TapOp& op, int64_t rows);
    void tap(const TapOp& op, int64_t rows, Worker& worker);
    void products_f32(const Tap& sums, const float* x, int64_t stride, int64_t rows, Worker& worker);
    void products_bf16(const Tap& sums, const float* x, int64_t stride, int64_t rows, Worker& worker);

    // attention.cpp
    struct AttentionShape {
        int64_t kv_heads, query_heads, head_dim, window;
        bool operator==(const AttentionShape&) const = default;
    };
    struct AttentionTasks {
        AttentionShape shape;
        std::vector<AttentionTask> tasks;
        std::vector<std::pair<int32_t, int32_t>> combine;  // (first task, splits)
        int64_t partials = 0;
        bool fused = false;  // rotary and cache writes happen inside the attention tasks
    };
    const AttentionTasks& tasks_for(const AttentionOp& op) const;
    void plan_attention(const AttentionOp& op);
    void rotate_query(const AttentionOp& op, int64_t row, int64_t first_head, int64_t last_head) const;
    void append_key(const AttentionOp& op, int64_t row, int64_t kv_head) const;
    void attention_task(const AttentionOp& op, const AttentionTask& task, Worker& worker);

    float* at(const View& view, int64_t row) const {
        if (view.buffer == kOutput) {
            return batch_.output + row * session_.plan_.vocab_size + view.offset;
        }
        const size_t b = static_cast<size_t>(view.buffer);
        return session_.buffers_[b].data() + row * session_.plan_.buffers[b] + view.offset;
    }
    int64_t row_stride(const View& view) const {
        return view.buffer == kOutput ? session_.plan_.vocab_size
                                      : session_.plan_.buffers[static_cast<size_t>(view.buffer)];
    }
    const float* vector(int32_t index) const {
        return session_.plan_.vectors[static_cast<size_t>(index)].data();
    }

    Session& session_;
    MicroBatch& batch_;
    const FloatKernels& floats_;
    std::vector<AttentionTasks> attention_;
    std::vector<int64_t> rope_offset_;  // into the shared table, per Rope
    bool stopped_ = false;
    bool stop_flags_[2] = {false, false};
};

}  // namespace nybble
