// The tap: sums over the rows that a linear reads, for quantizers: squares, absolute values, and the
// products of every two columns.
//
// Products are summed in float32 over the rows of a micro-batch, then added to float32 totals: n
// terms in two levels have an error that grows with the root of n and not with n. On AMX each value is
// split into two of bfloat16: one alone would round products by 2^-9, which is not far below the
// damping that GPTQ adds to the diagonal (1 % of its mean). Bound by multiply-adds: half of columns^2
// for a row, three times that on AMX.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/executor.h"
#include "kernels/generic/half.h"

namespace nybble {

namespace {

constexpr int64_t kPanel = kProductTile;  // columns that lie together
constexpr int64_t kBlock = 8;             // panels on each side of a task: in the L2 cache with 512 rows
constexpr int64_t kSumColumns = 256;
constexpr int64_t kSumRows = 64;  // rows summed in float32 before they go to float64

constexpr int64_t kTileBlock = 16;  // the same on AMX

int64_t panels(int64_t columns) { return (columns + kPanel - 1) / kPanel; }

// Panels [i_begin, i_end) times [j_begin, j_end): a block on or right of the diagonal.
struct Block {
    int64_t i_begin, i_end, j_begin, j_end;
};

int64_t block_count(int64_t columns, int64_t size) {
    const int64_t blocks = (panels(columns) + size - 1) / size;
    return blocks * (blocks + 1) / 2;
}

// Blocks are counted row by row.
Block find_block(int64_t columns, int64_t size, int64_t index) {
    const int64_t count = panels(columns);
    const int64_t blocks = (count + size - 1) / size;
    int64_t i = 0;
    while (index >= blocks - i) {
        index -= blocks - i;
        ++i;
    }
    const int64_t j = i + index;
    return {i * size, std::min(count, (i + 1) * size), j * size, std::min(count, (j + 1) * size)};
}

// Adds a tile of 16 x 16 to where panels i and j meet, as far as there are columns.
void add_tile(const FloatKernels& floats, const Tap& sums, int64_t i, int64_t j, const float* tile) {
    const int64_t k = sums.columns;
    const int64_t height = std::min(kPanel, k - i * kPanel);
    const int64_t width = std::min(kPanel, k - j * kPanel);
    float* out = sums.products + i * kPanel * k + j * kPanel;
    for (int64_t r = 0; r < height; ++r) {
        floats.add(out + r * k, tile + r * kPanel, out + r * k, width);
    }
}

// Where the two halves of all columns lie, in elements of 16 bits: [high, low] as rows of
// Bf16Gemm::multiply's w, then [high, low] packed as its x.
struct Halves {
    Halves(int64_t columns, int64_t rows)
        : depth((rows + 31) / 32 * 32),
          ldw(depth + 32),  // an odd number of cache lines: rows fall into different sets
          plain(panels(columns) * kPanel * ldw),
          packed(panels(columns) * kPanel * depth) {}
    int64_t depth, ldw, plain, packed;
};

void add_sums(const float* x, int64_t stride, int64_t rows, int64_t count, double* squares,
              double* absolute) {
    float s[kSumColumns];
    float a[kSumColumns];
    for (int64_t begin = 0; begin < rows; begin += kSumRows) {
        std::fill(s, s + count, 0.0F);
        std::fill(a, a + count, 0.0F);
        const int64_t end = std::min(rows, begin + kSumRows);
        for (int64_t row = begin; row < end; ++row) {
            const float* from = x + row * stride;
            for (int64_t i = 0; i < count; ++i) {
                s[i] += from[i] * from[i];
                a[i] += std::fabs(from[i]);
            }
        }
        for (int64_t i = 0; i < count; ++i) {
            squares[i] += static_cast<double>(s[i]);
            absolute[i] += static_cast<double>(a[i]);
        }
    }
}

}  // namespace

void Executor::prepare_tap(const TapOp& op, int64_t rows) {
    if (op.norm.weight != kNone) {
        session_.shared_->floats.get(rows * op.columns);
    }
    if (session_.plan_.taps[static_cast<size_t>(op.tap)].products == nullptr) {
        return;
    }
    if (session_.gemm_ != nullptr) {
        const Halves halves(op.columns, rows);
        session_.shared_->panel.get(2 * (halves.plain + halves.packed));
    } else {
        session_.shared_->more_floats.get(panels(op.columns) * rows * kPanel);
    }
}

void Executor::tap(const TapOp& op, int64_t rows, Worker& worker) {
    const Tap& sums = session_.plan_.taps[static_cast<size_t>(op.tap)];
    const int64_t k = op.columns;
    const float* x = at(op.in, 0);
    int64_t stride = row_stride(op.in);
    if (op.norm.weight != kNone) {
        float* normed = session_.shared_->floats.data();
        for (int64_t row = worker.index(); row < rows; row += worker.count()) {
            floats_.rms_norm(at(op.in, row), vector(op.norm.weight), normed + row * k, k, op.norm.eps,
                             op.norm.offset);
        }
        x = normed;
        stride = k;
        worker.barrier();
    }
    for (int64_t first = worker.index() * kSumColumns; first < k; first += worker.count() * kSumColumns) {
        add_sums(x + first, stride, rows, std::min(kSumColumns, k - first), sums.sum_squares + first,
                 sums.sum_absolute + first);
    }
    if (sums.products == nullptr) {
        return;
    }
    if (session_.gemm_ != nullptr) {
        products_bf16(sums, x, stride, rows, worker);
    } else {
        products_f32(sums, x, stride, rows, worker);
    }
}

void Executor::products_f32(const Tap& sums, const float* x, int64_t stride, int64_t rows, Worker& worker) {
    const int64_t k = sums.columns;
    // Panels of 16 columns: row after row, zeros behind the last column.
    float* packed = session_.shared_->more_floats.data();
    const int64_t panel_size = rows * kPanel;
    for (int64_t p = worker.index(); p < panels(k); p += worker.count()) {
        const int64_t width = std::min(kPanel, k - p * kPanel);
        float* to = packed + p * panel_size;
        for (int64_t row = 0; row < rows; ++row, to += kPanel) {
            std::memcpy(to, x + row * stride + p * kPanel, static_cast<size_t>(width) * sizeof(float));
            std::fill(to + width, to + kPanel, 0.0F);
        }
    }
    worker.barrier();

    const int64_t tasks = block_count(k, kBlock);
    for (int64_t task = worker.next_task(tasks); task >= 0; task = worker.next_task(tasks)) {
        const Block block = find_block(k, kBlock, task);
        for (int64_t i = block.i_begin; i < block.i_end; ++i) {
            for (int64_t j = std::max(i, block.j_begin); j < block.j_end; ++j) {
                if ((std::max(i, j) + 1) * kPanel <= k) {
                    floats_.add_products(packed + i * panel_size, packed + j * panel_size, rows,
                                         sums.products + i * kPanel * k + j * kPanel, k);
                    continue;
                }
                float tile[kPanel * kPanel] = {};
                floats_.add_products(packed + i * panel_size, packed + j * panel_size, rows, tile, kPanel);
                add_tile(floats_, sums, i, j, tile);
            }
        }
    }
}

// x = high + low, both bfloat16, so that x^T x is high^T high + high^T low + low^T high but for the
// products of the lows, 2^-16 of the whole: what float32 sums lose too.
void Executor::products_bf16(const Tap& sums, const float* x, int64_t stride, int64_t rows, Worker& worker) {
    const Bf16Gemm& gemm = *session_.gemm_;
    Session::Scratch& own = *session_.scratch_[static_cast<size_t>(worker.index())];
    const int64_t k = sums.columns;
    const Halves halves(k, rows);
    uint16_t* memory = session_.shared_->panel.data();
    const int64_t depth = halves.depth;
    float* high = own.floats.get(2 * kPanel * depth);
    float* low = high + kPanel * depth;
    for (int64_t p = worker.index(); p < panels(k); p += worker.count()) {
        const int64_t width = std::min(kPanel, k - p * kPanel);
        uint16_t* plain_high = memory + p * kPanel * halves.ldw;
        uint16_t* plain_low = plain_high + halves.plain;
        std::fill(high, high + kPanel * depth, 0.0F);
        for (int64_t row = 0; row < rows; ++row) {
            for (int64_t i = 0; i < width; ++i) {
                high[i * depth + row] = x[row * stride + p * kPanel + i];
            }
        }
        for (int64_t i = 0; i < kPanel; ++i) {
            float* value = high + i * depth;
            floats_.to_bf16(value, plain_high + i * halves.ldw, depth);
            for (int64_t row = 0; row < depth; ++row) {
                const float rounded = bf16_to_float(plain_high[i * halves.ldw + row]);
                low[i * depth + row] = value[row] - rounded;
                value[row] = rounded;
            }
            floats_.to_bf16(low + i * depth, plain_low + i * halves.ldw, depth);
        }
        uint16_t* packed = memory + 2 * halves.plain + p * kPanel * depth;
        gemm.pack(high, depth, kPanel, depth, packed);
        gemm.pack(low, depth, kPanel, depth, packed + halves.packed);
    }
    worker.barrier();

    float* tiles = own.more_floats.get(kTileBlock * kTileBlock * kPanel * kPanel);
    const int64_t tasks = block_count(k, kTileBlock);
    for (int64_t task = worker.next_task(tasks); task >= 0; task = worker.next_task(tasks)) {
        const Block block = find_block(k, kTileBlock, task);
        const int64_t heights = block.i_end - block.i_begin;
        const int64_t widths = block.j_end - block.j_begin;
        const auto multiply = [&](int64_t w_low, int64_t x_low, bool accumulate) {
            const uint16_t* w = memory + w_low * halves.plain + block.i_begin * kPanel * halves.ldw;
            const uint16_t* y =
                memory + 2 * halves.plain + x_low * halves.packed + block.j_begin * kPanel * depth;
            gemm.multiply(w, halves.ldw, heights, y, kPanel * depth, widths, depth, tiles, accumulate);
        };
        multiply(0, 1, false);  // the small ones first
        multiply(1, 0, true);
        multiply(0, 0, true);
        for (int64_t i = block.i_begin; i < block.i_end; ++i) {
            for (int64_t j = std::max(i, block.j_begin); j < block.j_end; ++j) {
                add_tile(floats_, sums, i, j,
                         tiles + ((i - block.i_begin) * widths + j - block.j_begin) * kPanel * kPanel);
            }
        }
    }
}

}  // namespace nybble
