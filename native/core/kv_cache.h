// The paged KV cache: sequences own tables of pages; pages hold kPageTokens tokens of all layers of a
// group. Layers that share a sliding window form a group, so that a page behind the window can be
// given back as a whole. Forked sequences share pages until one of them writes.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <vector>

#include "core/aligned.h"
#include "core/kv_encoding.h"

namespace nybble {

// The cache's memory limit is reached.
class CacheFull : public std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Shape of one group of layers.
struct KvGroup {
    int64_t window = 0;  // keys a query sees, itself included; 0: all
    int64_t layers = 0;
    int64_t kv_heads = 0;
    int64_t head_dim = 0;

    // page: [layer][keys: kv head][...], [values: kv head][...]
    int64_t head_bytes(KvEncoding encoding) const { return kv_page_bytes(encoding, head_dim); }
    int64_t layer_bytes(KvEncoding encoding) const { return 2 * kv_heads * head_bytes(encoding); }
    int64_t page_bytes(KvEncoding encoding) const { return layers * layer_bytes(encoding); }
};

struct KvPage {
    AlignedArray<uint8_t> data;
    int64_t references = 1;
};

class KvCache;

// One sequence, used by one thread at a time; different sequences may be used by different threads.
class KvSequence {
   public:
    explicit KvSequence(KvCache& cache);
    ~KvSequence();
    KvSequence(const KvSequence&) = delete;
    KvSequence& operator=(const KvSequence&) = delete;

    int64_t length() const { return length_; }
    bool belongs_to(const KvCache& cache) const { return cache_ == &cache; }

    // Makes room for `count` more tokens: new pages, and private copies of shared ones that will be
    // written. Throws CacheFull and leaves the sequence as it was.
    void reserve(int64_t count);

    // The reserved tokens are now part of the sequence.
    void advance(int64_t count) { length_ += count; }

    // Gives back pages that no later query can see.
    void release_behind_window();

    // Forgets tokens from `length` on. False, and nothing changed, when pages that a window had
    // given back would be needed again: then clear() and start over.
    bool truncate(int64_t length);
    void clear();

    std::unique_ptr<KvSequence> fork() const;

    // The weight of each of the plan's LoRA adapters; empty: all are off. Its keys and values were
    // made with these, so they are set while the sequence is empty.
    std::vector<float> adapter_weights;

    uint8_t* page(int64_t group, int64_t index) const;

   private:
    KvCache* cache_;
    int64_t length_ = 0;
    std::vector<std::vector<KvPage*>> tables_;  // [group][page], nullptr where given back
};

class KvCache {
   public:
    KvCache(std::vector<KvGroup> groups, KvEncoding encoding, int64_t limit_bytes);
    ~KvCache();

    const std::vector<KvGroup>& groups() const { return groups_; }
    KvEncoding encoding() const { return encoding_; }
    int64_t bytes_in_use() const {
        const std::lock_guard<std::mutex> lock(mutex_);
        return used_;
    }
    int64_t bytes_allocated() const {
        const std::lock_guard<std::mutex> lock(mutex_);
        return allocated_;
    }
    int64_t limit_bytes() const { return limit_; }

   private:
    friend class KvSequence;
    KvPage* take(int64_t group);
    void give(int64_t group, KvPage* page);
    void drop_kept_pages();

    std::vector<KvGroup> groups_;
    KvEncoding encoding_;
    mutable std::mutex mutex_;  // guards pages, their reference counts and what follows
    int64_t limit_;
    int64_t used_ = 0;
    int64_t allocated_ = 0;
    std::vector<std::vector<KvPage*>> free_;  // [group]
};

}  // namespace nybble
