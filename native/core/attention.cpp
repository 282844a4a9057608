// The attention operator: norms and rotary of queries and keys, appending to the KV cache, and
// attention over pages with online softmax.
//
// Work is cut by segment, key-value head and block of query rows; for single rows (decode) also by
// ranges of keys, whose partial results are combined afterwards. The cuts depend on the shapes only.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/executor.h"

namespace nybble {

namespace {

// Query rows times heads that share a tile of keys and values.
constexpr int64_t kQueryRows = 32;

// Keys of one partial result while decoding.
constexpr int64_t kSplitKeys = 8 * kPageTokens;

constexpr float kMinusInfinity = -1e30F;

}  // namespace

void Executor::plan_attention(const AttentionOp& op) {
    const AttentionShape shape = {op.kv_heads, op.heads, op.head_dim, op.window};
    for (const AttentionTasks& tasks : attention_) {
        if (tasks.shape == shape) {
            return;
        }
    }
    AttentionTasks plan;
    plan.shape = shape;
    plan.fused = true;
    const int64_t per_kv = op.heads / op.kv_heads;
    // A multiple of four rows: what kernels take at a time.
    const int64_t block = std::max<int64_t>(4, (kQueryRows / per_kv + 3) / 4 * 4);
    for (size_t s = 0; s < batch_.segments.size(); ++s) {
        const Segment& segment = batch_.segments[s];
        const bool single = segment.count == 1;
        const int64_t end = segment.position + segment.count;
        for (int64_t head = 0; head < op.kv_heads; ++head) {
            for (int64_t last = segment.count; last > 0;) {
                const int64_t first = std::max<int64_t>(0, single ? 0 : (last - 1) / block * block);
                AttentionTask task;
                task.segment = static_cast<int32_t>(s);
                task.kv_head = static_cast<int32_t>(head);
                task.first = first;
                task.last = last;
                const int64_t position = segment.position + first;
                task.key_first = op.window > 0 ? std::max<int64_t>(0, position - op.window + 1) : 0;
                task.key_last = single ? end : segment.position + last;
                const int64_t from = task.key_first / kSplitKeys;
                const int64_t splits = single ? (task.key_last - 1) / kSplitKeys - from + 1 : 1;
                if (splits == 1) {
                    plan.tasks.push_back(task);
                } else {
                    plan.combine.emplace_back(static_cast<int32_t>(plan.tasks.size()),
                                              static_cast<int32_t>(splits));
                    for (int64_t i = 0; i < splits; ++i) {
                        AttentionTask part = task;
                        part.key_first = std::max(task.key_first, (from + i) * kSplitKeys);
                        part.key_last = std::min(task.key_last, (from + i + 1) * kSplitKeys);
                        part.partial = plan.partials++;
                        part.splits = static_cast<int32_t>(splits);
                        plan.tasks.push_back(part);
                    }
                }
                last = first;
            }
        }
        plan.fused = plan.fused && single;
    }
    plan.fused = plan.fused && plan.partials == 0;
    attention_.push_back(std::move(plan));
}

const Executor::AttentionTasks& Executor::tasks_for(const AttentionOp& op) const {
    const AttentionShape shape = {op.kv_heads, op.heads, op.head_dim, op.window};
    for (const AttentionTasks& tasks : attention_) {
        if (tasks.shape == shape) {
            return tasks;
        }
    }
    return attention_.front();  // not reached: prepare() planned every shape
}

void Executor::rotate_query(const AttentionOp& op, int64_t row, int64_t first_head, int64_t last_head) const {
    const Rope* rope = op.rope != kNone ? &session_.plan_.ropes[static_cast<size_t>(op.rope)] : nullptr;
    for (int64_t head = first_head; head < last_head; ++head) {
        float* q = at(op.q, row) + head * op.head_dim;
        if (op.q_norm.weight != kNone) {
            floats_.rms_norm(q, vector(op.q_norm.weight), q, op.head_dim, op.q_norm.eps, op.q_norm.offset);
        }
        if (rope != nullptr) {
            const float* table = session_.shared_->rope.data() + rope_offset_[static_cast<size_t>(op.rope)] +
                                 row * 2 * rope->rotary_dim;
            floats_.rotate(q, table, rope->rotary_dim, rope->interleaved);
        }
        floats_.scale(q, op.scale, q, op.head_dim);
    }
}

void Executor::append_key(const AttentionOp& op, int64_t row, int64_t kv_head) const {
    const KvEncoding encoding = session_.options_.kv_encoding;
    const KvGroup& group = session_.plan_.groups[static_cast<size_t>(op.group)];
    const Segment& segment =
        batch_.segments[static_cast<size_t>(batch_.row_segment[static_cast<size_t>(row)])];
    const int64_t position = batch_.positions[static_cast<size_t>(row)];
    uint8_t* page = segment.sequence->page(op.group, position / kPageTokens);
    const int64_t head_bytes = group.head_bytes(encoding);
    uint8_t* keys = page + op.layer * group.layer_bytes(encoding) + kv_head * head_bytes;
    uint8_t* values = keys + op.kv_heads * head_bytes;
    float* k = at(op.k, row) + kv_head * op.head_dim;
    if (op.k_norm.weight != kNone) {
        floats_.rms_norm(k, vector(op.k_norm.weight), k, op.head_dim, op.k_norm.eps, op.k_norm.offset);
    }
    if (op.rope != kNone) {
        const Rope& rope = session_.plan_.ropes[static_cast<size_t>(op.rope)];
        const float* table = session_.shared_->rope.data() + rope_offset_[static_cast<size_t>(op.rope)] +
                             row * 2 * rope.rotary_dim;
        floats_.rotate(k, table, rope.rotary_dim, rope.interleaved);
    }
    floats_.store_key(encoding, k, op.head_dim, position % kPageTokens, keys);
    floats_.store_value(encoding, at(op.v, row) + kv_head * op.head_dim, op.head_dim, position % kPageTokens,
                        values);
}

void Executor::attention_task(const AttentionOp& op, const AttentionTask& task, Worker& worker) {
    Session::Scratch& own = *session_.scratch_[static_cast<size_t>(worker.index())];
    const KvEncoding encoding = session_.options_.kv_encoding;
    const KvGroup& group = session_.plan_.groups[static_cast<size_t>(op.group)];
    const Segment& segment = batch_.segments[static_cast<size_t>(task.segment)];
    const int64_t d = op.head_dim;
    const int64_t per_kv = op.heads / op.kv_heads;
    const int64_t query_rows = task.last - task.first;
    const int64_t rows = query_rows * per_kv;

    float* q = own.more_floats.get(rows * (2 * d + kPageTokens + 2) + 2 * rows);
    float* acc = q + rows * d;
    float* scores = acc + rows * d;
    float* maximum = scores + rows * kPageTokens;
    float* sum = maximum + rows;
    int32_t* lo = reinterpret_cast<int32_t*>(sum + rows);
    int32_t* hi = lo + rows;
    float* tiles = own.tiles.get(2 * d * kPageTokens);

    for (int64_t i = 0; i < query_rows; ++i) {
        std::memcpy(q + i * per_kv * d, at(op.q, segment.row + task.first + i) + task.kv_head * per_kv * d,
                    static_cast<size_t>(per_kv * d) * sizeof(float));
    }
    std::memset(acc, 0, static_cast<size_t>(rows * d) * sizeof(float));
    for (int64_t r = 0; r < rows; ++r) {
        maximum[r] = kMinusInfinity;
        sum[r] = 0;
    }
    const int64_t head_bytes = group.head_bytes(encoding);
    const int64_t layer_offset = op.layer * group.layer_bytes(encoding) + task.kv_head * head_bytes;
    for (int64_t p = task.key_first / kPageTokens; p * kPageTokens < task.key_last; ++p) {
        const int64_t start = p * kPageTokens;
        int64_t first = kPageTokens;
        int64_t last = 0;
        for (int64_t i = 0; i < query_rows; ++i) {
            const int64_t position = segment.position + task.first + i;
            int64_t from = op.window > 0 ? position - op.window + 1 : 0;
            from = std::max(from, task.key_first) - start;
            const int64_t to = std::min(position + 1, task.key_last) - start;
            from = std::clamp<int64_t>(from, 0, kPageTokens);
            const int64_t until = std::clamp<int64_t>(to, 0, kPageTokens);
            for (int64_t h = 0; h < per_kv; ++h) {
                lo[i * per_kv + h] = static_cast<int32_t>(from);
                hi[i * per_kv + h] = static_cast<int32_t>(until);
            }
            if (from < until) {
                first = std::min(first, from);
                last = std::max(last, until);
            }
        }
        if (first >= last) {
            continue;
        }
        const uint8_t* keys = segment.sequence->page(op.group, p) + layer_offset;
        const uint8_t* values = keys + op.kv_heads * head_bytes;
        const float* k = tiles;
        const float* v = tiles + d * kPageTokens;
        if (encoding == KvEncoding::f32) {
            k = reinterpret_cast<const float*>(keys);
            v = reinterpret_cast<const float*>(values);
        } else {
            floats_.load_keys(encoding, keys, d, tiles);
            floats_.load_values(encoding, values, d, first, last, tiles + d * kPageTokens);
        }
        floats_.attention_tile(q, rows, d, k, v, lo, hi, op.softcap, maximum, sum, acc, scores);
    }
    if (task.partial >= 0) {
        float* partial = session_.shared_->partial.data() + task.partial * per_kv * (d + 2);
        for (int64_t r = 0; r < rows; ++r) {
            partial[r * (d + 2)] = maximum[r];
            partial[r * (d + 2) + 1] = sum[r];
            std::memcpy(partial + r * (d + 2) + 2, acc + r * d, static_cast<size_t>(d) * sizeof(float));
        }
        return;
    }
    for (int64_t i = 0; i < query_rows; ++i) {
        float* out = at(op.out, segment.row + task.first + i) + task.kv_head * per_kv * d;
        for (int64_t h = 0; h < per_kv; ++h) {
            const int64_t r = i * per_kv + h;
            floats_.scale(acc + r * d, 1.0F / sum[r], out + h * d, d);
        }
    }
}

void Executor::attention(const AttentionOp& op, Worker& worker) {
    const AttentionTasks& plan = tasks_for(op);
    const int64_t tasks = static_cast<int64_t>(plan.tasks.size());
    const int64_t per_kv = op.heads / op.kv_heads;
    if (plan.fused) {
        for (int64_t t = worker.next_task(tasks); t >= 0; t = worker.next_task(tasks)) {
            const AttentionTask& task = plan.tasks[static_cast<size_t>(t)];
            const int64_t row = batch_.segments[static_cast<size_t>(task.segment)].row;
            rotate_query(op, row, task.kv_head * per_kv, (task.kv_head + 1) * per_kv);
            append_key(op, row, task.kv_head);
            attention_task(op, task, worker);
        }
        return;
    }
    constexpr int64_t kRowsPerTask = 8;
    const int64_t blocks = (batch_.rows() + kRowsPerTask - 1) / kRowsPerTask;
    for (int64_t t = worker.next_task(blocks); t >= 0; t = worker.next_task(blocks)) {
        const int64_t end = std::min(batch_.rows(), (t + 1) * kRowsPerTask);
        for (int64_t row = t * kRowsPerTask; row < end; ++row) {
            rotate_query(op, row, 0, op.heads);
            for (int64_t head = 0; head < op.kv_heads; ++head) {
                append_key(op, row, head);
            }
        }
    }
    worker.barrier();
    for (int64_t t = worker.next_task(tasks); t >= 0; t = worker.next_task(tasks)) {
        attention_task(op, plan.tasks[static_cast<size_t>(t)], worker);
    }
    if (plan.combine.empty()) {
        return;
    }
    worker.barrier();
    const int64_t combines = static_cast<int64_t>(plan.combine.size());
    const int64_t d = op.head_dim;
    for (int64_t t = worker.next_task(combines); t >= 0; t = worker.next_task(combines)) {
        const auto [first, splits] = plan.combine[static_cast<size_t>(t)];
        const AttentionTask& task = plan.tasks[static_cast<size_t>(first)];
        const Segment& segment = batch_.segments[static_cast<size_t>(task.segment)];
        float* out = at(op.out, segment.row + task.first) + task.kv_head * per_kv * d;
        for (int64_t h = 0; h < per_kv; ++h) {
            auto part = [&](int32_t i) {
                return session_.shared_->partial.data() + ((task.partial + i) * per_kv + h) * (d + 2);
            };
            float maximum = kMinusInfinity;
            for (int32_t i = 0; i < splits; ++i) {
                maximum = std::max(maximum, part(i)[0]);
            }
            float sum = 0;
            std::memset(out + h * d, 0, static_cast<size_t>(d) * sizeof(float));
            for (int32_t i = 0; i < splits; ++i) {
                const float weight = std::exp(part(i)[0] - maximum);
                sum += weight * part(i)[1];
                for (int64_t j = 0; j < d; ++j) {
                    out[h * d + j] += weight * part(i)[2 + j];
                }
            }
            floats_.scale(out + h * d, 1.0F / sum, out + h * d, d);
        }
    }
}

}  // namespace nybble
