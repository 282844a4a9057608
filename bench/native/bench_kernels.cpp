// Speed of the weight kernels on one thread, in GB/s of weight bytes, and of dequantization, in
// elements a nanosecond.
//
//   bench_kernels [--isa LEVEL] [--encoding NAME] [--bits 8] [--megabytes 256] [--columns 4096] [--repeat 5]
//
// "memory": all rows of a matrix of so many megabytes; "cache": 512 kB of it again and again. Best of the
// repeats. "read" is the limit: plainly summing the same bytes.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "kernels/encoding_kernels.h"

using namespace nybble;

namespace {

double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

template <typename Work>
double best_seconds(int repeat, const Work& work) {
    double best = 1e30;
    for (int i = 0; i < repeat; ++i) {
        const double start = now();
        work();
        best = std::min(best, now() - start);
    }
    return best;
}

volatile uint64_t sink;

double read_gb_per_second(const std::vector<uint64_t>& memory, int repeat) {
    const double seconds = best_seconds(repeat, [&] {
        uint64_t sums[16] = {};
        for (size_t i = 0; i + 16 <= memory.size(); i += 16) {
            for (size_t k = 0; k < 16; ++k) sums[k] += memory[i + k];
        }
        uint64_t total = 0;
        for (uint64_t sum : sums) total += sum;
        sink = total;
    });
    return static_cast<double>(memory.size()) * 8e-9 / seconds;
}

}  // namespace

int main(int argc, char** argv) {
    std::string only_isa, only_encoding;
    int64_t columns = 4096;
    size_t megabytes = 256;
    int repeat = 5;
    int bits = 8;  // of the activations: 8 or 16
    for (int i = 1; i + 1 < argc; i += 2) {
        const std::string option = argv[i];
        if (option == "--isa")
            only_isa = argv[i + 1];
        else if (option == "--encoding")
            only_encoding = argv[i + 1];
        else if (option == "--columns")
            columns = std::atoll(argv[i + 1]);
        else if (option == "--megabytes")
            megabytes = static_cast<size_t>(std::atoll(argv[i + 1]));
        else if (option == "--bits")
            bits = std::atoi(argv[i + 1]);
        else if (option == "--repeat")
            repeat = std::atoi(argv[i + 1]);
        else
            return std::fprintf(stderr, "unknown option %s\n", argv[i]), 2;
    }
    std::vector<uint64_t> memory(megabytes << 17, 0x2523211f1d1b1917u);
    const uint8_t* weight = reinterpret_cast<const uint8_t*>(memory.data());
    constexpr int64_t max_m = 4;
    std::vector<int8_t> values(static_cast<size_t>(max_m * columns) + 64, 3);
    std::vector<float> scales(static_cast<size_t>(max_m * columns / 32), 0.01f);
    std::vector<float> sums(static_cast<size_t>(max_m * columns / 16), 0.01f);
    std::vector<float> floats(static_cast<size_t>(max_m * columns), 0.5f);
    int8_t* aligned = values.data() + (64 - reinterpret_cast<uintptr_t>(values.data()) % 64) % 64;
    const Int8Rows x{aligned, scales.data(), sums.data(), columns, bits == 16 ? aligned : nullptr};

    std::printf("read %.1f GB/s\n", read_gb_per_second(memory, repeat));
    std::printf(
        "%-12s %-8s | memory m=1    2    3    4 | cache m=1     2     3     4 | f32 m=1 | el/ns f32  bf16\n",
        "isa", "encoding");
    for (Isa isa : available_isas()) {
        if (!only_isa.empty() && only_isa != isa_name(isa)) continue;
        for (int e = 0; e < static_cast<int>(Encoding::count); ++e) {
            const Encoding encoding = static_cast<Encoding>(e);
            if (!only_encoding.empty() && only_encoding != encoding_info(encoding).name) continue;
            const EncodingKernels& kernels = encoding_kernels(isa)[e];
            const LinearInt8 linear = bits == 16 ? kernels.linear_int16 : kernels.linear_int8;
            const size_t stride = row_bytes(encoding, columns);
            const int64_t all_rows = static_cast<int64_t>((megabytes << 20) / stride);
            const int64_t few_rows = std::max<int64_t>(4, static_cast<int64_t>((512u << 10) / stride));
            std::vector<float> y(static_cast<size_t>(max_m * all_rows));
            std::printf("%-12s %-8s |", isa_name(isa), encoding_info(encoding).name);
            for (int64_t rows : {all_rows, few_rows}) {
                for (int64_t m = 1; m <= max_m; ++m) {
                    if (linear == nullptr) {
                        std::printf("     -");
                        continue;
                    }
                    const int64_t times = rows == all_rows ? 1 : std::max<int64_t>(1, all_rows / rows / 8);
                    const double seconds = best_seconds(repeat, [&] {
                        for (int64_t i = 0; i < times; ++i)
                            linear(weight, stride, rows, x, m, y.data(), rows);
                    });
                    std::printf(" %5.1f", static_cast<double>(times * rows) * static_cast<double>(stride) *
                                              1e-9 / seconds);
                }
                std::printf(" |");
            }
            const double seconds = best_seconds(repeat, [&] {
                kernels.linear_f32(weight, stride, few_rows, floats.data(), columns, columns, 1, y.data(),
                                   few_rows);
            });
            std::printf(" %7.1f |",
                        static_cast<double>(few_rows) * static_cast<double>(stride) * 1e-9 / seconds);
            constexpr int64_t n = 8192;
            alignas(64) static float out[n];
            alignas(64) static uint16_t out16[n];
            const double f32 = best_seconds(repeat * 20, [&] { kernels.dequantize_f32(weight, out, n); });
            const double bf16 = best_seconds(repeat * 20, [&] { kernels.dequantize_bf16(weight, out16, n); });
            std::printf(" %9.2f %5.2f\n", n * 1e-9 / f32, n * 1e-9 / bf16);
            std::fflush(stdout);
        }
    }
    return 0;
}
