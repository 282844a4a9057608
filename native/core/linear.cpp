// The linear operator: norm(in) @ weights.T with what follows it. Three paths:
//
//   int8     few rows (decode): activations in int8 blocks against encoded weights, in place. Bound by
//            reading the weights.
//   bf16     many rows (prefill) on AMX: blocks of weights are dequantized to bfloat16 into the L2
//            cache and multiplied with all rows.
//   precise  float32 activations and weights: the reference that the others are measured against, and
//            the path of encodings and shapes that have no other.
//
// Tasks are ranges of output columns. No value depends on how they are cut.
#include <algorithm>
#include <cstring>

#include "core/executor.h"

namespace nybble {

namespace {

// Up to this many rows every thread prepares the activations for itself, which costs less than
// meeting the others.
constexpr int64_t kPrivateRows = 4;

// Up to this many rows activations have 16 bits: reading the weights costs more than the second
// product, and a generated token depends on no rounding but that of float32.
constexpr int64_t kWideRows = 8;

// Up to this many columns of float weights (LoRA) blocks of rows are quicker than a dot product each.
constexpr int64_t kShortColumns = 64;

// From this many rows on dequantizing to bf16 pays.
constexpr int64_t kBf16Rows = 6;

// Columns of a weight block on the bf16 path: two tile rows of activations (32 rows x 512 x 2
// bytes) stay in the L1 cache while the weight block (in L2) passes by.
constexpr int64_t kDepth = 512;
constexpr int64_t kTilesPerTask = 32;

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Output columns that the parts have in common order: for gated parts gate and up go together.
int64_t total_rows(const LinearOp& op) {
    if (op.gated) {
        return op.parts[0].rows;
    }
    int64_t rows = 0;
    for (const LinearPart& part : op.parts) {
        rows += part.rows;
    }
    return rows;
}

// A range of rows inside one part.
struct Piece {
    int32_t part;
    int64_t first;
    int64_t count;
};

// Task `index` when every part is cut into pieces of `size` rows; false when there is none.
bool find_piece(const LinearOp& op, int64_t size, int64_t index, Piece& piece) {
    const int32_t parts = op.gated ? 1 : static_cast<int32_t>(op.parts.size());
    for (int32_t p = 0; p < parts; ++p) {
        const int64_t rows = op.parts[static_cast<size_t>(p)].rows;
        const int64_t pieces = (rows + size - 1) / size;
        if (index < pieces) {
            piece = {p, index * size, std::min(size, rows - index * size)};
            return true;
        }
        index -= pieces;
    }
    return false;
}

}  // namespace

Executor::Path Executor::choose_path(const LinearOp& op, int64_t rows) const {
    if (session_.options_.precise || op.columns % 32 != 0) {
        return Path::precise;
    }
    if (session_.gemm_ != nullptr && rows >= kBf16Rows) {
        return Path::bf16;
    }
    if (op.columns <= kShortColumns && std::none_of(op.parts.begin(), op.parts.end(), [&](const auto& part) {
            const Weight& weight = session_.plan_.weights[static_cast<size_t>(part.weight)];
            return session_.kernels(weight.encoding).linear_int8 != nullptr;
        })) {
        return Path::precise;
    }
    return Path::int8;
}

void Executor::prepare_linear(const LinearOp& op, int64_t rows) {
    Session::Scratch& shared = *session_.shared_;
    const int64_t k = op.columns;
    switch (choose_path(op, rows)) {
        case Path::bf16:
            shared.panel.get(round_up(rows, 16) * k);
            break;
        case Path::precise:
            if (op.norm.weight != kNone) {
                shared.floats.get(rows * k);
            }
            break;
        case Path::int8:
            if (rows > kPrivateRows && session_.threads() > 1) {
                shared.int8_values.get(rows * k);
                shared.int8_high.get(rows * k);
                shared.int8_scales.get(rows * k / 32);
                shared.int8_sums.get(rows * k / 16);
                if (op.norm.weight != kNone) {
                    shared.floats.get(rows * k);
                }
            }
            break;
    }
}

void Executor::linear(const LinearOp& op, int64_t rows, Worker& worker) {
    switch (choose_path(op, rows)) {
        case Path::int8:
            linear_int8(op, rows, worker);
            break;
        case Path::bf16:
            linear_bf16(op, rows, worker);
            break;
        case Path::precise:
            linear_precise(op, rows, worker);
            break;
    }
}

// Rows [first, last) of the input after the norm, `columns` floats apart.
void Executor::normed_rows(const LinearOp& op, int64_t first, int64_t last, float* out) const {
    for (int64_t row = first; row < last; ++row) {
        floats_.rms_norm(at(op.in, row), vector(op.norm.weight), out + (row - first) * op.columns, op.columns,
                         op.norm.eps, op.norm.offset);
    }
}

// Writes `count` columns of `rows` finished rows: activation, bias, residual. gate (and up) hold
// [rows][stride]; they are overwritten.
void Executor::finish_rows(const LinearOp& op, const float* gate, const float* up, int64_t stride,
                           int64_t rows, const LinearPart& part, int64_t first, int64_t count) {
    for (int64_t row = 0; row < rows; ++row) {
        float* out = at(part.out, row) + first;
        const float* y = gate + row * stride;
        if (op.gated) {
            const LinearPart& up_part = op.parts[1];
            const float* u = up + row * stride;
            if (part.bias != kNone) {
                floats_.add(y, vector(part.bias) + first, const_cast<float*>(y), count);
            }
            if (up_part.bias != kNone) {
                floats_.add(u, vector(up_part.bias) + first, const_cast<float*>(u), count);
            }
            floats_.gated(y, u, out, count, op.activation);
            continue;
        }
        if (part.bias != kNone) {
            // Not into `out`: the residual may still lie there.
            floats_.add(y, vector(part.bias) + first, const_cast<float*>(y), count);
        }
        if (part.residual.buffer != kNone) {
            floats_.add(y, at(part.residual, row) + first, out, count);
        } else if (y != out) {
            std::memcpy(out, y, static_cast<size_t>(count) * sizeof(float));
        }
    }
}

void Executor::linear_int8(const LinearOp& op, int64_t rows, Worker& worker) {
    Session::Scratch& own = *session_.scratch_[static_cast<size_t>(worker.index())];
    const bool shared = rows > kPrivateRows && worker.count() > 1;
    Session::Scratch& place = shared ? *session_.shared_ : own;
    const int64_t k = op.columns;
    bool any_int8 = false;
    bool any_float = false;
    bool wide = rows <= kWideRows;
    for (const LinearPart& part : op.parts) {
        const EncodingKernels& kernels =
            session_.kernels(session_.plan_.weights[static_cast<size_t>(part.weight)].encoding);
        (kernels.linear_int8 != nullptr ? any_int8 : any_float) = true;
        wide = wide && (kernels.linear_int8 == nullptr || kernels.linear_int16 != nullptr);
    }
    // Shared memory has its size from prepare_linear(): these calls only return it.
    int8_t* values = place.int8_values.get(rows * k);
    int8_t* high = wide ? place.int8_high.get(rows * k) : nullptr;
    float* scales = place.int8_scales.get(rows * k / 32);
    float* sums = place.int8_sums.get(rows * k / 16);
    float* normed = op.norm.weight != kNone ? place.floats.get(rows * k) : nullptr;
    auto prepare_row = [&](int64_t row) {
        const float* x = at(op.in, row);
        if (normed != nullptr) {
            normed_rows(op, row, row + 1, normed + row * k);
            x = normed + row * k;
        }
        if (any_int8 && wide) {
            floats_.quantize_int16(x, k, values + row * k, high + row * k, scales + row * (k / 32),
                                   sums + row * (k / 16));
        } else if (any_int8) {
            floats_.quantize_int8(x, k, values + row * k, scales + row * (k / 32), sums + row * (k / 16));
        }
    };
    if (shared) {
        for (int64_t row = worker.index(); row < rows; row += worker.count()) {
            prepare_row(row);
        }
        worker.barrier();
    } else {
        for (int64_t row = 0; row < rows; ++row) {
            prepare_row(row);
        }
    }
    const float* x_float = normed != nullptr ? normed : (any_float ? at(op.in, 0) : nullptr);
    const int64_t x_float_stride = normed != nullptr ? k : row_stride(op.in);

    const Int8Rows x = {values, scales, sums, k, high};
    const int64_t total = total_rows(op);
    const int64_t size = std::clamp<int64_t>(round_up(total / (worker.count() * 6), 16), 16, 256);
    float* scratch = own.more_floats.get(2 * rows * size);
    for (int64_t task = worker.next_task(1 << 30); task >= 0; task = worker.next_task(1 << 30)) {
        Piece piece;
        if (!find_piece(op, size, task, piece)) {
            break;
        }
        auto multiply = [&](const LinearPart& part, float* y, int64_t stride) {
            const Weight& weight = session_.plan_.weights[static_cast<size_t>(part.weight)];
            const uint8_t* data = weight.data + static_cast<size_t>(part.row + piece.first) * weight.stride;
            const EncodingKernels& kernels = session_.kernels(weight.encoding);
            if (kernels.linear_int8 != nullptr) {
                (wide ? kernels.linear_int16 : kernels.linear_int8)(data, weight.stride, piece.count, x, rows,
                                                                    y, stride);
            } else {
                kernels.linear_f32(data, weight.stride, piece.count, x_float, x_float_stride, k, rows, y,
                                   stride);
            }
        };
        const LinearPart& part = op.parts[static_cast<size_t>(piece.part)];
        if (!op.gated && part.bias == kNone && part.residual.buffer == kNone) {
            multiply(part, at(part.out, 0) + piece.first, row_stride(part.out));
            continue;
        }
        multiply(part, scratch, size);
        if (op.gated) {
            multiply(op.parts[1], scratch + rows * size, size);
        }
        finish_rows(op, scratch, scratch + rows * size, size, rows, part, piece.first, piece.count);
    }
}

void Executor::linear_precise(const LinearOp& op, int64_t rows, Worker& worker) {
    Session::Scratch& own = *session_.scratch_[static_cast<size_t>(worker.index())];
    const int64_t k = op.columns;
    const float* x = at(op.in, 0);
    int64_t x_stride = row_stride(op.in);
    if (op.norm.weight != kNone) {
        float* normed = session_.shared_->floats.data();
        for (int64_t row = worker.index(); row < rows; row += worker.count()) {
            normed_rows(op, row, row + 1, normed + row * k);
        }
        x = normed;
        x_stride = k;
        worker.barrier();
    }
    constexpr int64_t size = 32;
    float* panel = own.floats.get(size * k);
    float* scratch = own.more_floats.get(2 * rows * size);
    for (int64_t task = worker.next_task(1 << 30); task >= 0; task = worker.next_task(1 << 30)) {
        Piece piece;
        if (!find_piece(op, size, task, piece)) {
            break;
        }
        auto multiply = [&](const LinearPart& part, float* y) {
            const Weight& weight = session_.plan_.weights[static_cast<size_t>(part.weight)];
            const EncodingKernels& kernels = session_.kernels(weight.encoding);
            for (int64_t i = 0; i < piece.count; ++i) {
                kernels.dequantize_f32(
                    weight.data + static_cast<size_t>(part.row + piece.first + i) * weight.stride,
                    panel + i * k, k);
            }
            floats_.gemm(x, x_stride, rows, panel, k, piece.count, k, y, size);
        };
        const LinearPart& part = op.parts[static_cast<size_t>(piece.part)];
        multiply(part, scratch);
        if (op.gated) {
            multiply(op.parts[1], scratch + rows * size);
        }
        finish_rows(op, scratch, scratch + rows * size, size, rows, part, piece.first, piece.count);
    }
}

void Executor::linear_bf16(const LinearOp& op, int64_t rows, Worker& worker) {
    const Bf16Gemm& gemm = *session_.gemm_;
    Session::Scratch& own = *session_.scratch_[static_cast<size_t>(worker.index())];
    const int64_t k = op.columns;
    const int64_t m_tiles = (rows + 15) / 16;
    const int64_t x_stride = 16 * k;

    // Activations: norm, round and pack, 16 rows a task.
    uint16_t* x = session_.shared_->panel.data();
    float* normed = op.norm.weight != kNone ? own.floats.get(16 * k) : nullptr;
    for (int64_t tile = worker.next_task(m_tiles); tile >= 0; tile = worker.next_task(m_tiles)) {
        const int64_t first = tile * 16;
        const int64_t last = std::min(rows, first + 16);
        if (normed != nullptr) {
            normed_rows(op, first, last, normed);
            gemm.pack(normed, k, last - first, k, x + tile * x_stride);
        } else {
            gemm.pack(at(op.in, first), row_stride(op.in), last - first, k, x + tile * x_stride);
        }
    }
    worker.barrier();

    // Tiles of 16 weight rows. Gated: gate and up tiles alternate, so that both are at hand at the end.
    struct Tile {
        const LinearPart* part;
        int64_t row;
        int64_t rows;
    };
    const int32_t parts = static_cast<int32_t>(op.parts.size());
    int64_t tiles = 0;
    for (const LinearPart& part : op.parts) {
        tiles += (part.rows + 15) / 16;
    }
    auto find_tile = [&](int64_t index) {
        if (op.gated) {
            const LinearPart& part = op.parts[static_cast<size_t>(index & 1)];
            const int64_t row = index / 2 * 16;
            return Tile{&part, row, std::min<int64_t>(16, part.rows - row)};
        }
        for (int32_t p = 0; p < parts; ++p) {
            const LinearPart& part = op.parts[static_cast<size_t>(p)];
            const int64_t count = (part.rows + 15) / 16;
            if (index < count) {
                return Tile{&part, index * 16, std::min<int64_t>(16, part.rows - index * 16)};
            }
            index -= count;
        }
        return Tile{nullptr, 0, 0};
    };
    // An even number of tiles a task, and about the same number of tasks for every thread.
    const int64_t rounds = (tiles + worker.count() * kTilesPerTask - 1) / (worker.count() * kTilesPerTask);
    const int64_t per_task = round_up((tiles + worker.count() * rounds - 1) / (worker.count() * rounds), 2);
    const int64_t tasks = (tiles + per_task - 1) / per_task;

    const int64_t depth = k <= kDepth + kDepth / 4 ? k : kDepth;
    const int64_t ldw = depth + 32;  // an odd number of cache lines: rows fall into different sets
    uint16_t* panel = own.panel.get(per_task * 16 * ldw);
    float* wide = own.floats.get(std::max<int64_t>(depth, op.norm.weight != kNone ? 16 * k : 0));
    float* sums = own.more_floats.get(per_task * m_tiles * 256 + 256);
    float* product = sums + per_task * m_tiles * 256;

    for (int64_t task = worker.next_task(tasks); task >= 0; task = worker.next_task(tasks)) {
        const int64_t first_tile = task * per_task;
        const int64_t count = std::min(per_task, tiles - first_tile);
        for (int64_t begin = 0; begin < k; begin += depth) {
            const int64_t length = std::min(depth, k - begin);
            for (int64_t t = 0; t < count; ++t) {
                const Tile tile = find_tile(first_tile + t);
                const Weight& weight = session_.plan_.weights[static_cast<size_t>(tile.part->weight)];
                const EncodingKernels& kernels = session_.kernels(weight.encoding);
                const EncodingInfo& info = encoding_info(weight.encoding);
                const size_t skip =
                    static_cast<size_t>(begin / info.block_size) * static_cast<size_t>(info.block_bytes);
                for (int64_t r = 0; r < tile.rows; ++r) {
                    const uint8_t* row = weight.data +
                                         static_cast<size_t>(tile.part->row + tile.row + r) * weight.stride +
                                         skip;
                    uint16_t* out = panel + (t * 16 + r) * ldw;
                    if (kernels.dequantize_bf16 != nullptr) {
                        kernels.dequantize_bf16(row, out, length);
                    } else {
                        kernels.dequantize_f32(row, wide, length);
                        floats_.to_bf16(wide, out, length);
                    }
                }
            }
            gemm.multiply(panel, ldw, count, x + begin * 16, x_stride, m_tiles, length, sums, begin > 0);
        }
        const int64_t step = op.gated ? 2 : 1;
        for (int64_t t = 0; t < count; t += step) {
            const Tile tile = find_tile(first_tile + t);
            const LinearPart& part = *tile.part;
            for (int64_t i = 0; i < m_tiles; ++i) {
                float* c = sums + (t * m_tiles + i) * 256;
                const int64_t row = i * 16;
                const int64_t tile_rows = std::min<int64_t>(16, rows - row);
                auto add_bias = [&](float* to, const LinearPart& of) {
                    if (of.bias != kNone) {
                        for (int64_t r = 0; r < tile.rows; ++r) {
                            const float bias = vector(of.bias)[tile.row + r];
                            for (int j = 0; j < 16; ++j) {
                                to[r * 16 + j] += bias;
                            }
                        }
                    }
                };
                add_bias(c, part);
                if (op.gated) {
                    float* up = c + m_tiles * 256;
                    add_bias(up, op.parts[1]);
                    floats_.gated(c, up, c, 256, op.activation);
                }
                float* out = at(part.out, row) + tile.row;
                const int64_t stride = row_stride(part.out);
                if (part.residual.buffer == kNone) {
                    gemm.store_transposed(c, out, stride, tile_rows, tile.rows);
                } else {
                    gemm.store_transposed(c, product, 16, 16, 16);
                    const int64_t residual_stride = row_stride(part.residual);
                    const float* residual = at(part.residual, row) + tile.row;
                    for (int64_t r = 0; r < tile_rows; ++r) {
                        floats_.add(product + r * 16, residual + r * residual_stride, out + r * stride,
                                    tile.rows);
                    }
                }
            }
        }
    }
}

}  // namespace nybble
