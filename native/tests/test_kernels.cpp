// Checks the weight kernels of every instruction set that this machine has: each against the scalar
// description of its blocks, results that do not depend on how rows are grouped, and no byte read
// beyond the weights. Exit code 0 means all is well.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "core/encoding.h"
#include "kernels/encoding_kernels.h"
#include "tests/check.h"

using namespace nybble;

namespace {

// Bytes that end where the readable memory ends, so that reading past them crashes (on Linux).
class GuardedBytes {
   public:
    explicit GuardedBytes(size_t size) : size_(size) {
#if defined(__linux__)
        const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
        const size_t data = (size + page - 1) / page * page;
        mapped_ = data + page;
        base_ = static_cast<uint8_t*>(
            mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        if (base_ == MAP_FAILED || mprotect(base_ + data, page, PROT_NONE) != 0) std::abort();
        data_ = base_ + data - size;
#else
        base_ = data_ = static_cast<uint8_t*>(std::malloc(size));
#endif
    }
    ~GuardedBytes() {
#if defined(__linux__)
        munmap(base_, mapped_);
#else
        std::free(base_);
#endif
    }
    GuardedBytes(const GuardedBytes&) = delete;
    GuardedBytes& operator=(const GuardedBytes&) = delete;
    uint8_t* data() const { return data_; }
    size_t size() const { return size_; }

   private:
    size_t size_;
    size_t mapped_ = 0;
    uint8_t* base_;
    uint8_t* data_;
};

std::mt19937 generator(20240607);

uint32_t random_bits() { return static_cast<uint32_t>(generator()); }

// Where float16 scales stand in a block.
std::vector<int> half_positions(Encoding encoding) {
    switch (encoding) {
        case Encoding::q4_1:
        case Encoding::q5_1:
        case Encoding::q4_k:
        case Encoding::q5_k:
            return {0, 2};
        case Encoding::q2_k:
            return {80, 82};
        case Encoding::q3_k:
            return {108};
        case Encoding::q6_k:
            return {208};
        case Encoding::tq1_0:
            return {52};
        case Encoding::tq2_0:
            return {64};
        case Encoding::int4_g32_f32:
        case Encoding::int4_g32_f32_z:
        case Encoding::int8_g32_f32:
        case Encoding::int4_g32_f32_m:
        case Encoding::int8_g32_f32_m:
        case Encoding::mxfp4:
        case Encoding::nvfp4:
        case Encoding::q8_k:
        case Encoding::iq1_m:
            return {};
        case Encoding::f16:
            return {0};
        default:
            return {0};
    }
}

// Random blocks whose scales are finite and of moderate size, either sign.
void fill_blocks(Encoding encoding, uint8_t* bytes, size_t size) {
    const EncodingInfo& info = encoding_info(encoding);
    for (size_t i = 0; i < size; ++i) bytes[i] = static_cast<uint8_t>(random_bits() >> 11);
    if (encoding == Encoding::f32) {
        std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
        for (size_t i = 0; i + 4 <= size; i += 4) {
            const float value = uniform(generator);
            std::memcpy(bytes + i, &value, 4);
        }
        return;
    }
    if (encoding == Encoding::bf16) {
        for (size_t i = 1; i < size; i += 2) bytes[i] = static_cast<uint8_t>((bytes[i] & 0x80) | 0x3e);
        return;
    }
    for (size_t i = 0; i < size; i += static_cast<size_t>(info.block_bytes)) {
        uint8_t* block = bytes + i;
        for (int position : half_positions(encoding)) {
            const uint16_t half =
                static_cast<uint16_t>((random_bits() & 0x83ff) | 0x2000 | (random_bits() & 0x0c00));
            std::memcpy(block + position, &half, 2);
        }
        if (encoding == Encoding::int4_g32_f32 || encoding == Encoding::int4_g32_f32_z ||
            encoding == Encoding::int8_g32_f32) {
            const float scale = static_cast<float>(static_cast<int>(random_bits() % 2001) - 1000) * 1e-3f;
            std::memcpy(block, &scale, 4);
        }
        if (encoding == Encoding::int4_g32_f32_m || encoding == Encoding::int8_g32_f32_m) {
            for (int at = 0; at < 8; at += 4) {
                const float number =
                    static_cast<float>(static_cast<int>(random_bits() % 2001) - 1000) * 1e-3f;
                std::memcpy(block + at, &number, 4);
            }
        }
        if (encoding == Encoding::int8_g32_f32_m) {
            for (int at = 8; at < 40; ++at)
                block[at] = static_cast<uint8_t>(block[at] & max_code_with_minimum);
        }
        if (encoding == Encoding::int4_g32_f32_z)
            block[4] = static_cast<uint8_t>(block[4] % (max_zero_point + 1));
        if (encoding == Encoding::int4_g32_f16_z)
            block[2] = static_cast<uint8_t>(block[2] % (max_zero_point + 1));
        if (encoding == Encoding::mxfp4) block[0] = static_cast<uint8_t>(110 + random_bits() % 16);
        if (encoding == Encoding::nvfp4) {
            for (int g = 0; g < 4; ++g) block[g] = static_cast<uint8_t>(block[g] & 0x3f);
        }
        if (encoding == Encoding::iq1_m) block[55] = static_cast<uint8_t>((block[55] & 0x0f) | 0x20);
        if (encoding == Encoding::q8_k) {
            const float d = 0.01f;
            std::memcpy(block, &d, 4);
        }
    }
}

// What the activations of a check are like. All but `bytes` have 16 bits.
enum class Pattern { bytes, words, largest, lowest_low_bytes, spike, zeros };

constexpr Pattern patterns[] = {Pattern::bytes, Pattern::words, Pattern::largest, Pattern::lowest_low_bytes,
                                Pattern::spike, Pattern::zeros};

// The k-th activation of a block as an integer.
int activation(Pattern pattern, int k) {
    const int sign = random_bits() % 2 ? 1 : -1;
    switch (pattern) {
        case Pattern::bytes:
            return static_cast<int>(random_bits() % 255) - 127;
        case Pattern::words:
            return static_cast<int>(random_bits() % 65025) - 32512;
        case Pattern::largest:
            return sign * (256 * 127 + (sign > 0 ? 127 : 0));
        case Pattern::lowest_low_bytes:
            return 256 * (static_cast<int>(random_bits() % 254) - 126) - 128;
        case Pattern::spike:
            return k == 17 ? sign * 32512 : 0;
        default:
            return 0;
    }
}

// Activations that the float `values` show exactly but for one rounding.
struct Activations {
    std::vector<int8_t> storage;
    std::vector<float> scales, sums, values;  // values: float [m][columns]
    Int8Rows rows{};

