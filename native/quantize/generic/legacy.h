// q4_0, q4_1, q5_0, q5_1, q8_0 and iq4_nl: blocks of 32 with one scale, and q1_0 and q2_0.
//
// Without weights llama.cpp rounds to the scale that the largest value asks for; few candidates are
// enough to be better and still quicker. With weights the search is wider.
#pragma once

#include "quantize/generic/affine_search.h"
#include "quantize/generic/scale_search.h"

namespace nybble {
namespace {

// Two codes of four bits a byte: element i low, element i + 16 high.
template <class T>
NYBBLE_NOINLINE void put_nibbles(T& tile, int first, int position) {
    for (int i = 0; i < 16; ++i) {
        tile.put_byte(position + i, tile.at(first + i) + tile.at(first + 16 + i) * lanes(16.0f));
    }
}

// The same with the fifth bits first, bit i that of element i.
template <class T>
NYBBLE_NOINLINE void put_five_bits(T& tile, int position) {
    for (int b = 0; b < 4; ++b) {
        Lanes bits = lanes(0.0f);
        for (int i = 0; i < 8; ++i) {
            const Lanes code = tile.at(8 * b + i), high = one_from(code, 16.0f);
            bits = bits + high * lanes(static_cast<float>(1 << i));
            tile.put(8 * b + i, code - high * lanes(16.0f));
        }
        tile.put_byte(position + b, bits);
    }
    put_nibbles(tile, 0, position + 4);
}

// Replaces values by codes.
template <class Levels, class T>
NYBBLE_NOINLINE void to_codes(T& tile, int first, int n, Lanes scale) {
    const Lanes per_level = inverse(scale);
    for (int i = first; i < first + n; ++i) tile.put(i, Levels::code(Levels::of(tile.at(i) * per_level)));
}

template <class T>
NYBBLE_NOINLINE void to_affine_codes(T& tile, int first, int n, float high, Lanes scale, Lanes offset) {
    const Lanes per_code = inverse(scale);
    for (int i = first; i < first + n; ++i) {
        tile.put(i, nearest(clamp((tile.at(i) - offset) * per_code, 0.0f, high)));
    }
}

struct QuantizeQ4_0 {
    static constexpr int size = 32, bytes = 18;
    static constexpr float few[] = {-8.0f, 7.5f, -7.4f, -8.6f};
    static constexpr float many[] = {-8.0f, 7.5f,  -7.4f, -8.6f, -6.8f, 6.8f,
                                     -7.7f, -8.3f, 7.1f,  7.9f,  -9.2f, 8.4f};
    template <bool weighted>
    static void encode(Tile<size, bytes>& tile, Weights<weighted> w) {
        using Levels = EvenLevels<-8, 7>;
        const Lanes scale = (weighted ? search_scale<Levels>(tile.x, w, size, many, 2)
                                      : search_scale<Levels>(tile.x, w, size, few, 0))
                                .scale();
        to_codes<Levels>(tile, 0, size, tile.put_half(0, scale));
        put_nibbles(tile, 0, 2);
    }
};

struct QuantizeQ5_0 {
    static constexpr int size = 32, bytes = 22;
    static constexpr float few[] = {-16.0f, 15.5f, -15.2f, -16.6f};
    static constexpr float many[] = {-16.0f, 15.5f,  -15.2f, -16.6f, -14.6f, 14.6f,
                                     -15.6f, -16.3f, 15.1f,  15.9f,  -17.2f, 16.4f};
    template <bool weighted>
    static void encode(Tile<size, bytes>& tile, Weights<weighted> w) {
        using Levels = EvenLevels<-16, 15>;
        const Lanes scale = (weighted ? search_scale<Levels>(tile.x, w, size, many, 2)
                                      : search_scale<Levels>(tile.x, w, size, few, 0))
                                .scale();
        to_codes<Levels>(tile, 0, size, tile.put_half(0, scale));
        put_five_bits(tile, 2);
    }
};

struct QuantizeQ8_0 {
    static constexpr int size = 32, bytes = 34;
    static constexpr float few[] = {-128.0f, 127.0f};
    static constexpr float many[] = {-128.0f, 127.0f, -127.5f, 127.5f, -126.5f, -128.5f};
    template <bool weighted>
    static void encode(Tile<size, bytes>& tile, Weights<weighted> w) {
        using Levels = EvenLevels<-128, 127>;
        const Lanes scale = (weighted ? search_scale<Levels>(tile.x, w, size, many, 1)
                                      : search_scale<Levels>(tile.x, w, size, few, 0))
                                .scale();
        const Lanes per_level = inverse(tile.put_half(0, scale));
        for (int i = 0; i < size; ++i) {
            const Lanes level = Levels::of(tile.at(i) * per_level);
            // Two's complement as a number from 0 to 255.
            tile.put_byte(2 + i,
                          Lanes::select(Lanes::less(level, lanes(0.0f)), level + lanes(256.0f), level));
        }
    }
};

// What is tried where the search is wide, for codes of four bits and more.
constexpr AffineCandidate many_candidates[] = {
    {0.0f, 0.0f},    {0.6f, -0.3f}, {0.5f, 0.0f},    {0.5f, -0.5f},  {1.2f, -0.6f},
    {1.0f, 0.0f},    {1.0f, -1.0f}, {-0.4f, 0.2f},   {1.8f, -0.9f},  {1.6f, -0.3f},
    {1.6f, -1.3f},   {2.4f, -1.2f}, {0.3f, -0.15f},  {0.9f, -0.45f}, {0.25f, 0.0f},
    {0.25f, -0.25f}, {0.75f, 0.0f}, {0.75f, -0.75f}, {-0.2f, 0.1f},  {1.5f, -0.75f}};

// q4_1 and q5_1 differ in the highest code.
template <int high, bool weighted, class T>
NYBBLE_NOINLINE void encode_with_minimum(T& tile, Weights<weighted> w) {
    static constexpr AffineCandidate few[] = {{0.4f, -0.2f}};
    const AffineFit fit =
        weighted ? search_affine<false>(tile.x, w, 32, static_cast<float>(high), many_candidates, 4)
                 : search_affine<false>(tile.x, w, 32, static_cast<float>(high), few, 1);
    const Lanes scale = tile.put_half(0, fit.scale);
    // Where the smallest value fits in float16, so shall what is made of it.
    const Lanes room = lanes(65504.0f) / tile.unit;
    const Lanes inside = Lanes::min(Lanes::max(fit.offset, lanes(0.0f) - room), room);
    const Mask beyond = Lanes::less(room, Lanes::abs(fit.low));
    const Lanes offset = tile.put_half(2, Lanes::select(beyond, fit.offset, inside));
    to_affine_codes(tile, 0, 32, static_cast<float>(high), scale, offset);
}

struct QuantizeQ4_1 {
    static constexpr int size = 32, bytes = 20;
    template <bool weighted>
    static void encode(Tile<size, bytes>& tile, Weights<weighted> w) {
        encode_with_minimum<15>(tile, w);
        put_nibbles(tile, 0, 4);
    }
};

struct QuantizeQ5_1 {
    static constexpr int size = 32, bytes = 24;
    template <bool weighted>
    static void encode(Tile<size, bytes>& tile, Weights<weighted> w) {
        encode_with_minimum<31>(tile, w);
        put_five_bits(tile, 4);
    }
};

struct QuantizeIq4Nl {
    static constexpr int size = 32, bytes = 18;
    static constexpr float ends[] = {-127.0f, 113.0f,  -118.0f, 107.0f,  -110.0f, 120.0f,  -134.0f, 100.0f,
                                     -122.0f, 116.0f,  -103.0f, -114.0f, 96.0f,   -106.0f, 104.0f,  -98.0f,
                                     110.0f,  -130.0f, 124.0f,  -142.0f, 92.0f,   -94.0f,  88.0f,   -88.0f};
    template <bool weighted>
    static void encode(Tile<size, bytes>& tile, Weights<weighted> w) {
        const Lanes scale = tile.put_half(0, search_scale<Iq4Levels>(tile.x, w, size, ends, 2).scale());
        const Lanes per_level = inverse(scale);
        for (int i = 0; i < size; ++i) tile.put(i, Iq4Levels::code_of(tile.at(i) * per_level));
        put_nibbles(tile, 0, 2);
    }
};

// Signs: the scale is the mean magnitude.
struct QuantizeQ1_0 {
    static constexpr int size = 128, bytes = 18;
    template <bool weighted>
    static void encode(Tile<size, bytes>& tile, Weights<weighted> w) {
        Lanes sum = lanes(0.0f);
        for (int i = 0; i < size; ++i) sum = sum + w.times(i, Lanes::abs(tile.at(i)));
        tile.put_half(0, sum / lanes(w.sum(size)));
        for (int b = 0; b < size / 8; ++b) {
            Lanes bits = lanes(0.0f);
            for (int i = 0; i < 8; ++i) {
                bits = bits + one_from(tile.at(8 * b + i), 0.0f) * lanes(static_cast<float>(1 << i));
            }
            tile.put_byte(2 + b, bits);
        }
    }
};

// Levels -1 to 2.
struct QuantizeQ2_0 {
    static constexpr int size = 64, bytes = 18;
    static constexpr float ends[] = {2.0f, -2.0f, 2.5f, -2.5f, 3.0f, -3.0f, 2.2f, -2.2f, 3.5f, -3.5f};
    template <bool weighted>
    static void encode(Tile<size, bytes>& tile, Weights<weighted> w) {
        using Levels = EvenLevels<-1, 2>;
        to_codes<Levels>(tile, 0, size,
                         tile.put_half(0, search_scale<Levels>(tile.x, w, size, ends, 2).scale()));
        for (int b = 0; b < size / 4; ++b) {
            Lanes byte = tile.at(4 * b);
            for (int i = 1; i < 4; ++i) {
                byte = byte + tile.at(4 * b + i) * lanes(static_cast<float>(1 << (2 * i)));
            }
            tile.put_byte(2 + b, byte);
        }
    }
};

}  // namespace
}  // namespace nybble
