#include "core/plan.h"

#include <stdexcept>

namespace nybble {

namespace {

// Far beyond any model; products of two of these cannot overflow.
constexpr int64_t kMostHeads = 1 << 20;

class Checker {
   public:
    explicit Checker(const Plan& plan) : plan_(plan) {}

    void require(bool condition, const char* what) const {
        if (!condition) {
            throw std::invalid_argument("plan, operator " + std::to_string(op_) + ": " + what);
        }
    }

    void view(const View& view, int64_t width, const char* what) const {
        int64_t have = 0;
        if (view.buffer == kOutput) {
            have = plan_.vocab_size;
        } else {
            require(view.buffer >= 0 && view.buffer < static_cast<int32_t>(plan_.buffers.size()), what);
            have = plan_.buffers[static_cast<size_t>(view.buffer)];
        }
        // The caller's array, and buffers of selected rows, have a row for each logit row asked for, no more.
        require(selected_ || !of_selected_rows(view), "all rows in a place of selected rows");
        require(view.offset >= 0 && view.offset <= have && width > 0 && width <= have - view.offset, what);
    }

    bool of_selected_rows(const View& view) const {
        return view.buffer == kOutput || plan_.buffer_selected[static_cast<size_t>(view.buffer)];
    }

    static bool overlap(const View& a, int64_t a_width, const View& b, int64_t b_width) {
        return a.buffer == b.buffer && a.offset < b.offset + b_width && b.offset < a.offset + a_width;
    }

    void vector(int32_t index, int64_t size, const char* what) const {
        require(index >= 0 && index < static_cast<int32_t>(plan_.vectors.size()), what);
        require(static_cast<int64_t>(plan_.vectors[static_cast<size_t>(index)].size()) >= size, what);
    }

    const Weight& weight(int32_t index) const {
        require(index >= 0 && index < static_cast<int32_t>(plan_.weights.size()), "unknown weight");
        return plan_.weights[static_cast<size_t>(index)];
    }

    void check(const EmbeddingOp& op) const {
        const Weight& w = weight(op.weight);
        require(plan_.hidden_size == 0, "an embedding in a plan that starts with hidden states");
        require(w.rows >= plan_.vocab_size, "the embedding has fewer rows than the vocabulary");
        view(op.out, w.columns, "embedding output");
    }
    void check(const NormOp& op) const {
        require(op.group > 0 && op.width % op.group == 0, "norm group");
        vector(op.norm.weight, op.group, "norm weight");
        view(op.in, op.width, "norm input");
        view(op.out, op.width, "norm output");
    }
    void check(const LinearOp& op) const {
        view(op.in, op.columns, "linear input");
        if (op.norm.weight != kNone) {
            vector(op.norm.weight, op.columns, "linear norm weight");
        }
        require(!op.parts.empty(), "linear without parts");
        require(!op.gated || (op.parts.size() == 2 && op.parts[0].rows == op.parts[1].rows), "gated parts");
        for (const LinearPart& part : op.parts) {
            const Weight& w = weight(part.weight);
            require(w.columns == op.columns, "linear columns");
            require(part.row >= 0 && part.rows > 0 && part.rows <= w.rows && part.row <= w.rows - part.rows,
                    "linear rows");
            if (&part == &op.parts[0] || !op.gated) {
                view(part.out, part.rows, "linear output");
                // Tasks write while others still read the input.
                require(part.out.buffer != op.in.buffer, "linear output in the input's buffer");
            }
            if (part.bias != kNone) {
                vector(part.bias, part.rows, "linear bias");
            }
            if (part.residual.buffer != kNone) {
                require(!op.gated, "gated residual");
                view(part.residual, part.rows, "linear residual");
                // In place is fine: each element is read where it is written.
                require(part.residual.offset == part.out.offset ||
                            !overlap(part.residual, part.rows, part.out, part.rows),
                        "linear residual overlaps the output");
            }
        }
    }
    void check(const AttentionOp& op) const {
        require(op.heads > 0 && op.heads <= kMostHeads && op.kv_heads > 0 && op.heads % op.kv_heads == 0 &&
                    op.head_dim > 0 && op.head_dim <= kMostHeads,
                "heads");
        view(op.q, op.heads * op.head_dim, "q");
        view(op.k, op.kv_heads * op.head_dim, "k");
        view(op.v, op.kv_heads * op.head_dim, "v");
        view(op.out, op.heads * op.head_dim, "attention output");
        // A task reads the queries whose results it writes; keys and values are everybody's.
        const int64_t query_width = op.heads * op.head_dim;
        const int64_t key_width = op.kv_heads * op.head_dim;
        require(op.out.offset == op.q.offset || !overlap(op.out, query_width, op.q, query_width),
                "attention output overlaps q");
        require(!overlap(op.q, query_width, op.k, key_width), "q overlaps k");
        for (const View* view : {&op.k, &op.v}) {
            require(!overlap(op.out, query_width, *view, key_width), "attention output overlaps k or v");
        }
        require(op.group >= 0 && op.group < static_cast<int64_t>(plan_.groups.size()), "KV group");
        const KvGroup& group = plan_.groups[static_cast<size_t>(op.group)];
        require(op.layer >= 0 && op.layer < group.layers && op.kv_heads == group.kv_heads &&
                    op.head_dim == group.head_dim && op.window == group.window,
                "KV group shape");
        for (const Norm* norm : {&op.q_norm, &op.k_norm}) {
            if (norm->weight != kNone) {
                vector(norm->weight, op.head_dim, "query or key norm");
            }
        }
        if (op.rope != kNone) {
            require(op.rope >= 0 && op.rope < static_cast<int32_t>(plan_.ropes.size()), "rope");
            require(plan_.ropes[static_cast<size_t>(op.rope)].rotary_dim <= op.head_dim, "rotary_dim");
        }
    }
    void check(const ElementwiseOp& op) const {
        view(op.a, op.width, "elementwise input");
        view(op.out, op.width, "elementwise output");
        if (op.kind == ElementwiseKind::add || op.kind == ElementwiseKind::gated) {
            view(op.b, op.width, "elementwise input");
        }
    }
    void check(const GatherColumnsOp& op) const {
        view(op.in, op.width, "gather input");
        view(op.out, op.width, "gather output");
        // A task reads all columns of the row that it writes.
        require(op.in.buffer != op.out.buffer, "gather in place");
        require(op.permutation >= 0 && op.permutation < static_cast<int32_t>(plan_.permutations.size()),
                "unknown permutation");
        const std::vector<int32_t>& columns = plan_.permutations[static_cast<size_t>(op.permutation)];
        require(static_cast<int64_t>(columns.size()) == op.width, "permutation size");
        for (const int32_t column : columns) {
            require(column >= 0 && column < op.width, "permutation entry");
        }
    }
    void check(const ScaleBySequenceOp& op) const {
        view(op.in, op.width, "scale by sequence input");
        view(op.out, op.out_width, "scale by sequence output");
        require(op.width <= op.out_width, "scale by sequence width");
        // In place is fine: each element is read where it is written.
        require(op.in.offset == op.out.offset || !overlap(op.in, op.width, op.out, op.out_width),
                "scale by sequence overlaps its output");
        vector(op.scales, op.width, "scale by sequence scales");
        require(op.slots >= 0 && op.slots < static_cast<int32_t>(plan_.slots.size()), "unknown slots");
        const std::vector<int32_t>& slots = plan_.slots[static_cast<size_t>(op.slots)];
        require(static_cast<int64_t>(slots.size()) == op.width, "slots size");
        for (const int32_t slot : slots) {
            require(slot >= 0 && slot < plan_.adapters, "slots entry");
        }
    }
    void check(const HiddenOp& op) const {
        require(plan_.hidden_size > 0, "hidden states in a plan that starts with tokens");
        view(op.out, plan_.hidden_size, "hidden states");
    }
    void check(const TapOp& op) const {
        view(op.in, op.columns, "tap input");
        if (op.norm.weight != kNone) {
            vector(op.norm.weight, op.columns, "tap norm weight");
        }
        require(op.tap >= 0 && op.tap < static_cast<int32_t>(plan_.taps.size()), "unknown tap");
        require(plan_.taps[static_cast<size_t>(op.tap)].columns == op.columns, "tap columns");
    }
    void check(const SelectOp& op) const {
        view(op.in, op.width, "select input");
        view(op.out, op.width, "select output");
        require(!of_selected_rows(op.in), "select from selected rows");
        require(op.in.buffer != op.out.buffer, "select in place");
    }

