// Memory on cache-line boundaries, as kernels want it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace nybble {

struct AlignedDelete {
    void operator()(void* pointer) const noexcept { ::operator delete(pointer, std::align_val_t{64}); }
};

template <typename T>
using AlignedArray = std::unique_ptr<T[], AlignedDelete>;

// Uninitialised; throws std::bad_alloc.
template <typename T>
AlignedArray<T> make_aligned(size_t count) {
    return AlignedArray<T>(static_cast<T*>(::operator new(count * sizeof(T) + 64, std::align_val_t{64})));
}

// Memory that grows to what was asked for and stays.
template <typename T>
class Growing {
   public:
    // The content is lost when it grows.
    T* get(int64_t count) {
        if (count > size_) {
            memory_.reset();
            memory_ = make_aligned<T>(static_cast<size_t>(count));
            size_ = count;
        }
        return memory_.get();
    }
    T* data() const { return memory_.get(); }

   private:
    AlignedArray<T> memory_;
    int64_t size_ = 0;
};

}  // namespace nybble
