// A small thread pool for bulk-synchronous work: all threads run the same function and meet at
// barriers. Threads spin for a moment between regions, because a token of a small model takes a few
// milliseconds and is cut into hundreds of regions; then they sleep.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace nybble {

class ThreadPool;

// One thread's view of a parallel region.
class Worker {
   public:
    int index() const { return index_; }
    int count() const { return count_; }

    // All threads of the region meet here. Also rewinds the task counter.
    void barrier();

    // The next task of the current phase in [0, tasks), or -1 when none is left. Tasks are handed
    // out dynamically: a thread that the system slows down takes fewer.
    int64_t next_task(int64_t tasks);

   private:
    friend class ThreadPool;
    ThreadPool* pool_ = nullptr;
    int index_ = 0;
    int count_ = 1;
};

class ThreadPool {
   public:
    explicit ThreadPool(int threads);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int threads() const { return threads_; }

    // Runs function(context, worker) on every thread, the calling one included; returns when all
    // are done. The function must not throw.
    void run(void (*function)(void*, Worker&), void* context);

   private:
    friend class Worker;
    void loop(int index);

    int threads_;
    std::vector<std::thread> workers_;
    std::mutex mutex_;
    std::condition_variable wake_;
    std::atomic<int> sleepers_{0};
    bool stop_ = false;

    void (*function_)(void*, Worker&) = nullptr;
    void* context_ = nullptr;
    alignas(64) std::atomic<uint64_t> region_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint32_t> phase_{0};
    alignas(64) std::atomic<int64_t> next_{0};
};

// Threads to use by default: the cores that this process may run on, within its CPU quota
// (affinity mask, cgroup v1 and v2), without counting hyper-threads twice where that can be seen.
int default_thread_count();

// One sentence that says how default_thread_count came to its answer.
const char* default_thread_count_reason();

}  // namespace nybble
