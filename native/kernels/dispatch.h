// Small helpers to turn a run-time count into a compile-time one.
#pragma once

#include <cstdint>

#include "core/compiler.h"

namespace nybble {
namespace {

template <int N>
struct Constant {
    static constexpr int value = N;
};

// Calls run(Constant<rows>, first row) for groups of four activation rows and then the rest.
template <typename Run>
NYBBLE_ALWAYS_INLINE void for_activation_rows(int64_t m, const Run& run) {
    int64_t first = 0;
    for (; m - first >= 4; first += 4) run(Constant<4>{}, first);
    if (m - first == 3) run(Constant<3>{}, first);
    if (m - first == 2) run(Constant<2>{}, first);
    if (m - first == 1) run(Constant<1>{}, first);
}

}  // namespace
}  // namespace nybble
