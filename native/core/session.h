// A session: a plan, a thread pool, buffers and a KV cache; runs ragged batches of sequences.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/aligned.h"
#include "core/cpu_features.h"
#include "core/kv_cache.h"
#include "core/plan.h"
#include "core/thread_pool.h"
#include "kernels/encoding_kernels.h"
#include "kernels/float_kernels.h"

namespace nybble {

// forward() was cancelled.
class ForwardCancelled : public std::exception {
   public:
    const char* what() const noexcept override { return "cancelled"; }
};

enum class LogitRows : int32_t { none, last, all };

// New tokens for one sequence, or their hidden states where the plan starts with those.
struct ForwardItem {
    KvSequence* sequence = nullptr;
    const int32_t* tokens = nullptr;
    int64_t count = 0;
    LogitRows rows = LogitRows::last;
    int32_t rope_set = 0;           // Rope::inverse_frequency index
    const float* hidden = nullptr;  // [count][hidden_size]
};

struct SessionOptions {
    int threads = 1;
    KvEncoding kv_encoding = KvEncoding::f16;
    int64_t kv_limit_bytes = 0;  // 0: none
    int64_t max_rows = 0;        // rows of activations worked on at a time; 0: chosen
    bool precise = false;        // float32 weights and activations everywhere
    Isa isa = Isa::portable;
};

// Part of a micro-batch: consecutive rows of one sequence.
struct Segment {
    KvSequence* sequence = nullptr;
    int64_t row = 0;
    int64_t count = 0;
    int64_t position = 0;           // of the first row
    const float* hidden = nullptr;  // the first row's hidden state
    int32_t rope_set = 0;
};

// One unit of attention work: query rows [first, last) of a segment for one key-value head, over
// keys [key_first, key_last). With `partial` >= 0 the result is one of `splits` partial ones.
struct AttentionTask {
    int32_t segment = 0;
    int32_t kv_head = 0;
    int64_t first = 0;
    int64_t last = 0;
    int64_t key_first = 0;
    int64_t key_last = 0;
    int64_t partial = -1;
    int32_t splits = 1;
};

// The rows that one pass over the plan works on.
struct MicroBatch {
    std::vector<int32_t> tokens;  // empty where the plan starts with hidden states
    std::vector<int64_t> positions;
    std::vector<Segment> segments;
    std::vector<int32_t> row_segment;
    std::vector<int32_t> selected;  // rows whose logits are wanted
    float* output = nullptr;        // [selected][vocab_size]

    int64_t rows() const { return static_cast<int64_t>(positions.size()); }
};

class Session {
   public:
    // The plan, and the memory its weights point to, must outlive the session.
    Session(const Plan& plan, const SessionOptions& options);
    ~Session();

    std::unique_ptr<KvSequence> new_sequence() { return std::make_unique<KvSequence>(cache_); }

    // Rows of logits that forward() will write for these items.
    static int64_t output_rows(const std::vector<ForwardItem>& items);

    // Runs the new tokens; logits go to `output`, [output_rows][vocab_size]. Throws CacheFull before
    // anything was run, or ForwardCancelled with the sequences' lengths as before the call (or
    // cleared, where a sliding window had already given pages back).
    void forward(const std::vector<ForwardItem>& items, float* output);

    // From any thread: a running forward() stops soon.
    void cancel() { cancel_.store(true, std::memory_order_relaxed); }

    const Plan& plan() const { return plan_; }
    const SessionOptions& options() const { return options_; }
    int threads() const { return pool_.threads(); }
    KvCache& cache() { return cache_; }
    int64_t buffer_bytes() const { return buffer_bytes_; }
    const EncodingKernels& kernels(Encoding encoding) const { return encodings_[static_cast<int>(encoding)]; }
    bool uses_amx() const { return gemm_ != nullptr; }

   private:
    friend class Executor;
    struct Scratch;

    void run_micro_batch(MicroBatch& batch);

    const Plan& plan_;
    SessionOptions options_;
    const FloatKernels* floats_;
    const EncodingKernels* encodings_;
    const Bf16Gemm* gemm_ = nullptr;
    ThreadPool pool_;
    KvCache cache_;
    std::vector<Growing<float>> buffers_;
    std::vector<std::unique_ptr<Scratch>> scratch_;  // one a thread
    std::unique_ptr<Scratch> shared_;
    std::atomic<bool> cancel_{false};
    int64_t buffer_bytes_ = 0;
};

}  // namespace nybble