    Activations(int64_t m, int64_t columns, Pattern pattern)
        : storage(static_cast<size_t>(2 * (m * columns + 64))) {
        int8_t* low = aligned(storage.data());
        int8_t* high = aligned(low + m * columns);
        for (int64_t i = 0; i < m * columns / 32; ++i) {
            const float scale = std::ldexp(1.0f + static_cast<float>(random_bits() % 1000) / 1000.0f, -6);
            scales.push_back(scale);
            for (int half = 0; half < 2; ++half) {
                int sum = 0;
                for (int k = 16 * half; k < 16 * half + 16; ++k) {
                    const int value = activation(pattern, k);
                    // Rounded down to a multiple of 256 with the low byte in -128 .. 127.
                    const int upper = (value + 128 + 65536) / 256 - 256;
                    high[32 * i + k] = static_cast<int8_t>(upper);
                    low[32 * i + k] = static_cast<int8_t>(value - 256 * upper);
                    sum += value;
                    values.push_back(scale * static_cast<float>(value));
                }
                sums.push_back(scale * static_cast<float>(sum));
            }
        }
        rows = {low, scales.data(), sums.data(), columns, pattern == Pattern::bytes ? nullptr : high};
    }

    Int8Rows from(int64_t row) const {
        return {rows.values + row * rows.columns, rows.scales + row * rows.columns / 32,
                rows.sums + row * rows.columns / 16, rows.columns,
                rows.high ? rows.high + row * rows.columns : nullptr};
    }

