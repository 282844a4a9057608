// A plan: what a graph becomes on the CPU. A flat list of operators over numbered buffers, with
// neighbouring operators fused where that saves a pass over memory or a barrier. Built once (by
// nybble.devices.cpu), then run without Python.
#pragma once

#include <cstdint>
#include <string>
#include <variant>
#include <vector>

#include "core/encoding.h"
#include "core/kv_cache.h"
#include "kernels/float_kernels.h"

namespace nybble {

// Encoded matrix in somebody else's memory (usually the mapped file).
struct Weight {
    Encoding encoding = Encoding::f32;
    int64_t rows = 0;
    int64_t columns = 0;
    const uint8_t* data = nullptr;
    size_t stride = 0;  // bytes a row
};

// Columns [offset, ...) of a buffer: float32, one row a token. Buffer kOutput is the caller's.
struct View {
    int32_t buffer = -1;
    int64_t offset = 0;
};
inline constexpr int32_t kOutput = -2;
inline constexpr int32_t kNone = -1;

// RMS norm; weight is an index into Plan::vectors.
struct Norm {
    int32_t weight = kNone;
    float eps = 0;
    float offset = 0;
};

// Rotary embedding; index 0 holds what short sequences use, index 1 what long ones do (LongRoPE).
struct Rope {
    int64_t rotary_dim = 0;
    bool interleaved = false;
    std::vector<float> inverse_frequency[2];  // rotary_dim / 2
    float attention_factor[2] = {1, 1};
};

struct EmbeddingOp {
    int32_t weight = kNone;
    float scale = 1;
    View out;
};

// Norm over groups of `group` columns of a view of `width` columns.
struct NormOp {
    Norm norm;
    View in;
    View out;
    int64_t width = 0;
    int64_t group = 0;
};

// A range of rows of one weight, and where its results go.
struct LinearPart {
    int32_t weight = kNone;
    int64_t row = 0;
    int64_t rows = 0;
    View out;
    int32_t bias = kNone;  // vector
    View residual;         // added to the result; buffer kNone: nothing
};

// parts = norm(in) @ weights.T. With `gated`, parts 0 and 1 are gate and up, and
// activation(gate) * up goes to part 0's out.
struct LinearOp {
    View in;
    int64_t columns = 0;
    Norm norm;  // weight kNone: no norm
    bool gated = false;
    Activation activation = Activation::silu;
    std::vector<LinearPart> parts;
};

struct AttentionOp {
    View q, k, v, out;
    int64_t heads = 0;
    int64_t kv_heads = 0;
    int64_t head_dim = 0;
    int64_t group = 0;  // of KvCache
    int64_t layer = 0;  // within the group
    int64_t window = 0;
    float scale = 1;
    float softcap = 0;
    Norm q_norm, k_norm;
    int32_t rope = kNone;
};

enum class ElementwiseKind : int32_t { add, scale, softcap, gated, copy };

struct ElementwiseOp {
    ElementwiseKind kind = ElementwiseKind::add;
    View a, b, out;
    int64_t width = 0;
    float factor = 1;
    Activation activation = Activation::silu;
};

// The caller's hidden states, in place of an embedding: a plan of some of a model's layers.
struct HiddenOp {
    View out;
};

// Sums over the rows of norm(in), which a linear is about to read; see Tap.
struct TapOp {
    View in;
    int64_t columns = 0;
    Norm norm;  // weight kNone: no norm
    int32_t tap = kNone;
};

// Gathers the rows whose logits are wanted.
struct SelectOp {
    View in, out;
    int64_t width = 0;
};

// Column i of the result is column permutations[permutation][i] of the input.
struct GatherColumnsOp {
    View in, out;
    int64_t width = 0;
    int32_t permutation = kNone;
};

// Column i of the result is column i of the input times vectors[scales][i] and the weight that the
// row's sequence gives to LoRA adapter slots[slots][i]; 0 where that product of factors is 0. The
// columns from `width` to `out_width` of the result are 0.
struct ScaleBySequenceOp {
    View in, out;
    int64_t width = 0;
    int64_t out_width = 0;
    int32_t slots = kNone;
    int32_t scales = kNone;
};

// What a TapOp adds to, in somebody else's memory, which outlives every session of the plan. Only one
// session may run at a time.
struct Tap {
    int64_t columns = 0;
    double* sum_squares = nullptr;   // [columns]: x^2
    double* sum_absolute = nullptr;  // [columns]: |x|
    // [columns][columns]: the products of every two columns, x^T x. What lies left of the diagonal is
    // touched only within 16 x 16 tiles: the matrix is symmetric. nullptr: none.
    float* products = nullptr;
};

struct Op {
    std::variant<EmbeddingOp, HiddenOp, NormOp, LinearOp, AttentionOp, ElementwiseOp, GatherColumnsOp,
                 ScaleBySequenceOp, TapOp, SelectOp>
        body;
    bool selected = false;  // works on the selected rows only
};

struct Plan {
    std::vector<Weight> weights;
    std::vector<std::vector<float>> vectors;
    std::vector<std::vector<int32_t>> permutations;
    std::vector<std::vector<int32_t>> slots;  // LoRA adapter of each column
    std::vector<int64_t> buffers;             // width of each, columns
    std::vector<bool> buffer_selected;        // holds selected rows only: usually one
    std::vector<Rope> ropes;
    std::vector<KvGroup> groups;
    std::vector<Op> ops;
    std::vector<Tap> taps;
    int64_t vocab_size = 0;   // columns of the output; with an embedding, how many tokens there are
    int64_t hidden_size = 0;  // columns of the caller's hidden states; 0: the plan starts with tokens
    int64_t context_length = 0;
    int64_t adapters = 0;  // LoRA adapters, each with a weight in every sequence

    // Throws std::invalid_argument naming the first thing that does not fit: every index, range and
    // width is checked, because the kernels check nothing.
    void validate() const;
};

}  // namespace nybble