    void run() {
        require(plan_.vocab_size > 0 && plan_.context_length > 0, "vocabulary or context length");
        for (const Weight& w : plan_.weights) {
            require(w.rows > 0 && w.columns > 0 && w.data != nullptr &&
                        w.columns % encoding_info(w.encoding).block_size == 0 &&
                        w.stride >= row_bytes(w.encoding, w.columns),
                    "weight");
        }
        for (const Tap& tap : plan_.taps) {
            require(tap.columns > 0 && tap.sum_squares != nullptr && tap.sum_absolute != nullptr, "tap");
        }
        require(plan_.hidden_size >= 0, "hidden_size");
        for (const int64_t width : plan_.buffers) {
            require(width > 0, "buffer width");
        }
        require(plan_.buffer_selected.size() == plan_.buffers.size(), "buffer kinds");
        for (const Rope& rope : plan_.ropes) {
            require(rope.rotary_dim > 0 && rope.rotary_dim % 2 == 0, "rotary_dim");
            for (const auto& frequencies : rope.inverse_frequency) {
                require(static_cast<int64_t>(frequencies.size()) == rope.rotary_dim / 2,
                        "rotary frequencies");
            }
        }
        for (const KvGroup& group : plan_.groups) {
            require(group.window >= 0 && group.layers > 0 && group.kv_heads > 0 && group.head_dim > 0,
                    "KV group");
        }
        for (const Op& op : plan_.ops) {
            selected_ = op.selected;
            require(!op.selected || !(std::holds_alternative<AttentionOp>(op.body) ||
                                      std::holds_alternative<EmbeddingOp>(op.body) ||
                                      std::holds_alternative<HiddenOp>(op.body)),
                    "works on all rows, never on selected ones");
            std::visit([&](const auto& body) { check(body); }, op.body);
            ++op_;
        }
    }

   private:
    const Plan& plan_;
    int64_t op_ = 0;
    bool selected_ = false;
};

}  // namespace

void Plan::validate() const { Checker(*this).run(); }

}  // namespace nybble
