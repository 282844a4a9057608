// Storing keys and values in a page of the KV cache and loading them as float32, on Vec; layouts in
// core/kv_encoding.h. Included by float_kernels.inc.h.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/float_kernels.h"

namespace nybble {
namespace {

// int8 or 4-bit codes of one block of 32 and its scale.
NYBBLE_ALWAYS_INLINE uint16_t quantize_block8(const float* x, int8_t* codes) {
    float amax = 0;
    for (int i = 0; i < 32; ++i) {
        const float a = std::fabs(x[i]);
        amax = a > amax ? a : amax;
    }
    const uint16_t half = float_to_half(amax / 127.0F);
    const float step = half_to_float(half);
    const float inverse = step > 0 ? 1.0F / step : 0.0F;
    for (int i = 0; i < 32; ++i) {
        float c = std::nearbyintf(x[i] * inverse);
        c = c > 127.0F ? 127.0F : (c < -127.0F ? -127.0F : c);
        codes[i] = static_cast<int8_t>(c);
    }
    return half;
}

// GGUF's q4_0: the element of largest magnitude maps to -8.
NYBBLE_ALWAYS_INLINE uint16_t quantize_block4(const float* x, uint8_t* codes) {
    float extreme = 0;
    for (int i = 0; i < 32; ++i) {
        extreme = std::fabs(x[i]) > std::fabs(extreme) ? x[i] : extreme;
    }
    const uint16_t half = float_to_half(extreme / -8.0F);
    const float step = half_to_float(half);
    const float inverse = step != 0 ? 1.0F / step : 0.0F;
    for (int i = 0; i < 32; ++i) {
        float c = std::nearbyintf(x[i] * inverse) + 8.0F;
        c = c > 15.0F ? 15.0F : (c < 0.0F ? 0.0F : c);
        codes[i] = static_cast<uint8_t>(c);
    }
    return half;
}

void store_key(KvEncoding encoding, const float* key, int64_t d, int64_t token, uint8_t* page) {
    constexpr int64_t T = kPageTokens;
    switch (encoding) {
        case KvEncoding::f32: {
            float* out = reinterpret_cast<float*>(page) + token;
            for (int64_t i = 0; i < d; ++i) out[i * T] = key[i];
            break;
        }
        case KvEncoding::f16:
        case KvEncoding::bf16: {
            uint16_t* out = reinterpret_cast<uint16_t*>(page) + token;
            int64_t i = 0;
            uint16_t packed[N];
            for (; i + N <= d; i += N) {
                if (encoding == KvEncoding::f16) {
                    Vec::load(key + i).store_f16(packed);
                } else {
                    Vec::load(key + i).store_bf16(packed);
                }
                for (int j = 0; j < N; ++j) out[(i + j) * T] = packed[j];
            }
            for (; i < d; ++i)
                out[i * T] = encoding == KvEncoding::f16 ? float_to_half(key[i]) : float_to_bf16(key[i]);
            break;
        }
        case KvEncoding::q8_0: {
            int8_t* out = reinterpret_cast<int8_t*>(page) + token;
            uint16_t* scales = reinterpret_cast<uint16_t*>(page + d * T) + token;
            int8_t codes[32];
            for (int64_t b = 0; b < d / 32; ++b) {
                scales[b * T] = quantize_block8(key + b * 32, codes);
                for (int i = 0; i < 32; ++i) out[(b * 32 + i) * T] = codes[i];
            }
            break;
        }
        case KvEncoding::q4_0: {
            uint8_t* out = page + token;
            uint16_t* scales = reinterpret_cast<uint16_t*>(page + d / 2 * T) + token;
            uint8_t codes[32];
            for (int64_t b = 0; b < d / 32; ++b) {
                scales[b * T] = quantize_block4(key + b * 32, codes);
                for (int i = 0; i < 16; ++i) {
                    out[(b * 16 + i) * T] = static_cast<uint8_t>(codes[i] | (codes[i + 16] << 4));
                }
            }
            break;
        }
        default:
            break;
    }
}

void store_value(KvEncoding encoding, const float* value, int64_t d, int64_t token, uint8_t* page) {
    constexpr int64_t T = kPageTokens;
    switch (encoding) {
        case KvEncoding::f32: {
            float* out = reinterpret_cast<float*>(page) + token * d;
            for (int64_t i = 0; i < d; ++i) out[i] = value[i];
            break;
        }
        case KvEncoding::f16: {
            uint16_t* out = reinterpret_cast<uint16_t*>(page) + token * d;
            int64_t i = 0;
            for (; i + N <= d; i += N) Vec::load(value + i).store_f16(out + i);
            for (; i < d; ++i) out[i] = float_to_half(value[i]);
            break;
        }
        case KvEncoding::bf16: {
            uint16_t* out = reinterpret_cast<uint16_t*>(page) + token * d;
            int64_t i = 0;
            for (; i + N <= d; i += N) Vec::load(value + i).store_bf16(out + i);
            for (; i < d; ++i) out[i] = float_to_bf16(value[i]);
            break;
        }
        case KvEncoding::q8_0: {
            int8_t* out = reinterpret_cast<int8_t*>(page) + token * d;
            uint16_t* scales = reinterpret_cast<uint16_t*>(page + d * T) + token * (d / 32);
            for (int64_t b = 0; b < d / 32; ++b) scales[b] = quantize_block8(value + b * 32, out + b * 32);
            break;
        }
        case KvEncoding::q4_0: {
            uint8_t* out = page + token * (d / 2);
            uint16_t* scales = reinterpret_cast<uint16_t*>(page + d / 2 * T) + token * (d / 32);
            uint8_t codes[32];
            for (int64_t b = 0; b < d / 32; ++b) {
                scales[b] = quantize_block4(value + b * 32, codes);
                for (int i = 0; i < 16; ++i) {
                    out[b * 16 + i] = static_cast<uint8_t>(codes[i] | (codes[i + 16] << 4));
                }
            }
            break;
        }
        default:
            break;
    }
}

void load_keys(KvEncoding encoding, const uint8_t* page, int64_t d, float* out) {
    constexpr int64_t T = kPageTokens;
    switch (encoding) {
        case KvEncoding::f16: {
            const uint16_t* in = reinterpret_cast<const uint16_t*>(page);
            for (int64_t i = 0; i < d * T; i += N) Vec::load_f16(in + i).store(out + i);
            break;
        }
        case KvEncoding::bf16: {
            const uint16_t* in = reinterpret_cast<const uint16_t*>(page);
            for (int64_t i = 0; i < d * T; i += N) Vec::load_bf16(in + i).store(out + i);
            break;
        }
        case KvEncoding::q8_0: {
            const int8_t* in = reinterpret_cast<const int8_t*>(page);
            const uint16_t* scales = reinterpret_cast<const uint16_t*>(page + d * T);
            for (int64_t b = 0; b < d / 32; ++b) {
                for (int64_t t = 0; t < T; t += N) {
                    const Vec step = Vec::load_f16(scales + b * T + t);
                    for (int64_t i = b * 32; i < b * 32 + 32; ++i) {
                        (Vec::load_i8(in + i * T + t) * step).store(out + i * T + t);
                    }
                }
            }
            break;
        }
        case KvEncoding::q4_0: {
            const uint16_t* scales = reinterpret_cast<const uint16_t*>(page + d / 2 * T);
            const Vec eight = Vec::set1(8.0F);
            for (int64_t b = 0; b < d / 32; ++b) {
                for (int64_t t = 0; t < T; t += N) {
                    const Vec step = Vec::load_f16(scales + b * T + t);
                    for (int64_t i = 0; i < 16; ++i) {
                        const uint8_t* in = page + (b * 16 + i) * T + t;
                        ((Vec::load_low_nibbles(in) - eight) * step).store(out + (b * 32 + i) * T + t);
                        ((Vec::load_high_nibbles(in) - eight) * step).store(out + (b * 32 + i + 16) * T + t);
                    }
                }
            }
            break;
        }
        default: {
            const float* in = reinterpret_cast<const float*>(page);
            for (int64_t i = 0; i < d * T; i += N) Vec::load(in + i).store(out + i);
            break;
        }
    }
}

void load_values(KvEncoding encoding, const uint8_t* page, int64_t d, int64_t first, int64_t last,
                 float* out) {
    constexpr int64_t T = kPageTokens;
    switch (encoding) {
        case KvEncoding::f16: {
            const uint16_t* in = reinterpret_cast<const uint16_t*>(page);
            int64_t i = first * d;
            for (; i + N <= last * d; i += N) Vec::load_f16(in + i).store(out + i);
            for (; i < last * d; ++i) out[i] = half_to_float(in[i]);
            break;
        }
        case KvEncoding::bf16: {
            const uint16_t* in = reinterpret_cast<const uint16_t*>(page);
            int64_t i = first * d;
            for (; i + N <= last * d; i += N) Vec::load_bf16(in + i).store(out + i);
            for (; i < last * d; ++i) out[i] = bf16_to_float(in[i]);
            break;
        }
        case KvEncoding::q8_0: {
            const int8_t* in = reinterpret_cast<const int8_t*>(page);
            const uint16_t* scales = reinterpret_cast<const uint16_t*>(page + d * T);
            for (int64_t t = first; t < last; ++t) {
                for (int64_t b = 0; b < d / 32; ++b) {
                    const Vec step = Vec::set1(half_to_float(scales[t * (d / 32) + b]));
                    for (int64_t i = t * d + b * 32; i < t * d + b * 32 + 32; i += N) {
                        (Vec::load_i8(in + i) * step).store(out + i);
                    }
                }
            }
            break;
        }
        case KvEncoding::q4_0: {
            const uint16_t* scales = reinterpret_cast<const uint16_t*>(page + d / 2 * T);
            const Vec eight = Vec::set1(8.0F);
            for (int64_t t = first; t < last; ++t) {
                for (int64_t b = 0; b < d / 32; ++b) {
                    const Vec step = Vec::set1(half_to_float(scales[t * (d / 32) + b]));
                    const uint8_t* in = page + t * (d / 2) + b * 16;
                    float* to = out + t * d + b * 32;
                    for (int i = 0; i < 16; i += N) {
                        ((Vec::load_low_nibbles(in + i) - eight) * step).store(to + i);
                        ((Vec::load_high_nibbles(in + i) - eight) * step).store(to + 16 + i);
                    }
                }
            }
            break;
        }
        default: {
            const float* in = reinterpret_cast<const float*>(page);
            for (int64_t i = first * d; i < last * d; ++i) out[i] = in[i];
            break;
        }
    }
}

}  // namespace
}  // namespace nybble
