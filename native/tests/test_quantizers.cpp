// Checks the quantizers of block types: every instruction set of this machine and any number of threads
// give the same bytes, nothing is written beyond them, and values that cannot be quantized are noticed.
// Exit code 0 means all is well. That the bytes are the right ones is tested in Python (tests/quantize).
//
// Levels that share a quantizer are tested once, and threads, which are the same for all types, with cheap
// types: under sanitizers a codebook's search takes a second for a few thousand values.
#include <algorithm>
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
#include "tests/check.h"

using namespace nybble;

namespace {

constexpr int64_t columns = 512;
constexpr size_t guard = 64;

struct Result {
    Quantized state = Quantized::done;
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

// The levels whose quantizers differ, the lowest of each.
std::vector<Isa> levels(Encoding encoding) {
    std::vector<Isa> result;
    std::vector<QuantizeRows> seen;
    for (const Isa isa : available_isas()) {
        const QuantizeRows quantizer = block_quantizer(encoding, isa);
        if (std::find(seen.begin(), seen.end(), quantizer) != seen.end()) continue;
        seen.push_back(quantizer);
        result.push_back(isa);
    }
    return result;
}

std::vector<float> random_weights(int64_t rows) {
    std::mt19937 random(5);
    std::normal_distribution<float> normal(0.0f, 0.02f);
    std::vector<float> values(static_cast<size_t>(rows * columns));
    for (float& value : values) value = normal(random);
    for (int64_t i = 0; i < columns / 2; ++i) values[static_cast<size_t>(i)] = 0.0f;
    return values;
}

std::vector<float> random_importance() {
    std::mt19937 random(6);
    std::normal_distribution<float> normal(0.0f, 0.02f);
    std::vector<float> importance(columns);
    for (float& weight : importance) weight = normal(random) * normal(random);
    for (float& weight : importance) weight = weight < 0 ? 0.0f : weight;
    return importance;
}

void test_levels(Encoding encoding) {
    const std::vector<float> importance = random_importance();
    // Alone, a full set of the widest lanes (16), and sets of 8 and of 16 with some left over.
    for (const int64_t rows : {1, 16, 21}) {
        const std::vector<float> values = random_weights(rows);
        for (const float* weights : {static_cast<const float*>(nullptr), importance.data()}) {
            Result expected;
            for (const Isa isa : levels(encoding)) {
                const std::string what = std::string(encoding_info(encoding).name) + " " + isa_name(isa);
                const Result found = quantize(encoding, isa, values, weights, 1, what);
                check(found.state == Quantized::done, what + " is done");
                if (isa == Isa::portable) expected = found;
                check(found.bytes == expected.bytes, what + " gives the same bytes");
            }
        }
    }
    for (const float wrong : {std::nanf(""), std::numeric_limits<float>::infinity()}) {
        std::vector<float> values(3 * columns, 0.5f);
        values[777] = wrong;
        for (const Isa isa : levels(encoding)) {
            const std::string what = std::string(encoding_info(encoding).name) + " " + isa_name(isa);
            check(quantize(encoding, isa, values, nullptr, 1, what).state == Quantized::not_finite,
                  what + " notices what is not finite");
        }
    }
}

// More rows than one thread takes at a time, for blocks of both sizes.
void test_threads() {
    const std::vector<float> values = random_weights(300), importance = random_importance();
    for (const Encoding encoding : {Encoding::q8_0, Encoding::tq2_0}) {
        for (const float* weights : {static_cast<const float*>(nullptr), importance.data()}) {
            for (const Isa isa : levels(encoding)) {
                const std::string what = std::string(encoding_info(encoding).name) + " " + isa_name(isa);
                const Result expected = quantize(encoding, isa, values, weights, 1, what);
                check(expected.state == Quantized::done, what + " is done");
                for (const int threads : {2, 3, 8}) {
                    const Result found = quantize(encoding, isa, values, weights, threads, what);
                    check(found.bytes == expected.bytes,
                          what + " gives the same bytes with " + std::to_string(threads) + " threads");
                }
                std::vector<float> wrong = values;
                wrong.back() = std::nanf("");
                check(quantize(encoding, isa, wrong, weights, 3, what).state == Quantized::not_finite,
                      what + " notices what is not finite in another thread");
            }
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
        test_levels(encoding);
    }
    test_threads();
    check(tested > 20, "there are quantizers");
    if (failures == 0) std::printf("ok: %d encodings\n", tested);
    return checked();
}
