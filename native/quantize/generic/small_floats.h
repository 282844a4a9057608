// mxfp4 and nvfp4: 4-bit floats (e2m1) under a scale that is a small float itself. There are so few
// scales that could be best that each of them is tried.
#pragma once

#include "quantize/generic/legacy.h"

namespace nybble {
namespace {

// sum(w (x - scale * level)^2); scale is that of the doubled levels.
template <bool weighted>
NYBBLE_NOINLINE Lanes e2m1_error(const float* x, Weights<weighted> w, int n, Lanes scale) {
    const Lanes per_level = inverse(scale);
    Lanes error = lanes(0.0f);
    for (int i = 0; i < n; ++i) {
        const Lanes value = Lanes::load(x + i * N);
        const Lanes difference = value - scale * E2m1Levels::of(value * per_level);
        error = error + difference * w.times(i, difference);
    }
    return error;
}

// The scale is a power of two.
struct QuantizeMxfp4 {
    static constexpr int size = 32, bytes = 17;
    template <bool weighted>
    static void encode(Tile<size, bytes>& tile, Weights<weighted> w) {
        // The largest value is 1 up to 2, the largest level 12: larger steps than 1/4 have no use, and
        // with smaller ones than 1/16 three quarters of the range are cut off.
        Lanes best = lanes(0.25f), best_error = lanes(1e30f);
        static constexpr float scales[] = {0.125f, 0.25f, 0.0625f};
        for (const float scale : scales) {
            const Lanes error = e2m1_error(tile.x, w, size, lanes(scale));
            const Mask better = Lanes::less(error, best_error);
            best = Lanes::select(better, lanes(scale), best);
            best_error = Lanes::select(better, error, best_error);
        }
        // Smallest scale: 2^-127, of the doubled levels 2^-128; blocks far below it are zero.
        const Lanes least = lanes(0x1p-126f) / tile.unit;
        best = Lanes::max(best, least);
        alignas(64) float full[N];
        (best * tile.unit).store(full);
        for (int lane = 0; lane < N; ++lane) {
            tile.out[lane] = static_cast<uint8_t>((float_to_bits(full[lane]) >> 23) + 1);
        }
        const Lanes per_level = inverse(best);
        for (int i = 0; i < size; ++i) tile.put(i, E2m1Levels::code_of(tile.at(i) * per_level));
        put_nibbles(tile, 0, 1);
    }
};

struct E4m3Table {
    float scale[127];
};

constexpr E4m3Table make_e4m3_table() {
    E4m3Table t{};
    for (int c = 0; c < 127; ++c) {
        float value = static_cast<float>(c < 8 ? c : 8 + (c & 7)) * 0x1p-10f;
        for (int e = 1; e < c >> 3; ++e) value *= 2.0f;
        t.scale[c] = value;
    }
    return t;
}

constexpr E4m3Table e4m3_table = make_e4m3_table();

// Scales of 16 values, unsigned e4m3, halved because the levels are doubled. 0x7f is no number.
struct QuantizeNvfp4 {
    static constexpr int size = 64, bytes = 36;
    static constexpr float steps[] = {0.0f, 1.0f, 2.0f, -1.0f, 3.0f, 4.0f};

    template <bool weighted>
    static void encode(Tile<size, bytes>& tile, Weights<weighted> w) {
        for (int j = 0; j < 4; ++j) {
            const float* x = tile.x + 16 * j * N;
            // The code whose scale takes the largest value to the largest level.
            alignas(64) float reach[N], start[N];
            (Lanes::abs(largest_of(x, 16)) * lanes(1.0f / 12.0f) * tile.unit).store(reach);
            for (int lane = 0; lane < N; ++lane) {
                const float scale = reach[lane] * 0x1p10f;
                const int exponent = static_cast<int>(float_to_bits(scale) >> 20) - ((127 + 3) << 3) + 8;
                start[lane] = scale < 8.0f ? static_cast<float>(static_cast<int>(scale))
                                           : static_cast<float>(exponent < 126 ? exponent : 126);
            }
            const Lanes middle = Lanes::load(start);
            Lanes best = middle, best_error = lanes(1e30f);
            for (const float step : steps) {
                const Lanes code = clamp(middle + lanes(step), 0.0f, 126.0f);
                const Lanes error =
                    e2m1_error(x, w.from(16 * j), 16, Lanes::lookup(e4m3_table.scale, code) / tile.unit);
                const Mask better = Lanes::less(error, best_error);
                best = Lanes::select(better, code, best);
                best_error = Lanes::select(better, error, best_error);
            }
            tile.put_byte(j, best);
            const Lanes per_level = inverse(Lanes::lookup(e4m3_table.scale, best) / tile.unit);
            for (int i = 0; i < 8; ++i) {
                const Lanes low = E2m1Levels::code_of(tile.at(16 * j + i) * per_level);
                const Lanes high = E2m1Levels::code_of(tile.at(16 * j + 8 + i) * per_level);
                tile.put_byte(4 + 8 * j + i, low + high * lanes(16.0f));
            }
        }
    }
};

}  // namespace
}  // namespace nybble
