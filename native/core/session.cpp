#include "core/session.h"

#include <algorithm>
#include <stdexcept>

#include "core/executor.h"

namespace nybble {

namespace {

// Rows worked on at a time: many, because a weight is dequantized once for all of them; few enough
// that the activations of a large model stay small. Halved until they fit, so that prompts of usual
// lengths fall into equal rounds.
constexpr int64_t kMostRows = 512;
constexpr int64_t kLeastRows = 64;
constexpr int64_t kBufferBytes = 20 << 20;

int64_t choose_max_rows(const Plan& plan, int64_t wanted) {
    if (wanted > 0) {
        return wanted;
    }
    int64_t row_bytes = 0;
    for (size_t i = 0; i < plan.buffers.size(); ++i) {
        row_bytes += plan.buffer_selected[i] ? 0 : plan.buffers[i] * 4;
    }
    int64_t rows = kMostRows;
    while (rows > kLeastRows && rows * row_bytes > kBufferBytes) {
        rows /= 2;
    }
    return rows;
}

}  // namespace

Session::Session(const Plan& plan, const SessionOptions& options)
    : plan_(plan),
      options_(options),
      floats_(float_kernels(options.isa)),
      encodings_(encoding_kernels(options.isa)),
      pool_(options.threads),
      cache_(plan.groups, options.kv_encoding, options.kv_limit_bytes),
      shared_(std::make_unique<Scratch>()) {
    plan.validate();
#if defined(NYBBLE_X86)
    if (options.isa == Isa::amx && !options.precise) {
        gemm_ = bf16_gemm_amx();
    }
#endif
    options_.max_rows = choose_max_rows(plan, options.max_rows);
    buffers_.resize(plan.buffers.size());
    for (size_t i = 0; i < plan.buffers.size(); ++i) {
        if (!plan.buffer_selected[i]) {
            const int64_t count = plan.buffers[i] * options_.max_rows;
            buffers_[i].get(count);
            buffer_bytes_ += count * static_cast<int64_t>(sizeof(float));
        }
    }
    for (int i = 0; i < pool_.threads(); ++i) {
        scratch_.push_back(std::make_unique<Scratch>());
    }
}

Session::~Session() = default;

int64_t Session::output_rows(const std::vector<ForwardItem>& items) {
    int64_t rows = 0;
    for (const ForwardItem& item : items) {
        rows += item.rows == LogitRows::all ? item.count
                                            : (item.rows == LogitRows::last && item.count > 0 ? 1 : 0);
    }
    return rows;
}

void Session::forward(const std::vector<ForwardItem>& items, float* output) {
    cancel_.store(false, std::memory_order_relaxed);
    for (const ForwardItem& item : items) {
        const size_t weights = item.sequence->adapter_weights.size();
        if (weights != 0 && weights != static_cast<size_t>(plan_.adapters)) {
            throw std::invalid_argument("a sequence has " + std::to_string(weights) +
                                        " weights of adapters; the plan has " +
                                        std::to_string(plan_.adapters));
        }
        if ((item.hidden == nullptr) != (plan_.hidden_size == 0)) {
            throw std::invalid_argument(plan_.hidden_size == 0 ? "the plan starts with tokens"
                                                               : "the plan starts with hidden states");
        }
        for (int64_t i = 0; i < item.count && item.hidden == nullptr; ++i) {
            if (item.tokens[i] < 0 || item.tokens[i] >= plan_.vocab_size) {
                throw std::out_of_range("token id " + std::to_string(item.tokens[i]) +
                                        " is outside the vocabulary of " + std::to_string(plan_.vocab_size));
            }
        }
    }
    std::vector<int64_t> lengths;
    for (const ForwardItem& item : items) {
        lengths.push_back(item.sequence->length());
    }
    auto restore = [&] {
        for (size_t i = 0; i < items.size(); ++i) {
            if (!items[i].sequence->truncate(lengths[i])) {
                items[i].sequence->clear();
            }
        }
    };
    int64_t written = 0;
    size_t next_item = 0;
    int64_t next_token = 0;
    try {
        while (next_item < items.size()) {
            MicroBatch batch;
            while (next_item < items.size() && batch.rows() < options_.max_rows) {
                const ForwardItem& item = items[next_item];
                const int64_t count = std::min(item.count - next_token, options_.max_rows - batch.rows());
                if (count > 0) {
                    Segment segment;
                    segment.sequence = item.sequence;
                    segment.row = batch.rows();
                    segment.count = count;
                    segment.position = item.sequence->length();
                    segment.rope_set = item.rope_set;
                    if (item.hidden != nullptr) {
                        segment.hidden = item.hidden + next_token * plan_.hidden_size;
                    } else {
                        batch.tokens.insert(batch.tokens.end(), item.tokens + next_token,
                                            item.tokens + next_token + count);
                    }
                    item.sequence->reserve(count);
                    item.sequence->advance(count);
                    for (int64_t i = 0; i < count; ++i) {
                        batch.positions.push_back(segment.position + i);
                        batch.row_segment.push_back(static_cast<int32_t>(batch.segments.size()));
                        const bool last = next_token + i + 1 == item.count;
                        if (item.rows == LogitRows::all || (item.rows == LogitRows::last && last)) {
                            batch.selected.push_back(static_cast<int32_t>(segment.row + i));
                        }
                    }
                    batch.segments.push_back(segment);
                    next_token += count;
                }
                if (next_token >= item.count) {
                    ++next_item;
                    next_token = 0;
                }
            }
            if (batch.rows() == 0) {
                break;
            }
            batch.output = output + written * plan_.vocab_size;
            run_micro_batch(batch);
            written += static_cast<int64_t>(batch.selected.size());
            for (const Segment& segment : batch.segments) {
                segment.sequence->release_behind_window();
            }
        }
    } catch (...) {
        restore();
        throw;
    }
}

void Session::run_micro_batch(MicroBatch& batch) {
    for (size_t i = 0; i < plan_.buffers.size(); ++i) {
        if (plan_.buffer_selected[i]) {
            buffers_[i].get(plan_.buffers[i] *
                            std::max<int64_t>(1, static_cast<int64_t>(batch.selected.size())));
        }
    }
    Executor executor(*this, batch);
    executor.prepare();
    executor.run();
    if (executor.cancelled()) {
        throw ForwardCancelled();
    }
}

}  // namespace nybble
