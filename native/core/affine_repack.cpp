#include "core/affine_repack.h"

#include <cstring>

namespace nybble {

namespace {

constexpr uint64_t low_nibbles = 0x0f0f0f0f0f0f0f0fu;

uint64_t load(const uint8_t* p) {
    uint64_t word = 0;
    std::memcpy(&word, p, sizeof word);
    return word;
}

// Bytes 0 to 3 of each word take turns: a0 b0 a1 b1 ...
uint64_t interleave_halves(uint64_t a, uint64_t b) {
    const auto spread = [](uint64_t v) {
        v &= 0xffffffffu;
        v = (v | (v << 16)) & 0x0000ffff0000ffffu;
        return (v | (v << 8)) & 0x00ff00ff00ff00ffu;
    };
    return spread(a) | (spread(b) << 8);
}

// 32 nibbles in 16 bytes. Little-endian, as every machine that the core is built for.
void reorder(const uint8_t* packed, uint8_t* out) {
    const uint64_t first = load(packed);
    const uint64_t last = load(packed + 8);
    const uint64_t even = (first & low_nibbles) | ((last & low_nibbles) << 4);
    const uint64_t odd = ((first >> 4) & low_nibbles) | (last & ~low_nibbles);
    const uint64_t words[2] = {interleave_halves(even, odd), interleave_halves(even >> 32, odd >> 32)};
    std::memcpy(out, words, sizeof words);
}

}  // namespace

void join_nibbles(const uint8_t* packed, const uint8_t* scales, int64_t scale_bytes,
                  const uint8_t* zero_points, int64_t groups, int64_t group_size, uint8_t* out) {
    for (int64_t g = 0; g < groups; ++g) {
        std::memcpy(out, scales, static_cast<size_t>(scale_bytes));
        out += scale_bytes;
        scales += scale_bytes;
        if (zero_points != nullptr) *out++ = zero_points[g];
        for (int64_t i = 0; i < group_size; i += 32, packed += 16, out += 16) reorder(packed, out);
    }
}

}  // namespace nybble
