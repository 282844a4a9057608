// Eight floats in plain C++: what the generic kernels are written in, for CPUs without a level of
// their own. Compilers turn the loops into whatever vectors the target's base level has.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/compiler.h"
#include "kernels/generic/half.h"

namespace nybble {
namespace {

struct Vec {
    static constexpr int N = 8;
    static constexpr int kRows = 2;  // rows that a register block of a matrix product holds
    float v[N];

    static NYBBLE_ALWAYS_INLINE Vec set1(float x) {
        Vec r;
        for (int i = 0; i < N; ++i) r.v[i] = x;
        return r;
    }
    static NYBBLE_ALWAYS_INLINE Vec zero() { return set1(0.0F); }
    static NYBBLE_ALWAYS_INLINE Vec load(const float* p) {
        Vec r;
        for (int i = 0; i < N; ++i) r.v[i] = p[i];
        return r;
    }
    static NYBBLE_ALWAYS_INLINE Vec load_f16(const uint16_t* p) {
        Vec r;
        for (int i = 0; i < N; ++i) r.v[i] = half_to_float(p[i]);
        return r;
    }
    static NYBBLE_ALWAYS_INLINE Vec load_bf16(const uint16_t* p) {
        Vec r;
        for (int i = 0; i < N; ++i) r.v[i] = bf16_to_float(p[i]);
        return r;
    }
    static NYBBLE_ALWAYS_INLINE Vec load_i8(const int8_t* p) {
        Vec r;
        for (int i = 0; i < N; ++i) r.v[i] = static_cast<float>(p[i]);
        return r;
    }
    // Low or high nibbles of N bytes, as floats 0..15.
    static NYBBLE_ALWAYS_INLINE Vec load_low_nibbles(const uint8_t* p) {
        Vec r;
        for (int i = 0; i < N; ++i) r.v[i] = static_cast<float>(p[i] & 15);
        return r;
    }
    static NYBBLE_ALWAYS_INLINE Vec load_high_nibbles(const uint8_t* p) {
        Vec r;
        for (int i = 0; i < N; ++i) r.v[i] = static_cast<float>(p[i] >> 4);
        return r;
    }
    NYBBLE_ALWAYS_INLINE void store(float* p) const {
        for (int i = 0; i < N; ++i) p[i] = v[i];
    }
    NYBBLE_ALWAYS_INLINE void store_f16(uint16_t* p) const {
        for (int i = 0; i < N; ++i) p[i] = float_to_half(v[i]);
    }
    NYBBLE_ALWAYS_INLINE void store_bf16(uint16_t* p) const {
        for (int i = 0; i < N; ++i) p[i] = float_to_bf16(v[i]);
    }
    // Rounds to nearest even and saturates to int8.
    NYBBLE_ALWAYS_INLINE void store_i8(int8_t* p) const {
        for (int i = 0; i < N; ++i) p[i] = static_cast<int8_t>(std::nearbyintf(v[i]));
    }
    friend NYBBLE_ALWAYS_INLINE Vec operator+(Vec a, Vec b) {
        for (int i = 0; i < N; ++i) a.v[i] += b.v[i];
        return a;
    }
    friend NYBBLE_ALWAYS_INLINE Vec operator-(Vec a, Vec b) {
        for (int i = 0; i < N; ++i) a.v[i] -= b.v[i];
        return a;
    }
    friend NYBBLE_ALWAYS_INLINE Vec operator*(Vec a, Vec b) {
        for (int i = 0; i < N; ++i) a.v[i] *= b.v[i];
        return a;
    }
    friend NYBBLE_ALWAYS_INLINE Vec operator/(Vec a, Vec b) {
        for (int i = 0; i < N; ++i) a.v[i] /= b.v[i];
        return a;
    }
    static NYBBLE_ALWAYS_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
    static NYBBLE_ALWAYS_INLINE Vec max(Vec a, Vec b) {
        for (int i = 0; i < N; ++i) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
        return a;
    }
    static NYBBLE_ALWAYS_INLINE Vec min(Vec a, Vec b) {
        for (int i = 0; i < N; ++i) a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
        return a;
    }
    static NYBBLE_ALWAYS_INLINE Vec abs(Vec a) {
        for (int i = 0; i < N; ++i) a.v[i] = std::fabs(a.v[i]);
        return a;
    }
    static NYBBLE_ALWAYS_INLINE Vec round(Vec a) {
        for (int i = 0; i < N; ++i) a.v[i] = std::nearbyintf(a.v[i]);
        return a;
    }
    // a * 2^n for integral n in [-126, 127].
    static NYBBLE_ALWAYS_INLINE Vec ldexp(Vec a, Vec n) {
        for (int i = 0; i < N; ++i) {
            a.v[i] *= bits_to_float(static_cast<uint32_t>(static_cast<int32_t>(n.v[i]) + 127) << 23);
        }
        return a;
    }
    // x < limit ? 0 : value
    static NYBBLE_ALWAYS_INLINE Vec zero_below(Vec x, Vec limit, Vec value) {
        for (int i = 0; i < N; ++i) value.v[i] = x.v[i] < limit.v[i] ? 0.0F : value.v[i];
        return value;
    }
    static NYBBLE_ALWAYS_INLINE Vec swap_pairs(Vec a) {
        Vec r;
        for (int i = 0; i < N; ++i) r.v[i] = a.v[i ^ 1];
        return r;
    }
    static NYBBLE_ALWAYS_INLINE float reduce_add(Vec a) {
        return ((a.v[0] + a.v[4]) + (a.v[2] + a.v[6])) + ((a.v[1] + a.v[5]) + (a.v[3] + a.v[7]));
    }
    static NYBBLE_ALWAYS_INLINE float reduce_max(Vec a) {
        float m = a.v[0];
        for (int i = 1; i < N; ++i) m = a.v[i] > m ? a.v[i] : m;
        return m;
    }
};

}  // namespace
}  // namespace nybble
