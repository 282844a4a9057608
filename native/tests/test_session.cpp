// Sessions without Python: a small plan by hand, several threads, forks, windows, cancelling, and
// closing sequences while a batch runs. Run under sanitizers.
#include "core/session.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "kernels/float_kernels.h"
#include "tests/check.h"

using namespace nybble;

namespace {

constexpr int64_t kHidden = 64, kMlp = 96, kHeads = 4, kKvHeads = 2, kHeadDim = 32, kVocabulary = 37;
constexpr int64_t kQuery = kHeads * kHeadDim, kKey = kKvHeads * kHeadDim;

// Two blocks, one with a window of 20 keys; float32 and q8_0 weights. Owns the weights' memory.
struct Model {
    Plan plan;
    std::vector<std::vector<uint8_t>> memory;

    int32_t weight(Encoding encoding, int64_t rows, int64_t columns) {
        std::vector<uint8_t> bytes(row_bytes(encoding, columns) * static_cast<size_t>(rows));
        std::normal_distribution<float> normal(0.0F, 1.0F / std::sqrt(static_cast<float>(columns)));
        if (encoding == Encoding::f32) {
            for (size_t i = 0; i < bytes.size(); i += 4) {
                const float value = normal(random);
                std::memcpy(bytes.data() + i, &value, 4);
            }
        } else {
            for (size_t i = 0; i < bytes.size(); i += 34) {
                const uint16_t scale = 0x1400;  // 2^-10
                std::memcpy(bytes.data() + i, &scale, 2);
                for (size_t j = 2; j < 34; ++j) {
                    bytes[i + j] = static_cast<uint8_t>(random() & 0xff);
                }
            }
        }
        memory.push_back(std::move(bytes));
        plan.weights.push_back({encoding, rows, columns, memory.back().data(), row_bytes(encoding, columns)});
        return static_cast<int32_t>(plan.weights.size()) - 1;
    }

    int32_t buffer(int64_t width, bool selected) {
        plan.buffers.push_back(width);
        plan.buffer_selected.push_back(selected);
        return static_cast<int32_t>(plan.buffers.size()) - 1;
    }

    Model() {
        plan.vocab_size = kVocabulary;
        plan.context_length = 1000;
        plan.vectors.push_back(std::vector<float>(kHidden, 1.1F));
        plan.vectors.push_back(std::vector<float>(kHeadDim, 0.9F));
        plan.vectors.push_back(std::vector<float>(kHidden, 0.05F));
        Rope rope;
        rope.rotary_dim = kHeadDim;
        for (auto& frequencies : rope.inverse_frequency) {
            for (int64_t i = 0; i < kHeadDim / 2; ++i) {
                frequencies.push_back(std::pow(10000.0F, -2.0F * static_cast<float>(i) / kHeadDim));
            }
        }
        plan.ropes.push_back(rope);
        plan.groups.push_back({20, 1, kKvHeads, kHeadDim});
        plan.groups.push_back({0, 1, kKvHeads, kHeadDim});
        const Norm norm = {0, 1e-6F, 0.0F};
        const Norm head_norm = {1, 1e-6F, 0.0F};
        const View nothing;
        const View x = {buffer(kHidden, false), 0};
        const View gated = {buffer(kMlp, false), 0};
        const int32_t qkv = buffer(kQuery + 2 * kKey, false);
        const View chosen = {buffer(kHidden, true), 0};
        const int32_t table = weight(Encoding::f32, kVocabulary, kHidden);
        plan.ops.push_back({EmbeddingOp{table, 2.0F, x}, false});
        for (int64_t layer = 0; layer < 2; ++layer) {
            const Encoding encoding = layer == 0 ? Encoding::f32 : Encoding::q8_0;
            LinearOp projection{x, kHidden, norm, false, Activation::silu, {}};
            projection.parts.push_back({weight(encoding, kQuery + 2 * kKey, kHidden),
                                        0,
                                        kQuery + 2 * kKey,
                                        {qkv, 0},
                                        kNone,
                                        nothing});
            plan.ops.push_back({projection, false});
            AttentionOp attention;
            attention.q = {qkv, 0};
            attention.k = {qkv, kQuery};
            attention.v = {qkv, kQuery + kKey};
            attention.out = {qkv, 0};  // over the queries
            attention.heads = kHeads;
            attention.kv_heads = kKvHeads;
            attention.head_dim = kHeadDim;
            attention.group = layer;
            attention.window = layer == 0 ? 20 : 0;
            attention.scale = 0.18F;
            attention.softcap = layer == 0 ? 5.0F : 0.0F;
            attention.q_norm = head_norm;
            attention.k_norm = head_norm;
            attention.rope = 0;
            plan.ops.push_back({attention, false});
            LinearOp out{{qkv, 0}, kQuery, Norm{}, false, Activation::silu, {}};
            out.parts.push_back(
                {weight(encoding, kHidden, kQuery), 0, kHidden, x, 2, x});  // bias, residual in place
            plan.ops.push_back({out, false});
            LinearOp gate{x, kHidden, norm, true, Activation::gelu_tanh, {}};
            gate.parts.push_back({weight(encoding, kMlp, kHidden), 0, kMlp, gated, kNone, nothing});
            gate.parts.push_back({weight(encoding, kMlp, kHidden), 0, kMlp, gated, kNone, nothing});
            plan.ops.push_back({gate, false});
            LinearOp down{gated, kMlp, Norm{}, false, Activation::silu, {}};
            down.parts.push_back({weight(encoding, kHidden, kMlp), 0, kHidden, x, kNone, x});
            plan.ops.push_back({down, false});
        }
        plan.ops.push_back({SelectOp{x, chosen, kHidden}, true});
        LinearOp logits{chosen, kHidden, norm, false, Activation::silu, {}};
        logits.parts.push_back({table, 0, kVocabulary, {kOutput, 0}, kNone, nothing});
        plan.ops.push_back({logits, true});
        ElementwiseOp cap;
        cap.kind = ElementwiseKind::softcap;
        cap.a = cap.out = {kOutput, 0};
        cap.width = kVocabulary;
        cap.factor = 30.0F;
        plan.ops.push_back({cap, true});
    }

