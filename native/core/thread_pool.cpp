#include "core/thread_pool.h"

#include <chrono>

#if defined(_M_X64) || defined(__x86_64__)
#include <immintrin.h>
#endif

namespace nybble {

namespace {

inline void relax() {
#if defined(_M_X64) || defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__) && !defined(_MSC_VER)
    __asm__ volatile("yield");
#endif
}

// Spins before giving the core away: about 50 microseconds at a barrier (others are working), and
// about a millisecond between regions (the caller samples a token and comes back).
constexpr int kBarrierSpins = 2000;
constexpr int kRegionSpins = 30000;

}  // namespace

void Worker::barrier() {
    if (count_ == 1) {
        pool_->next_.store(0, std::memory_order_relaxed);
        return;
    }
    const uint32_t phase = pool_->phase_.load(std::memory_order_relaxed);
    if (pool_->arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) {
        pool_->arrived_.store(0, std::memory_order_relaxed);
        pool_->next_.store(0, std::memory_order_relaxed);
        pool_->phase_.store(phase + 1, std::memory_order_release);
        return;
    }
    int spins = 0;
    while (pool_->phase_.load(std::memory_order_acquire) == phase) {
        relax();
        if (++spins > kBarrierSpins) {
            std::this_thread::yield();
        }
    }
}

int64_t Worker::next_task(int64_t tasks) {
    const int64_t task = pool_->next_.fetch_add(1, std::memory_order_relaxed);
    return task < tasks ? task : -1;
}

ThreadPool::ThreadPool(int threads) : threads_(threads < 1 ? 1 : threads) {
    workers_.reserve(static_cast<size_t>(threads_ - 1));
    for (int i = 1; i < threads_; ++i) {
        workers_.emplace_back([this, i] { loop(i); });
    }
}

ThreadPool::~ThreadPool() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stop_ = true;
        region_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) {
        worker.join();
    }
}

void ThreadPool::run(void (*function)(void*, Worker&), void* context) {
    function_ = function;
    context_ = context;
    next_.store(0, std::memory_order_relaxed);
    region_.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) {
        std::lock_guard<std::mutex> lock(mutex_);
        wake_.notify_all();
    }
    Worker self;
    self.pool_ = this;
    self.index_ = 0;
    self.count_ = threads_;
    function(context, self);
    self.barrier();
}

void ThreadPool::loop(int index) {
    uint64_t seen = 0;
    Worker self;
    self.pool_ = this;
    self.index_ = index;
    self.count_ = threads_;
    for (;;) {
        int spins = 0;
        while (region_.load(std::memory_order_acquire) == seen) {
            relax();
            if (++spins > kRegionSpins) {
                std::unique_lock<std::mutex> lock(mutex_);
                sleepers_.fetch_add(1, std::memory_order_seq_cst);
                wake_.wait(lock, [&] { return region_.load(std::memory_order_seq_cst) != seen; });
                sleepers_.fetch_sub(1, std::memory_order_seq_cst);
            }
        }
        ++seen;
        if (stop_) {
            return;
        }
        function_(context_, self);
        self.barrier();
    }
}

}  // namespace nybble
