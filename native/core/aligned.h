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

}  // namespace nybble
