// The tap: sums over the rows that a linear reads, for quantizers: squares, absolute values, and the
// products of every two columns.
//
// Products are summed in float32 over the rows of a micro-batch, then added to float32 totals: n
// terms in two levels have an error that grows with the root of n and not with n. bfloat16 tiles
// would be faster, but their rounding (2^-9 of each product) is not far below the damping that GPTQ
// adds to the diagonal (1 % of its mean). Bound by multiply-adds: half of columns^2 for a row.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/executor.h"

namespace nybble {

namespace {

constexpr int64_t kPanel = kProductTile;  // columns that lie together
constexpr int64_t kBlock = 8;             // panels on each side of a task: in the L2 cache with 512 rows
constexpr int64_t kSumColumns = 256;
constexpr int64_t kSumRows = 64;  // rows summed in float32 before they go to float64

int64_t panels(int64_t columns) { return (columns + kPanel - 1) / kPanel; }

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
    if (session_.plan_.taps[static_cast<size_t>(op.tap)].products != nullptr) {
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

    // Tasks: blocks on and right of the diagonal, counted row by row.
    const int64_t blocks = (panels(k) + kBlock - 1) / kBlock;
    const int64_t tasks = blocks * (blocks + 1) / 2;
    for (int64_t task = worker.next_task(tasks); task >= 0; task = worker.next_task(tasks)) {
        int64_t i_block = 0;
        int64_t rest = task;
        while (rest >= blocks - i_block) {
            rest -= blocks - i_block;
            ++i_block;
        }
        const int64_t j_block = i_block + rest;
        const int64_t i_end = std::min(panels(k), (i_block + 1) * kBlock);
        const int64_t j_end = std::min(panels(k), (j_block + 1) * kBlock);
        for (int64_t i = i_block * kBlock; i < i_end; ++i) {
            for (int64_t j = std::max(i, j_block * kBlock); j < j_end; ++j) {
                const int64_t height = std::min(kPanel, k - i * kPanel);
                const int64_t width = std::min(kPanel, k - j * kPanel);
                float* out = sums.products + i * kPanel * k + j * kPanel;
                if (height == kPanel && width == kPanel) {
                    floats_.add_products(packed + i * panel_size, packed + j * panel_size, rows, out, k);
                    continue;
                }
                float tile[kPanel * kPanel] = {};
                floats_.add_products(packed + i * panel_size, packed + j * panel_size, rows, tile, kPanel);
                for (int64_t r = 0; r < height; ++r) {
                    for (int64_t c = 0; c < width; ++c) {
                        out[r * k + c] += tile[r * kPanel + c];
                    }
                }
            }
        }
    }
}

}  // namespace nybble
