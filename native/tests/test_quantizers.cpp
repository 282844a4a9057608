// Checks the quantizers of block types: every instruction set of this machine and any number of threads
// give the same bytes, nothing is written beyond them, and values that cannot be quantized are noticed.
// Exit code 0 means all is well. That the bytes are the right ones is tested in Python (tests/quantize).
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "core/cpu_features.h"
#include "core/encoding.h"
#include "quantize/blocks.h"

using namespace nybble;

namespace {

int failures = 0;

void check(bool ok, const std::string& what) {
    if (ok) return;
    ++failures;
    std::fprintf(stderr, "FAILED: %s\n", what.c_str());
}

constexpr int64_t columns = 512;
constexpr size_t guard = 64;

struct Result {
    Quantized state;
    std::vector<uint8_t> bytes;
};

Result quantize(Encoding encoding, Isa isa, const std::vector<float>& values, const float* importance,
                int threads, const std::string& what) {
    const int64_t rows = static_cast<int64_t>(values.size()) / columns;
    const size_t size = static_cast<size_t>(rows) * row_bytes(encoding, columns);
    Result result{Quantized::done, std::vector<uint8_t>(size + guard, 0xa5)};
    result.state = quantize_blocks(block_quantizer(encoding, isa), encoding, values.data(), rows, columns,
                                   importance, threads, result.bytes.data());
    for (size_t i = size; i < size + guard; ++i) check(result.bytes[i] == 0xa5, what + " writes too far");
    return result;
}

void test(Encoding encoding) {
    const std::string name = encoding_info(encoding).name;
    std::mt19937 random(5);
    std::normal_distribution<float> normal(0.0f, 0.02f);
    for (const int64_t rows : {1, 15, 16, 37}) {
        std::vector<float> values(static_cast<size_t>(rows * columns));
        for (float& value : values) value = normal(random);
        for (int64_t i = 0; i < columns / 2; ++i) values[static_cast<size_t>(i)] = 0.0f;
        std::vector<float> importance(columns);
        for (float& weight : importance) weight = normal(random) * normal(random);
        for (float& weight : importance) weight = weight < 0 ? 0.0f : weight;
        for (const float* weights :
             {static_cast<const float*>(nullptr), static_cast<const float*>(importance.data())}) {
            const Result expected = quantize(encoding, Isa::portable, values, weights, 1, name);
            check(expected.state == Quantized::done, name + " is done");
            for (const Isa isa : available_isas()) {
                for (const int threads : {1, 3}) {
                    const std::string what = name + " " + isa_name(isa);
                    const Result found = quantize(encoding, isa, values, weights, threads, what);
                    check(found.bytes == expected.bytes, what + " gives the same bytes");
                }
            }
        }
    }
    for (const float wrong : {std::nanf(""), std::numeric_limits<float>::infinity()}) {
        std::vector<float> values(3 * columns, 0.5f);
        values[777] = wrong;
        for (const Isa isa : available_isas()) {
            const std::string what = name + " " + isa_name(isa);
            check(quantize(encoding, isa, values, nullptr, 1, what).state == Quantized::not_finite,
                  what + " notices what is not finite");
        }
    }
}

}  // namespace

int main() {
    int tested = 0;
    for (int i = 0; i < static_cast<int>(Encoding::count); ++i) {
        const Encoding encoding = static_cast<Encoding>(i);
        if (block_quantizer(encoding, Isa::portable) == nullptr) continue;
        ++tested;
        test(encoding);
    }
    check(tested > 20, "there are quantizers");
    if (failures == 0) std::printf("ok: %d encodings\n", tested);
    return failures == 0 ? 0 : 1;
}
