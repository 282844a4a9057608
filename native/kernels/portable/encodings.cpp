// Weight kernels in plain C++: the reference for the other levels, and what runs where there is
// no better one. Every block encoding has an integer dot product here.
#include "kernels/encoding_kernels.h"
#include "kernels/linear_f32.h"

namespace nybble {
namespace {

struct PortableFloats {
    static constexpr int width = 8;
    struct Register {
        float lanes[8];
    };
    static Register zero() { return Register{}; }
    static Register load(const float* p) {
        Register v;
        memcpy(v.lanes, p, sizeof v.lanes);
        return v;
    }
    static Register multiply_add(const Register& a, const Register& b, const Register& c) {
        Register v;
        for (int i = 0; i < 8; ++i) v.lanes[i] = a.lanes[i] * b.lanes[i] + c.lanes[i];
        return v;
    }
    static Register add(const Register& a, const Register& b) {
        Register v;
        for (int i = 0; i < 8; ++i) v.lanes[i] = a.lanes[i] + b.lanes[i];
        return v;
    }
    static float sum(const Register& a) {
        return ((a.lanes[0] + a.lanes[4]) + (a.lanes[1] + a.lanes[5])) +
               ((a.lanes[2] + a.lanes[6]) + (a.lanes[3] + a.lanes[7]));
    }
};

NYBBLE_ALWAYS_INLINE int32_t dot_16(const int8_t* a, const int8_t* b) {
    int32_t sum = 0;
    for (int i = 0; i < 16; ++i) sum += static_cast<int32_t>(a[i]) * b[i];
    return sum;
}

// Activations of 8 bits, or of 16 if `wide`: 16 * 128 * 32640 is far below 2^31.
template <typename Block, bool wide>
void linear_integer(const uint8_t* weight, size_t stride, int64_t rows, const Int8Rows& x, int64_t m,
                    float* y, int64_t y_stride) {
    constexpr int groups = Block::size / 16;
    int8_t q[Block::size];
    float scale[groups];
    float minimum[groups];
    for_activation_rows(m, [&](auto count, int64_t first) {
        constexpr int M = decltype(count)::value;
        for (int64_t r = 0; r < rows; ++r) {
            const uint8_t* block = weight + static_cast<size_t>(r) * stride;
            float sums[M] = {};
            for (int64_t c = 0; c < x.columns; c += Block::size, block += Block::bytes) {
                Block::unpack(block, q, scale, minimum);
                for (int j = 0; j < M; ++j) {
                    const int8_t* values = x.values + (first + j) * x.columns + c;
                    const int8_t* high = wide ? x.high + (first + j) * x.columns + c : nullptr;
                    const float* x_scales = x.scales + ((first + j) * x.columns + c) / 32;
                    const float* x_sums = x.sums + ((first + j) * x.columns + c) / 16;
                    for (int g = 0; g < groups; ++g) {
                        int32_t dot = dot_16(q + 16 * g, values + 16 * g);
                        if (wide) dot += 256 * dot_16(q + 16 * g, high + 16 * g);
                        sums[j] += scale[g] * x_scales[g / 2] * static_cast<float>(dot);
                        if (Block::has_minimum) sums[j] += minimum[g] * x_sums[g];
                    }
                }
            }
            for (int j = 0; j < M; ++j) y[(first + j) * y_stride + r] = sums[j];
        }
    });
}

// Rounds 512 elements at a time, which lie in the first-level cache.
template <DequantizeF32 dequantize, int block_size, int block_bytes>
void dequantize_bf16(const uint8_t* blocks, uint16_t* out, int64_t n) {
    float tile[tile_columns];
    for (int64_t i = 0; i < n; i += tile_columns) {
        const int64_t count = n - i < tile_columns ? n - i : tile_columns;
        dequantize(blocks + i / block_size * block_bytes, tile, count);
        for (int64_t k = 0; k < count; ++k) out[i + k] = bf16_from_float(tile[k]);
    }
}

EncodingKernelTable make_table() {
    EncodingKernelTable table;
    add_plain_f32<PortableFloats>(table);
    table[Encoding::f32].dequantize_bf16 = dequantize_bf16<copy_f32, 1, 4>;
    table[Encoding::f16].dequantize_bf16 = dequantize_bf16<widen_f16, 1, 2>;
    table[Encoding::bf16].dequantize_bf16 = dequantize_bf16<widen_bf16, 1, 2>;
    for_each_block([&](auto block, Encoding encoding) {
        using Block = decltype(block);
        add_block_f32<PortableFloats, Block>(table[encoding]);
        table[encoding].dequantize_bf16 =
            dequantize_bf16<dequantize_blocks_f32<Block>, Block::size, Block::bytes>;
        table[encoding].linear_int8 = linear_integer<Block, false>;
        table[encoding].linear_int16 = linear_integer<Block, true>;
    });
    return table;
}

}  // namespace

const EncodingKernels* encoding_kernels_portable() {
    static const EncodingKernelTable table = make_table();
    return table.entries;
}

}  // namespace nybble
