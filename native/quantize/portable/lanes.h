// Eight blocks side by side in plain C++: what the quantizers are written in.
//
// A quantizer works on N blocks at once, one in each lane, and never adds across lanes; so every lane
// sees the same operations in the same order at each level, whatever N is, and all levels write the
// same bytes. Operations are those of IEEE 754 one by one: nothing is fused. Each level has a file of
// this name with the same members.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/compiler.h"
#include "kernels/generic/half.h"

namespace nybble {
namespace {

struct Mask {
    bool m[8];
};

struct Lanes {
    static constexpr int N = 8;
    float v[N];

    static NYBBLE_ALWAYS_INLINE Lanes set1(float x) {
        Lanes r;
        for (int i = 0; i < N; ++i) r.v[i] = x;
        return r;
    }
    static NYBBLE_ALWAYS_INLINE Lanes load(const float* p) {
        Lanes r;
        for (int i = 0; i < N; ++i) r.v[i] = p[i];
        return r;
    }
    static NYBBLE_ALWAYS_INLINE Lanes load_half(const uint16_t* p) {
        Lanes r;
        for (int i = 0; i < N; ++i) r.v[i] = half_to_float(p[i]);
        return r;
    }
    NYBBLE_ALWAYS_INLINE void store(float* p) const {
        for (int i = 0; i < N; ++i) p[i] = v[i];
    }
    NYBBLE_ALWAYS_INLINE void store_half(uint16_t* p) const {
        for (int i = 0; i < N; ++i) p[i] = float_to_half(v[i]);
    }
    // Whole numbers from 0 to 255.
    NYBBLE_ALWAYS_INLINE void store_byte(uint8_t* p) const {
        for (int i = 0; i < N; ++i) p[i] = static_cast<uint8_t>(static_cast<int32_t>(v[i]));
    }
    friend NYBBLE_ALWAYS_INLINE Lanes operator+(Lanes a, Lanes b) {
        for (int i = 0; i < N; ++i) a.v[i] += b.v[i];
        return a;
    }
    friend NYBBLE_ALWAYS_INLINE Lanes operator-(Lanes a, Lanes b) {
        for (int i = 0; i < N; ++i) a.v[i] -= b.v[i];
        return a;
    }
    friend NYBBLE_ALWAYS_INLINE Lanes operator*(Lanes a, Lanes b) {
        for (int i = 0; i < N; ++i) a.v[i] *= b.v[i];
        return a;
    }
    friend NYBBLE_ALWAYS_INLINE Lanes operator/(Lanes a, Lanes b) {
        for (int i = 0; i < N; ++i) a.v[i] /= b.v[i];
        return a;
    }
    static NYBBLE_ALWAYS_INLINE Lanes max(Lanes a, Lanes b) {
        for (int i = 0; i < N; ++i) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
        return a;
    }
    static NYBBLE_ALWAYS_INLINE Lanes min(Lanes a, Lanes b) {
        for (int i = 0; i < N; ++i) a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
        return a;
    }
    static NYBBLE_ALWAYS_INLINE Lanes abs(Lanes a) {
        for (int i = 0; i < N; ++i) a.v[i] = bits_to_float(float_to_bits(a.v[i]) & 0x7fffffffU);
        return a;
    }
    // The larger of |a| and b >= 0, by their bits: what is not a number is the largest of all.
    static NYBBLE_ALWAYS_INLINE Lanes max_magnitude(Lanes a, Lanes b) {
        for (int i = 0; i < N; ++i) {
            const uint32_t x = float_to_bits(a.v[i]) & 0x7fffffffU, y = float_to_bits(b.v[i]);
            a.v[i] = bits_to_float(x > y ? x : y);
        }
        return a;
    }
    // To the nearest integer, ties to even; |a| < 2^22.
    static NYBBLE_ALWAYS_INLINE Lanes nearest(Lanes a) {
        for (int i = 0; i < N; ++i) a.v[i] = (a.v[i] + 12582912.0F) - 12582912.0F;
        return a;
    }
    static NYBBLE_ALWAYS_INLINE Mask less(Lanes a, Lanes b) {
        Mask r;
        for (int i = 0; i < N; ++i) r.m[i] = a.v[i] < b.v[i];
        return r;
    }
    // Where a is not a number.
    static NYBBLE_ALWAYS_INLINE Mask unordered(Lanes a) {
        Mask r;
        for (int i = 0; i < N; ++i) r.m[i] = a.v[i] != a.v[i];
        return r;
    }
    // m ? a : b
    static NYBBLE_ALWAYS_INLINE Lanes select(Mask m, Lanes a, Lanes b) {
        for (int i = 0; i < N; ++i) a.v[i] = m.m[i] ? a.v[i] : b.v[i];
        return a;
    }
    static NYBBLE_ALWAYS_INLINE bool any(Mask m) {
        bool r = false;
        for (int i = 0; i < N; ++i) r = r || m.m[i];
        return r;
    }
    // 2^e of a normal number 2^e * fraction; 0 for zero and subnormal numbers.
    static NYBBLE_ALWAYS_INLINE Lanes power_of_two(Lanes a) {
        for (int i = 0; i < N; ++i) a.v[i] = bits_to_float(float_to_bits(a.v[i]) & 0x7f800000U);
        return a;
    }
    // table[index], for whole numbers within a table of 16, of 32, or of any length.
    static NYBBLE_ALWAYS_INLINE Lanes lookup(const float* table, Lanes index) {
        for (int i = 0; i < N; ++i) index.v[i] = table[static_cast<int32_t>(index.v[i])];
        return index;
    }
    static NYBBLE_ALWAYS_INLINE Lanes lookup16(const float* table, Lanes index) {
        return lookup(table, index);
    }
    static NYBBLE_ALWAYS_INLINE Lanes lookup32(const float* table, Lanes index) {
        return lookup(table, index);
    }
    // table[index][lane]
    static NYBBLE_ALWAYS_INLINE Lanes gather(const float* table, Lanes index) {
        for (int i = 0; i < N; ++i) index.v[i] = table[static_cast<int32_t>(index.v[i]) * N + i];
        return index;
    }
    // out[i][lane] = rows[lane][i] for `n` elements, a multiple of 16.
    static void transpose(const float* const* rows, int n, float* out) {
        for (int i = 0; i < n; ++i) {
            for (int lane = 0; lane < N; ++lane) out[i * N + lane] = rows[lane][i];
        }
    }
    // out[lane][i] = bytes[i][lane]
    static void transpose_bytes(const uint8_t* bytes, int n, uint8_t* const* out) {
        for (int lane = 0; lane < N; ++lane) {
            for (int i = 0; i < n; ++i) out[lane][i] = bytes[i * N + lane];
        }
    }
};

}  // namespace
}  // namespace nybble
