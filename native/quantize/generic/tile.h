// A tile: N blocks, one a lane, as the quantizers see them, and the bytes that come out.
//
// Each block is multiplied by a power of two that brings its largest magnitude to 1 up to 2. That
// changes no result, and sums can neither overflow nor vanish; what is stored is multiplied back.
// Included after a level's lanes.h.
#pragma once

#include <cstdint>

#include "core/compiler.h"

namespace nybble {
namespace {

constexpr int N = Lanes::N;

NYBBLE_ALWAYS_INLINE Lanes lanes(float x) { return Lanes::set1(x); }
NYBBLE_ALWAYS_INLINE Lanes clamp(Lanes x, float low, float high) {
    return Lanes::min(Lanes::max(x, lanes(low)), lanes(high));
}
NYBBLE_ALWAYS_INLINE Lanes nearest(Lanes x) { return Lanes::nearest(x); }
// 1 / x; 0 where x is so small that it stands for nothing.
NYBBLE_ALWAYS_INLINE Lanes inverse(Lanes x) {
    return Lanes::select(Lanes::less(lanes(1e-30f), Lanes::abs(x)), lanes(1.0f) / x, lanes(0.0f));
}
// a / b; 0 where b is no positive number.
NYBBLE_ALWAYS_INLINE Lanes ratio(Lanes a, Lanes b) {
    return Lanes::select(Lanes::less(lanes(1e-37f), b), a / b, lanes(0.0f));
}
// The whole part of x / divisor, for whole numbers 0 <= x < 2^16 and a divisor below 256.
NYBBLE_ALWAYS_INLINE Lanes whole_part(Lanes x, float divisor) {
    return nearest(x * lanes(1.0f / divisor) - lanes(0.5f - 0.5f / divisor));
}
// 1 where x >= limit, else 0.
NYBBLE_ALWAYS_INLINE Lanes one_from(Lanes x, float limit) {
    return Lanes::select(Lanes::less(x, lanes(limit)), lanes(0.0f), lanes(1.0f));
}

// What each column weighs in the error; all the same where an instance is not `weighted`.
template <bool weighted>
struct Weights {
    const float* w;
    NYBBLE_ALWAYS_INLINE Lanes times(int i, Lanes x) const { return weighted ? lanes(w[i]) * x : x; }
    NYBBLE_ALWAYS_INLINE Weights from(int i) const { return {weighted ? w + i : w}; }
    float sum(int n) const {
        float total = 0.0f;
        for (int i = 0; i < n; ++i) total += weighted ? w[i] : 1.0f;
        return total;
    }
    // The column that weighs most, the first of several.
    int heaviest(int n) const {
        int found = 0;
        for (int i = 1; weighted && i < n; ++i) {
            if (w[found] < w[i]) found = i;
        }
        return found;
    }
};

template <int size, int bytes>
struct Tile {
    alignas(64) float x[size * N];       // element i of all blocks, then i + 1, ...
    alignas(64) uint8_t out[bytes * N];  // the same of the bytes
    alignas(64) uint16_t halves[2 * N];  // scratch
    Lanes unit, inverse_unit;            // value = x * unit
    bool fits = true;                    // false: a scale is too large for its type

    NYBBLE_ALWAYS_INLINE Lanes at(int i) const { return Lanes::load(x + i * N); }
    NYBBLE_ALWAYS_INLINE void put(int i, Lanes value) { value.store(x + i * N); }
    NYBBLE_ALWAYS_INLINE void put_byte(int i, Lanes value) { value.store_byte(out + i * N); }

    // False if a value is not finite.
    bool load(const float* const* rows) {
        Lanes::transpose(rows, size, x);
        Lanes largest = lanes(0.0f);
        for (int i = 0; i < size; ++i) largest = Lanes::max_magnitude(at(i), largest);
        if (Lanes::any(Lanes::unordered(largest - largest))) return false;
        // 2^127 has no inverse that is normal; subnormal blocks are as good as zero.
        const Lanes power = Lanes::min(Lanes::power_of_two(largest), lanes(0x1p126f));
        unit = Lanes::select(Lanes::less(lanes(0.0f), power), power, lanes(1.0f));
        inverse_unit = Lanes::select(Lanes::less(lanes(0.0f), power), lanes(1.0f) / unit, lanes(0.0f));
        for (int i = 0; i < size; ++i) put(i, at(i) * inverse_unit);
        return true;
    }

    // A scale as float16 would hold it; notes if it is too large.
    Lanes as_half(Lanes scale) {
        (scale * unit + lanes(0.0f)).store_half(halves);  // + 0: no negative zero
        const Lanes stored = Lanes::load_half(halves);
        fits = fits && !Lanes::any(Lanes::less(lanes(65504.0f), Lanes::abs(stored)));
        return clamp(stored, -65504.0f, 65504.0f) / unit;
    }

    // Writes it at byte `position` too.
    Lanes put_half(int position, Lanes scale) {
        const Lanes stored = as_half(scale);
        for (int lane = 0; lane < N; ++lane) {
            out[position * N + lane] = static_cast<uint8_t>(halves[lane] & 0xff);
            out[(position + 1) * N + lane] = static_cast<uint8_t>(halves[lane] >> 8);
        }
        return stored;
    }
};

}  // namespace
}  // namespace nybble
