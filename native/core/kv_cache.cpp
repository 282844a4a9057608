#include "core/kv_cache.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "kernels/float_kernels.h"

namespace nybble {

namespace {

int64_t pages_for(int64_t tokens) { return (tokens + kPageTokens - 1) / kPageTokens; }

// First key that the query at position `length` sees.
int64_t first_visible(const KvGroup& group, int64_t length) {
    return group.window > 0 ? std::max<int64_t>(0, length - group.window + 1) : 0;
}

// Free pages kept per group for the next sequence.
constexpr size_t kKeptPages = 4;

}  // namespace

KvCache::KvCache(std::vector<KvGroup> groups, KvEncoding encoding, int64_t limit_bytes)
    : groups_(std::move(groups)), encoding_(encoding), limit_(limit_bytes), free_(groups_.size()) {}

KvCache::~KvCache() {
    for (auto& pages : free_) {
        for (KvPage* page : pages) {
            delete page;
        }
    }
}

void KvCache::drop_kept_pages() {
    for (size_t g = 0; g < free_.size(); ++g) {
        for (KvPage* page : free_[g]) {
            allocated_ -= groups_[g].page_bytes(encoding_);
            delete page;
        }
        free_[g].clear();
    }
}

KvPage* KvCache::take(int64_t group) {
    const size_t g = static_cast<size_t>(group);
    const int64_t bytes = groups_[g].page_bytes(encoding_);
    if (!free_[g].empty()) {
        KvPage* page = free_[g].back();
        free_[g].pop_back();
        page->references = 1;
        used_ += bytes;
        return page;
    }
    if (limit_ > 0 && allocated_ + bytes > limit_) {
        drop_kept_pages();  // they may be another group's
    }
    if (limit_ > 0 && allocated_ + bytes > limit_) {
        throw CacheFull("the KV cache is at its limit of " + std::to_string(limit_) + " bytes");
    }
    auto page = std::make_unique<KvPage>();
    page->data = make_aligned<uint8_t>(static_cast<size_t>(bytes));
    std::memset(page->data.get(), 0, static_cast<size_t>(bytes));
    allocated_ += bytes;
    used_ += bytes;
    return page.release();
}

void KvCache::give(int64_t group, KvPage* page) {
    if (--page->references > 0) {
        return;
    }
    const size_t g = static_cast<size_t>(group);
    const int64_t bytes = groups_[g].page_bytes(encoding_);
    used_ -= bytes;
    if (free_[g].size() < kKeptPages) {
        free_[g].push_back(page);
    } else {
        allocated_ -= bytes;
        delete page;
    }
}

KvSequence::KvSequence(KvCache& cache) : cache_(&cache), tables_(cache.groups().size()) {}

KvSequence::~KvSequence() { clear(); }

void KvSequence::reserve(int64_t count) {
    const std::lock_guard<std::mutex> lock(cache_->mutex_);
    const int64_t needed = pages_for(length_ + count);
    const int64_t first = length_ / kPageTokens;
    std::vector<std::pair<int64_t, KvPage*>> taken;  // by group, in order of use
    auto undo = [&] {
        for (auto& [group, page] : taken) {
            cache_->give(group, page);
        }
    };
    try {
        for (int64_t g = 0; g < static_cast<int64_t>(tables_.size()); ++g) {
            auto& table = tables_[static_cast<size_t>(g)];
            const int64_t have = static_cast<int64_t>(table.size());
            if (first < have && table[static_cast<size_t>(first)] != nullptr &&
                table[static_cast<size_t>(first)]->references > 1) {
                taken.emplace_back(g, cache_->take(g));
            }
            for (int64_t p = have; p < needed; ++p) {
                taken.emplace_back(g, cache_->take(g));
            }
        }
    } catch (...) {
        undo();
        throw;
    }
    size_t next = 0;
    for (int64_t g = 0; g < static_cast<int64_t>(tables_.size()); ++g) {
        auto& table = tables_[static_cast<size_t>(g)];
        const size_t at = static_cast<size_t>(first);
        if (at < table.size() && table[at] != nullptr && table[at]->references > 1) {
            KvPage* copy = taken[next++].second;
            const KvGroup& group = cache_->groups()[static_cast<size_t>(g)];
            std::memcpy(copy->data.get(), table[at]->data.get(),
                        static_cast<size_t>(group.page_bytes(cache_->encoding())));
            cache_->give(g, table[at]);
            table[at] = copy;
        }
        while (static_cast<int64_t>(table.size()) < needed) {
            table.push_back(taken[next++].second);
        }
    }
}

void KvSequence::release_behind_window() {
    const std::lock_guard<std::mutex> lock(cache_->mutex_);
    for (int64_t g = 0; g < static_cast<int64_t>(tables_.size()); ++g) {
        const KvGroup& group = cache_->groups()[static_cast<size_t>(g)];
        auto& table = tables_[static_cast<size_t>(g)];
        const int64_t keep = first_visible(group, length_) / kPageTokens;
        for (int64_t p = std::min<int64_t>(keep, static_cast<int64_t>(table.size())) - 1; p >= 0; --p) {
            KvPage*& page = table[static_cast<size_t>(p)];
            if (page == nullptr) {
                break;
            }
            cache_->give(g, page);
            page = nullptr;
        }
    }
}

bool KvSequence::truncate(int64_t length) {
    const std::lock_guard<std::mutex> lock(cache_->mutex_);
    if (length >= length_) {
        return length == length_;
    }
    for (size_t g = 0; g < tables_.size(); ++g) {
        const KvGroup& group = cache_->groups()[g];
        const int64_t first = first_visible(group, length) / kPageTokens;
        const int64_t last = pages_for(length);
        for (int64_t p = first; p < last; ++p) {
            if (tables_[g][static_cast<size_t>(p)] == nullptr) {
                return false;
            }
        }
    }
    const size_t keep = static_cast<size_t>(pages_for(length));
    for (size_t g = 0; g < tables_.size(); ++g) {
        while (tables_[g].size() > keep) {
            if (KvPage* page = tables_[g].back()) {
                cache_->give(static_cast<int64_t>(g), page);
            }
            tables_[g].pop_back();
        }
    }
    length_ = length;
    return true;
}

void KvSequence::clear() {
    const std::lock_guard<std::mutex> lock(cache_->mutex_);
    for (size_t g = 0; g < tables_.size(); ++g) {
        for (KvPage* page : tables_[g]) {
            if (page != nullptr) {
                cache_->give(static_cast<int64_t>(g), page);
            }
        }
        tables_[g].clear();
    }
    length_ = 0;
}

std::unique_ptr<KvSequence> KvSequence::fork() const {
    const std::lock_guard<std::mutex> lock(cache_->mutex_);
    auto copy = std::make_unique<KvSequence>(*cache_);
    copy->length_ = length_;
    copy->tables_ = tables_;
    copy->adapter_weights = adapter_weights;
    for (auto& table : copy->tables_) {
        for (KvPage* page : table) {
            if (page != nullptr) {
                ++page->references;
            }
        }
    }
    return copy;
}

uint8_t* KvSequence::page(int64_t group, int64_t index) const {
    const KvPage* page = tables_[static_cast<size_t>(group)][static_cast<size_t>(index)];
    return page != nullptr ? page->data.get() : nullptr;
}

}  // namespace nybble
