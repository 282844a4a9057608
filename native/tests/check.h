// What the tests of the core report with: a message for each check that fails, and their count at the end.
#pragma once

#include <atomic>
#include <cstdio>
#include <string>

namespace nybble {

inline std::atomic<int> failures{0};

inline void check(bool ok, const std::string& what) {
    if (ok) return;
    ++failures;
    std::fprintf(stderr, "FAILED: %s\n", what.c_str());
}

// The exit status of a test program.
inline int checked() {
    const int count = failures;
    if (count != 0) std::fprintf(stderr, "%d checks failed\n", count);
    return count != 0 ? 1 : 0;
}

}  // namespace nybble