   private:
    static int8_t* aligned(int8_t* p) { return p + (64 - reinterpret_cast<uintptr_t>(p) % 64) % 64; }
};

bool same_bits(const void* a, const void* b, size_t bytes) { return std::memcmp(a, b, bytes) == 0; }

// Whether a level brings its own kernel; if not, the level that it has it from was tested before.
template <typename Kernel>
bool is_new(Isa isa, Encoding encoding, Kernel EncodingKernels::* kernel) {
    const int e = static_cast<int>(encoding);
    for (const Isa lower : available_isas()) {
        if (lower >= isa) break;
        if (encoding_kernels(lower)[e].*kernel == encoding_kernels(isa)[e].*kernel) return false;
    }
    return true;
}

void check_dequantize(Isa isa, Encoding encoding) {
    const EncodingInfo& info = encoding_info(encoding);
    const EncodingKernels& kernels = encoding_kernels(isa)[static_cast<int>(encoding)];
    const EncodingKernels& reference = encoding_kernels_portable()[static_cast<int>(encoding)];
    const std::string what = std::string(isa_name(isa)) + " " + info.name;
    for (int64_t blocks : {1, 2, 3, 5, 16, 67}) {
        const int64_t n = blocks * info.block_size;
        GuardedBytes bytes(static_cast<size_t>(blocks * info.block_bytes));
        fill_blocks(encoding, bytes.data(), bytes.size());
        std::vector<float> expected(static_cast<size_t>(n));
        GuardedBytes out(static_cast<size_t>(n) * 4);
        reference.dequantize_f32(bytes.data(), expected.data(), n);
        kernels.dequantize_f32(bytes.data(), reinterpret_cast<float*>(out.data()), n);
        check(same_bits(out.data(), expected.data(), out.size()), what + ": dequantize_f32");
        if (!kernels.dequantize_bf16) continue;
        std::vector<uint16_t> expected16(static_cast<size_t>(n));
        GuardedBytes out16(static_cast<size_t>(n) * 2);
        reference.dequantize_bf16(bytes.data(), expected16.data(), n);
        kernels.dequantize_bf16(bytes.data(), reinterpret_cast<uint16_t*>(out16.data()), n);
        check(same_bits(out16.data(), expected16.data(), out16.size()), what + ": dequantize_bf16");
    }
}

// One product against double precision; then in other groups of rows, which must give the same bits.
// run(first weight row, rows, first activation row, m, y) multiplies.
template <typename Run>
void check_product(const std::string& what, const std::vector<float>& w, int64_t rows, const Activations& x,
                   int64_t m, int64_t y_stride, const Run& run) {
    const int64_t columns = x.rows.columns;
    std::vector<float> y(static_cast<size_t>(m * y_stride), -7.0f);
    run(0, rows, 0, m, y.data());
    double worst = 0.0;
    for (int64_t j = 0; j < m; ++j) {
        for (int64_t r = 0; r < rows; ++r) {
            double sum = 0.0;
            double magnitude = 0.0;
            for (int64_t c = 0; c < columns; ++c) {
                const double product = static_cast<double>(w[static_cast<size_t>(r * columns + c)]) *
                                       static_cast<double>(x.values[static_cast<size_t>(j * columns + c)]);
                sum += product;
                magnitude += std::fabs(product);
            }
            const double error =
                std::fabs(static_cast<double>(y[static_cast<size_t>(j * y_stride + r)]) - sum);
            const double allowed = magnitude > 0.0 ? error / magnitude : error * HUGE_VAL;
            worst = std::isfinite(error) ? std::max(worst, error > 0.0 ? allowed : 0.0) : HUGE_VAL;
        }
        check(y[static_cast<size_t>(j * y_stride + rows)] == -7.0f, what + " wrote beyond its rows");
    }
    // A few float32 roundings of the sum of magnitudes.
    check(worst < 2e-6, what + " error " + std::to_string(worst));
    bool same = true;
    for (int64_t j = 0; j < m; ++j) {
        for (int64_t r = 0; r < rows; ++r) {
            float alone = 0.0f;
            run(r, 1, j, 1, &alone);
            same = same && same_bits(&alone, &y[static_cast<size_t>(j * y_stride + r)], 4);
        }
    }
    std::vector<float> pairs(static_cast<size_t>(m * y_stride));
    for (int64_t j = 0; j < m; j += 2) {
        for (int64_t r = 0; r < rows; r += 3) {
            run(r, std::min<int64_t>(3, rows - r), j, std::min<int64_t>(2, m - j),
                pairs.data() + j * y_stride + r);
        }
    }
    for (int64_t j = 0; j < m; ++j) {
        same = same && same_bits(&pairs[static_cast<size_t>(j * y_stride)],
                                 &y[static_cast<size_t>(j * y_stride)], static_cast<size_t>(rows) * 4);
    }
    check(same, what + " depends on the grouping of rows");
}

// Every product of an encoding, for one shape.
void check_linear(Isa isa, Encoding encoding, int64_t rows, int64_t columns, int64_t m, Pattern pattern) {
    const EncodingInfo& info = encoding_info(encoding);
    const EncodingKernels& kernels = encoding_kernels(isa)[static_cast<int>(encoding)];
    const std::string what = std::string(isa_name(isa)) + " " + info.name + " " + std::to_string(rows) + "x" +
                             std::to_string(columns) + " m=" + std::to_string(m) + " pattern " +
                             std::to_string(static_cast<int>(pattern)) + ": ";
    const auto member =
        pattern == Pattern::bytes ? &EncodingKernels::linear_int8 : &EncodingKernels::linear_int16;
    const LinearInt8 kernel = kernels.*member;
    check((kernel != nullptr) == (info.block_size > 1), what + "block encodings have integer products");
    const bool integers = kernel != nullptr && is_new(isa, encoding, member);
    const bool floats = pattern == Pattern::bytes && is_new(isa, encoding, &EncodingKernels::linear_f32);
    if (!integers && !floats) return;
    const size_t stride = row_bytes(encoding, columns);
    GuardedBytes weight(stride * static_cast<size_t>(rows));
    fill_blocks(encoding, weight.data(), weight.size());
    std::vector<float> w(static_cast<size_t>(rows * columns));
    encoding_kernels_portable()[static_cast<int>(encoding)].dequantize_f32(weight.data(), w.data(),
                                                                           rows * columns);
    const Activations x(m, columns, pattern);
    const int64_t y_stride = rows + 3;
    const auto weight_row = [&](int64_t row) { return weight.data() + stride * static_cast<size_t>(row); };

    if (floats) {
        check_product(what + "linear_f32", w, rows, x, m, y_stride,
                      [&](int64_t row, int64_t row_count, int64_t first, int64_t count, float* y) {
                          kernels.linear_f32(weight_row(row), stride, row_count,
                                             x.values.data() + first * columns, columns, columns, count, y,
                                             y_stride);
                      });
    }
    if (!integers) return;
    check_product(what + (pattern == Pattern::bytes ? "linear_int8" : "linear_int16"), w, rows, x, m,
                  y_stride, [&](int64_t row, int64_t row_count, int64_t first, int64_t count, float* y) {
                      kernel(weight_row(row), stride, row_count, x.from(first), count, y, y_stride);
                  });
}

}  // namespace

int main() {
    for (int e = 0; e < static_cast<int>(Encoding::count); ++e) {
        const Encoding encoding = static_cast<Encoding>(e);
        check(encoding_from_name(encoding_info(encoding).name) == encoding, "encoding_from_name");
    }
    check(encoding_from_name("q9_9") == Encoding::count, "an unknown name");
    for (Isa isa : available_isas()) {
        for (int e = 0; e < static_cast<int>(Encoding::count); ++e) {
            const Encoding encoding = static_cast<Encoding>(e);
            const int64_t block = encoding_info(encoding).block_size;
            check_dequantize(isa, encoding);
            for (int64_t blocks : {1, 2, 3, 4, 5, 15, 16, 18, 19}) {
                const int64_t columns = block < 32 ? 32 * blocks : block * blocks;
                for (int64_t m : {1, 2, 3, 4, 5, 6}) {
                    for (Pattern pattern : {Pattern::bytes, Pattern::words}) {
                        check_linear(isa, encoding, 1 + random_bits() % 7, columns, m, pattern);
                    }
                }
            }
            // More rows and columns than kernels work on at a time.
            for (Pattern pattern : patterns) {
                for (int64_t m : {1, 3, 4}) check_linear(isa, encoding, 35, 4096, m, pattern);
            }
        }
        std::printf("%s done\n", isa_name(isa));
    }
    return checked();
}