    std::mt19937 random{7};
};

std::vector<int32_t> token_ids(size_t count, uint32_t seed) {
    std::mt19937 random(seed);
    std::vector<int32_t> ids(count);
    for (int32_t& id : ids) {
        id = static_cast<int32_t>(random() % kVocabulary);
    }
    return ids;
}

using Logits = std::vector<float>;

Logits run(Session& session, const std::vector<ForwardItem>& items) {
    Logits output(static_cast<size_t>(Session::output_rows(items) * kVocabulary), NAN);
    session.forward(items, output.data());
    return output;
}

Logits feed(Session& session, KvSequence& sequence, const std::vector<int32_t>& ids, size_t first,
            size_t last) {
    return run(session,
               {{&sequence, ids.data() + first, static_cast<int64_t>(last - first), LogitRows::last, 0}});
}

Logits fresh(Session& session, const std::vector<int32_t>& ids) {
    auto sequence = session.new_sequence();
    return feed(session, *sequence, ids, 0, ids.size());
}

bool close_to(const Logits& a, const Logits& b, float tolerance) {
    bool good = a.size() == b.size() && !a.empty();
    for (size_t i = 0; good && i < a.size(); ++i) {
        good = std::fabs(a[i] - b[i]) <= tolerance;  // false for NaN
    }
    return good;
}

void check_session(const Plan& plan, Isa isa, bool precise, KvEncoding kv) {
    const std::string what = std::string(isa_name(isa)) + (precise ? ", float32" : ", fast");
    const float tolerance = precise && kv == KvEncoding::f32 ? 1e-4F : 0.5F;
    SessionOptions options;
    options.threads = 3;
    options.kv_encoding = kv;
    options.max_rows = 48;
    options.precise = precise;
    options.isa = isa;
    Session session(plan, options);
    const std::vector<int32_t> ids = token_ids(300, 1);
    const Logits expected = fresh(session, ids);

    // In pieces, with a fork that goes another way at every step.
    auto sequence = session.new_sequence();
    Logits last;
    size_t done = 0;
    for (const size_t step : {1, 63, 1, 1, 100, 5, 129}) {
        const auto fork = sequence->fork();
        feed(session, *fork, ids, 0, 7);
        last = feed(session, *sequence, ids, done, done + step);
        done += step;
    }
    check(close_to(last, expected, tolerance), what + ": pieces");

    // The same bits with another number of threads.
    options.threads = 1;
    Session single(plan, options);
    check(fresh(single, ids) == expected, what + ": threads");

    // Ragged: a prompt, two decodes, nothing at all.
    auto a = session.new_sequence();
    auto b = sequence->fork();
    auto c = session.new_sequence();
    const Logits ragged = run(session, {{a.get(), ids.data(), 70, LogitRows::all, 0},
                                        {b.get(), ids.data(), 1, LogitRows::last, 0},
                                        {c.get(), ids.data(), 0, LogitRows::last, 0},
                                        {sequence.get(), ids.data(), 1, LogitRows::none, 0}});
    check(ragged.size() == 71 * kVocabulary, what + ": rows");
    std::vector<int32_t> longer = ids;
    longer.push_back(ids[0]);
    check(close_to(Logits(ragged.end() - kVocabulary, ragged.end()), fresh(session, longer), tolerance),
          what + ": decode beside a prompt");

    // Cut back: the window's pages are gone, then they are not.
    check(!b->truncate(10), what + ": truncate behind the window");
    check(a->truncate(69), what + ": truncate");
    check(close_to(feed(session, *a, ids, 69, 71), fresh(session, token_ids(71, 1)), tolerance),
          what + ": cut back");

    // Other threads fork and close their own sequences, and look at the numbers, all the while.
    std::vector<std::unique_ptr<KvSequence>> others;
    for (int i = 0; i < 20; ++i) {
        others.push_back(sequence->fork());
    }
    std::atomic<bool> stop{false};
    std::thread closer([&] {
        while (!stop && !others.empty()) {
            const auto fork = others.back()->fork();
            others.pop_back();
            check(session.cache().bytes_in_use() > 0, what + ": bytes in use");
        }
    });
    const Logits beside = fresh(session, ids);
    stop = true;
    closer.join();
    others.clear();
    check(beside == expected, what + ": beside closing threads");

    // Cancel, again and again, from another thread.
    auto victim = session.new_sequence();
    feed(session, *victim, ids, 0, 10);
    int cancelled = 0;
    for (int i = 0; i < 5; ++i) {
        std::atomic<bool> over{false};
        std::thread canceller([&] {
            while (!over) {
                session.cancel();
                std::this_thread::yield();
            }
        });
        try {
            feed(session, *victim, ids, 10, 300);
            check(victim->truncate(10), what + ": was not cancelled");
        } catch (const ForwardCancelled&) {
            ++cancelled;
        }
        over = true;
        canceller.join();
        check(victim->length() == 10 || victim->length() == 0, what + ": length after cancelling");
        if (victim->length() == 0) {
            feed(session, *victim, ids, 0, 10);
        }
    }
    check(cancelled > 0, what + ": never cancelled");
    check(close_to(feed(session, *victim, ids, 10, 300), expected, tolerance), what + ": after cancelling");

    // Invalid ids leave the sequence alone.
    const int32_t wrong = kVocabulary;
    bool thrown = false;
    try {
        run(session, {{victim.get(), &wrong, 1, LogitRows::last, 0}});
    } catch (const std::out_of_range&) {
        thrown = true;
    }
    check(thrown && victim->length() == 300, what + ": id outside the vocabulary");

    for (auto* one : {&a, &b, &c, &sequence, &victim}) {
        one->reset();
    }
    check(session.cache().bytes_in_use() == 0, what + ": all pages given back");
}

void check_limit(const Plan& plan) {
    SessionOptions options;
    options.threads = 2;
    options.kv_encoding = KvEncoding::f32;
    options.precise = true;
    options.kv_limit_bytes = 4 * plan.groups[0].page_bytes(KvEncoding::f32);
    Session session(plan, options);
    const std::vector<int32_t> ids = token_ids(130, 1);
    auto sequence = session.new_sequence();
    feed(session, *sequence, ids, 0, 50);
    bool full = false;
    try {
        feed(session, *sequence, ids, 50, 130);
        feed(session, *sequence, ids, 0, 130);
    } catch (const CacheFull&) {
        full = true;
    }
    check(full, "the limit is kept");
    check(session.cache().bytes_allocated() <= options.kv_limit_bytes, "no more than the limit");
}

}  // namespace

int main() {
    Model model;
    const FloatKernels* before = nullptr;
    for (const Isa isa : available_isas()) {
        // What reads and writes the cache is the level's before: only products with weights are new.
        const FloatKernels* kernels = float_kernels(isa);
        const bool shared = kernels == before;
        before = kernels;
        for (const bool precise : {true, false}) {
            for (const KvEncoding kv :
                 {KvEncoding::f32, KvEncoding::f16, KvEncoding::q8_0, KvEncoding::q4_0}) {
                if (shared && kv != KvEncoding::f16) continue;
                // Codes of few bits answer to differences of rounding; here only that all goes well matters.
                check_session(model.plan, isa, precise, kv);
            }
        }
        std::printf("%s done\n", isa_name(isa));
    }
    check_limit(model.plan);
    return checked();
}
