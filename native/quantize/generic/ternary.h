// tq1_0 and tq2_0: 256 values of -1, 0, 1 under one scale.
#pragma once

#include "quantize/generic/legacy.h"
#include "quantize/generic/super_block.h"

namespace nybble {
namespace {

// Ends for normal values, whose best scale is half their largest, up to rows that are ternary already.
constexpr float ternary_ends[] = {1.0f, 1.6f, 2.2f, 2.8f, 3.7f, 5.5f};

template <class T, bool weighted>
NYBBLE_NOINLINE void to_ternary(T& tile, Weights<weighted> w, int d_position) {
    using Levels = EvenLevels<-1, 1>;
    const Lanes scale = search_scale<Levels>(tile.x, w, 256, ternary_ends, 3).scale();
    to_codes<Levels>(tile, 0, 256, tile.put_half(d_position, Lanes::abs(scale)));
}

struct QuantizeTq1_0 {
    static constexpr int size = 256, bytes = 54;
    template <bool weighted>
    static void encode(Tile<size, bytes>& tile, Weights<weighted> w) {
        to_ternary(tile, w, 52);
        put_digits(tile, 0, 32, 5, 0);
        put_digits(tile, 160, 16, 5, 32);
        put_digits(tile, 240, 4, 4, 48);
    }

   private:
    // `digits` base-3 digits a byte, the first the highest, as a fraction: ceil(256 * number / 243).
    static NYBBLE_NOINLINE void put_digits(Tile<size, bytes>& tile, int first, int count, int digits,
                                           int position) {
        for (int i = 0; i < count; ++i) {
            Lanes number = lanes(0.0f);
            for (int p = 0; p < 5; ++p) {
                number = number * lanes(3.0f);
                if (p < digits) number = number + tile.at(first + count * p + i);
            }
            tile.put_byte(position + i, whole_part(number * lanes(256.0f) + lanes(242.0f), 243.0f));
        }
    }
};

struct QuantizeTq2_0 {
    static constexpr int size = 256, bytes = 66;
    template <bool weighted>
    static void encode(Tile<size, bytes>& tile, Weights<weighted> w) {
        to_ternary(tile, w, 64);
        put_two_bits(tile, 0, 0);
        put_two_bits(tile, 128, 32);
    }
};

}  // namespace
}  // namespace nybble
