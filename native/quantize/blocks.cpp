// The choice of the level, and threads.
#include "quantize/blocks.h"

#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

namespace nybble {

QuantizeRows block_quantizer(Encoding encoding, Isa isa) {
#if NYBBLE_X86
    if (isa >= Isa::avx512) return block_quantizer_avx512(encoding);
    if (isa >= Isa::avx2) return block_quantizer_avx2(encoding);
#endif
    static_cast<void>(isa);
    return block_quantizer_portable(encoding);
}

namespace {

constexpr int64_t side_by_side = 16;        // rows that the widest level does at once
constexpr int64_t task_elements = 1 << 15;  // at least, so that handing tasks out costs nothing

struct Work {
    QuantizeRows quantize;
    const float* values;
    int64_t rows, columns;
    const float* importance;
    uint8_t* out;
    size_t row_bytes;
    int64_t strip;  // rows of a task
    std::atomic<int64_t> next{0};
    std::atomic<int> state{static_cast<int>(Quantized::done)};
};

void work_on(Work* work) {
    for (;;) {
        const int64_t first = work->strip * work->next.fetch_add(1, std::memory_order_relaxed);
        if (first >= work->rows) return;
        const int64_t count = work->rows - first < work->strip ? work->rows - first : work->strip;
        const Quantized state =
            work->quantize(work->values + first * work->columns, count, work->columns, work->importance,
                           work->out + static_cast<size_t>(first) * work->row_bytes);
        if (state != Quantized::done) {
            work->state.store(static_cast<int>(state), std::memory_order_relaxed);
            return;
        }
    }
}

}  // namespace

Quantized quantize_blocks(QuantizeRows quantize, Encoding encoding, const float* values, int64_t rows,
                          int64_t columns, const float* importance, int threads, uint8_t* out) {
    const int32_t block = encoding_info(encoding).block_size;
    if (importance == nullptr) {
        // Rows of a few blocks do as well, and fill the lanes whatever the shape of the matrix is.
        int64_t blocks = 1;
        while (blocks < 4 && columns / block % (2 * blocks) == 0) blocks *= 2;
        rows = rows * (columns / (block * blocks));
        columns = block * blocks;
    }
    const int64_t strip = side_by_side * (1 + task_elements / (side_by_side * columns));
    Work work{quantize, values, rows, columns, importance, out, row_bytes(encoding, columns), strip};
    // Threads of their own, not a ThreadPool: that one spins for the next region, and there is none.
    std::vector<std::thread> others;
    const int64_t tasks = (rows + strip - 1) / strip;
    for (int64_t i = 1; i < threads && i < tasks; ++i) {
        try {
            others.emplace_back(work_on, &work);
        } catch (const std::system_error&) {
            break;  // the system has no more: those that there are do it
        }
    }
    work_on(&work);
    for (std::thread& thread : others) thread.join();
    return static_cast<Quantized>(work.state.load());
}

}  // namespace nybble
