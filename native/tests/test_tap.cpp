// Taps on every instruction set: sums against float64, the same bits with any number of threads, hidden
// states that come in and go out unchanged, and plans that are refused. Run under sanitizers.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/session.h"
#include "tests/check.h"

using namespace nybble;

namespace {

struct Sums {
    explicit Sums(int64_t columns)
        : squares(static_cast<size_t>(columns)),
          absolute(static_cast<size_t>(columns)),
          products(static_cast<size_t>(columns * columns)) {}
    std::vector<double> squares;
    std::vector<double> absolute;
    std::vector<float> products;
};

// Hidden states, a tap on some of their columns, with a norm or without, and all of them as output.
Plan make_plan(int64_t hidden, int64_t offset, int64_t columns, bool norm, Sums& sums) {
    Plan plan;
    plan.hidden_size = hidden;
    plan.vocab_size = hidden;
    plan.context_length = 4096;
    plan.vectors.push_back(std::vector<float>(static_cast<size_t>(columns), 1.5F));
    plan.buffers.push_back(hidden);
    plan.buffer_selected.push_back(false);
    plan.taps.push_back({columns, sums.squares.data(), sums.absolute.data(), sums.products.data()});
    plan.ops.push_back({HiddenOp{{0, 0}}, false});
    plan.ops.push_back({TapOp{{0, offset}, columns, norm ? Norm{0, 1e-6F, 0.5F} : Norm{}, 0}, false});
    plan.ops.push_back({SelectOp{{0, 0}, {kOutput, 0}, hidden}, true});
    return plan;
}

std::vector<float> run(const Plan& plan, Isa isa, int threads, const std::vector<float>& x) {
    SessionOptions options;
    options.threads = threads;
    options.max_rows = 100;
    options.isa = isa;
    Session session(plan, options);
    std::vector<float> output(x.size());
    const int64_t rows = static_cast<int64_t>(x.size()) / plan.hidden_size;
    auto a = session.new_sequence();
    auto b = session.new_sequence();
    const int64_t first = rows / 3;
    session.forward(
        {{a.get(), nullptr, first, LogitRows::all, 0, x.data()},
         {b.get(), nullptr, rows - first, LogitRows::all, 0, x.data() + first * plan.hidden_size}},
        output.data());
    return output;
}

void check_tap(Isa isa, int64_t hidden, int64_t offset, int64_t columns, bool norm) {
    const std::string what = std::string(isa_name(isa)) + " " + std::to_string(columns) + " columns" +
                             (norm ? " after a norm" : "");
    constexpr int64_t kRows = 230;
    std::mt19937 random(static_cast<uint32_t>(columns));
    std::normal_distribution<float> normal(0.3F, 1.0F);
    std::vector<float> x(static_cast<size_t>(kRows * hidden));
    for (float& value : x) {
        value = normal(random);
    }
    Sums sums(columns);
    const Plan plan = make_plan(hidden, offset, columns, norm, sums);
    check(run(plan, isa, 3, x) == x, what + ": hidden states come out as they went in");
    Sums single(columns);
    run(make_plan(hidden, offset, columns, norm, single), isa, 1, x);
    check(single.squares == sums.squares && single.absolute == sums.absolute &&
              single.products == sums.products,
          what + ": threads");

    std::vector<double> rows;
    for (int64_t row = 0; row < kRows; ++row) {
        const float* from = x.data() + row * hidden + offset;
        double total = 0;
        for (int64_t i = 0; i < columns; ++i) {
            total += static_cast<double>(from[i]) * static_cast<double>(from[i]);
        }
        const double scale = norm ? 2.0 / std::sqrt(total / static_cast<double>(columns) + 1e-6) : 1.0;
        for (int64_t i = 0; i < columns; ++i) {
            rows.push_back(static_cast<double>(from[i]) * scale);
        }
    }
    double worst = 0;
    for (int64_t i = 0; i < columns; ++i) {
        double squares = 0;
        double absolute = 0;
        for (int64_t row = 0; row < kRows; ++row) {
            const double value = rows[static_cast<size_t>(row * columns + i)];
            squares += value * value;
            absolute += std::fabs(value);
        }
        worst = std::max(worst, std::fabs(sums.squares[static_cast<size_t>(i)] - squares) / squares);
        worst = std::max(worst, std::fabs(sums.absolute[static_cast<size_t>(i)] - absolute) / absolute);
        for (int64_t j = i; j < columns; ++j) {
            double product = 0;
            double magnitude = 0;
            for (int64_t row = 0; row < kRows; ++row) {
                const double term = rows[static_cast<size_t>(row * columns + i)] *
                                    rows[static_cast<size_t>(row * columns + j)];
                product += term;
                magnitude += std::fabs(term);
            }
            const double found = static_cast<double>(sums.products[static_cast<size_t>(i * columns + j)]);
            worst = std::max(worst, std::fabs(found - product) / magnitude);
        }
    }
    // float32 sums; on AMX values of 16 bits of precision, and no products of two small halves.
    check(worst < (isa == Isa::amx ? 1e-5 : 2e-6), what + ": error " + std::to_string(1e6 * worst) + "e-6");
}

void check_refused() {
    Sums sums(32);
    const auto refused = [](Plan plan, const std::string& what) {
        try {
            plan.validate();
            check(false, what + " is accepted");
        } catch (const std::invalid_argument&) {
        }
    };
    Plan plan = make_plan(32, 0, 32, false, sums);
    plan.validate();
    plan.taps[0].columns = 31;
    refused(plan, "a tap of other columns");
    plan = make_plan(32, 0, 32, false, sums);
    std::get<TapOp>(plan.ops[1].body).tap = 1;
    refused(plan, "an unknown tap");
    plan = make_plan(32, 0, 32, false, sums);
    plan.hidden_size = 0;
    refused(plan, "hidden states that nobody gives");
    plan = make_plan(32, 0, 32, false, sums);
    std::get<TapOp>(plan.ops[1].body).in.offset = 1;
    refused(plan, "a tap beyond its buffer");
    plan = make_plan(32, 0, 32, false, sums);
    plan.ops[0].selected = true;
    refused(plan, "hidden states of selected rows");

    const Plan good = make_plan(32, 0, 32, false, sums);
    Session session(good, {});
    auto sequence = session.new_sequence();
    const int32_t token = 1;
    std::vector<float> output(32);
    bool thrown = false;
    try {
        session.forward({{sequence.get(), &token, 1, LogitRows::all, 0, nullptr}}, output.data());
    } catch (const std::invalid_argument&) {
        thrown = true;
    }
    check(thrown && sequence->length() == 0, "tokens for a plan that starts with hidden states");
}

}  // namespace

int main() {
    for (const Isa isa : available_isas()) {
        for (const bool norm : {false, true}) {
            check_tap(isa, 48, 8, 40, norm);
            check_tap(isa, 300, 0, 300, norm);
            check_tap(isa, 17, 0, 1, norm);
        }
        std::printf("%s done\n", isa_name(isa));
    }
    check_refused();
    return checked();
}
