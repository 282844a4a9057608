// What the K types share: codes of a super-block of 256 in runs of bit planes.
#pragma once

#include "quantize/generic/tile.h"

namespace nybble {
namespace {

// Codes of two bits, elements `first` to + 127, in the 32 bytes at `position`: plane after plane. `bits`
// of a code, from `low` upward, are what is put.
template <class T>
NYBBLE_NOINLINE void put_two_bits(T& tile, int first, int position) {
    for (int i = 0; i < 32; ++i) {
        Lanes byte = tile.at(first + i);
        for (int p = 1; p < 4; ++p) {
            byte = byte + tile.at(first + 32 * p + i) * lanes(static_cast<float>(1 << (2 * p)));
        }
        tile.put_byte(position + i, byte);
    }
}

// Takes the bit of value `bit` off all 256 codes into the 32 bytes at `position`: bit p of byte i is that
// of element 32 p + i.
template <class T>
NYBBLE_NOINLINE void put_high_bit(T& tile, float bit, int position) {
    for (int i = 0; i < 32; ++i) {
        Lanes byte = lanes(0.0f);
        for (int p = 0; p < 8; ++p) {
            const Lanes code = tile.at(32 * p + i), high = one_from(code, bit);
            byte = byte + high * lanes(static_cast<float>(1 << p));
            tile.put(32 * p + i, code - high * lanes(bit));
        }
        tile.put_byte(position + i, byte);
    }
}

}  // namespace
}  // namespace nybble
