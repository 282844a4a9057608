"""The loop: streaming, ends, cancelling, several choices, prefix reuse. On a toy model."""

from __future__ import annotations

import gc
import itertools
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.errors import ContextLengthError, NybbleError, OutOfMemoryError
from nybble.generate.candidates import log_softmax
from nybble.generate.prefix_cache import common_prefix
from nybble.model import Model
from support.toy import BOT, END, TEXT_VOCAB, ScriptSession, ToySession, toy_template, toy_tokenizer


def toy(**session):
    """A model whose text is random, from all tokens before."""
    return Model(ToySession(vocab_size=64, **session))


def says(answer, **options):
    """A model that answers every prompt with this text."""
    data = answer.encode() if isinstance(answer, str) else answer
    return Model(
        ScriptSession(lambda prompt: data), tokenizer=toy_tokenizer(), render=toy_template, **options
    )


HI = [{"role": "user", "content": "hi"}]
GREEDY = {"temperature": 0}


# -- text and ends ----------------------------------------------------------------------------------


def test_an_answer_ends_with_the_end_token():
    reply = says("Hello, wörld 🙂").chat(HI, **GREEDY)
    assert reply.text == "Hello, wörld 🙂"
    assert reply.finish_reason == "stop"
    assert reply.choices[0].stop == END
    assert reply.token_ids == (*"Hello, wörld 🙂".encode(), END)
    assert reply.usage.completion_tokens == len(reply.token_ids)
    assert reply.usage.prompt_tokens == 6
    assert reply.usage.total_tokens == 6 + len(reply.token_ids)


def test_greedy_takes_the_most_probable_token_after_all_tokens_before():
    session = ToySession()
    tokens = [1, 2, 3]
    reply = Model(session).complete(tokens, temperature=0, max_tokens=10)
    for token in reply.token_ids:
        assert token == int(session.row(tokens).argmax())
        tokens.append(token)
    assert len(reply.token_ids) == 10
    assert reply.finish_reason == "length"


def test_a_stream_never_gives_half_a_character():
    stream = says("aé🙂b").stream_chat(HI, **GREEDY)
    assert list(stream) == ["a", "é", "🙂", "b"]
    assert stream.reply.text == "aé🙂b"


def test_half_a_character_at_the_end_becomes_a_replacement_character():
    assert says("é".encode()[:1]).chat(HI, **GREEDY).text == "\ufffd"
    assert says("aé").chat(HI, max_tokens=2, **GREEDY).text == "a\ufffd"


@settings(max_examples=40, deadline=None)
@given(
    st.text(alphabet="ab é<", max_size=12),
    st.lists(st.text(alphabet="ab é<", min_size=1, max_size=4), max_size=3),
    st.integers(1, 20),
)
def test_streamed_pieces_are_the_text_and_stop_strings_end_it(answer, stops, max_tokens):
    model = says(answer)
    stream = model.stream_chat(HI, stop=stops, max_tokens=max_tokens, **GREEDY)
    pieces = list(stream)
    assert "" not in pieces
    assert (
        "".join(pieces)
        == stream.reply.text
        == model.chat(HI, stop=stops, max_tokens=max_tokens, **GREEDY).text
    )
    assert not any(stop in stream.reply.text for stop in stops)
    found = stream.reply.choices[0].stop
    if isinstance(found, str):
        assert stream.reply.finish_reason == "stop"
        assert answer.startswith(stream.reply.text + found)


def test_text_held_back_for_a_stop_string_comes_out_at_the_end():
    reply = says("ab</e").chat(HI, stop="</end>", **GREEDY)
    assert (reply.text, reply.finish_reason) == ("ab</e", "stop")
    reply = says("ab</end>").chat(HI, stop="</end>", max_tokens=4, **GREEDY)
    assert (reply.text, reply.finish_reason) == ("ab</", "length")


def test_text_held_back_comes_before_half_a_character():
    reply = says(b"a</e\xc3").chat(HI, stop="</end>", **GREEDY)
    assert (reply.text, reply.finish_reason) == ("a</e\ufffd", "stop")


def test_the_space_that_begins_a_continuation_is_kept():
    # Tokenizers with a space prefix take the first space away, but only at the start of a text.
    session = ToySession(vocab_size=TEXT_VOCAB)
    session.row = lambda tokens: np.eye(TEXT_VOCAB, dtype=np.float32)[[*b"once upon", END][len(tokens) - 1]]
    model = Model(session, tokenizer=toy_tokenizer(space_prefix=True), render=toy_template)
    assert model.generate("once", **GREEDY) == " upon"
    session = ScriptSession(lambda prompt: b" hello")
    model = Model(session, tokenizer=toy_tokenizer(space_prefix=True), render=toy_template)
    assert model.chat(HI, **GREEDY).text == "hello"


def test_stop_tokens():
    reply = says("abc").chat(HI, stop_tokens=[ord("b")], **GREEDY)
    assert (reply.text, reply.finish_reason, reply.choices[0].stop) == ("a", "stop", ord("b"))
    with pytest.raises(ValueError, match="stop_tokens: token id 999 is not in the vocabulary of 261"):
        says("abc").chat(HI, stop_tokens=[999])


def test_ignore_eos_and_min_tokens_forbid_the_end():
    reply = says("ab").chat(HI, ignore_eos=True, max_tokens=9, **GREEDY)
    assert END not in reply.token_ids
    assert reply.finish_reason == "length"
    reply = says("ab").chat(HI, min_tokens=4, max_tokens=9, **GREEDY)
    # The toy wants to end after two tokens and at each one after them.
    assert reply.token_ids.index(END) == 4


def test_a_full_context_ends_the_text():
    reply = toy(context_length=10).complete([1] * 4, max_tokens=50)
    assert reply.finish_reason == "context"
    assert len(reply.token_ids) == 7  # the last one needs no room
    reply = toy(context_length=10).complete([1] * 10, max_tokens=50)
    assert (reply.finish_reason, len(reply.token_ids)) == ("context", 1)


def test_what_cannot_run_is_refused_at_once():
    model = toy(context_length=10)
    with pytest.raises(ContextLengthError, match="the prompt has 11 tokens and the context holds 10"):
        model.stream([1] * 11)
    with pytest.raises(ValueError, match="the prompt has no tokens"):
        model.stream([])
    with pytest.raises(ValueError, match="token id 64 is not in the vocabulary of 64"):
        model.stream([1, 64])
    with pytest.raises(TypeError, match="did you mean temperature"):
        model.stream([1], temprature=1)
    assert model.session.calls == []


def test_raw_text_ends_after_256_tokens_unless_told_otherwise():
    assert len(toy(context_length=1000).complete([1]).token_ids) == 256
    assert len(toy(context_length=1000).complete([1], max_tokens=None).token_ids) == 1000


def test_padding_of_the_logits_is_never_drawn():
    session = ScriptSession(lambda prompt: b"ab")
    row = session.row
    session.vocab_size = TEXT_VOCAB + 11
    session.row = lambda tokens: np.append(row(tokens), np.full(11, 99, dtype=np.float32))
    model = Model(session, tokenizer=toy_tokenizer(), render=toy_template)
    assert model.chat(HI, temperature=0).text == "ab"
    assert max(model.chat(HI, temperature=2, top_k=0, ignore_eos=True, max_tokens=50).token_ids) < TEXT_VOCAB


# -- laziness and cancelling ------------------------------------------------------------------------


def test_nothing_is_computed_before_it_is_asked_for():
    model = toy()
    stream = model.start([1, 2, 3], max_tokens=20)
    assert model.session.calls == []
    next(stream)
    assert model.session.calls == [(3,)]
    next(stream)
    assert model.session.calls == [(3,), (1,)]


@pytest.mark.parametrize("how", ["close", "with", "drop"])
def test_closing_or_dropping_a_stream_stops_and_frees(how):
    model = says("abcdefgh")
    stream = model.stream("<bot>", **GREEDY)
    assert next(stream) == "a"
    calls = len(model.session.calls)
    if how == "close":
        stream.close()
        assert list(stream) == []
        assert (stream.reply.text, stream.reply.finish_reason) == ("a", "cancelled")
        stream.close()
    elif how == "with":
        with stream:
            pass
    else:
        gc.disable()  # it must not need a collection
        try:
            del stream
        finally:
            gc.enable()
    assert len(model.session.calls) == calls
    assert model.session.open_sequences == 0


def test_a_stream_dropped_before_its_start_costs_nothing():
    model = toy()
    model.stream([1]).close()
    del model
    gc.collect()


def test_the_reply_of_a_running_stream_is_an_error():
    stream = says("abc").stream("<bot>")
    next(stream)
    with pytest.raises(NybbleError, match="still runs"):
        _ = stream.reply


def test_cancel_from_another_thread_stops_a_prefill_in_its_chunk():
    session = ToySession(context_length=100)
    model = Model(session, prefill_chunk=8)

    def on_third_chunk(session):
        if len(session.calls) == 2:
            threading.Thread(target=model.cancel).start()
            session.wait_for_cancel()

    session.before_forward = on_third_chunk
    reply = model.complete([1] * 50)
    assert (reply.text, reply.finish_reason, reply.token_ids) == ("", "cancelled", ())
    assert session.calls == [(8,), (8,)]
    assert session.open_sequences == 0


def test_cancel_while_decoding_keeps_what_was_said():
    session = ScriptSession(lambda prompt: b"abcdefgh")
    model = Model(session, tokenizer=toy_tokenizer(), render=toy_template)

    def on_fourth(session):
        if len(session.calls) == 3:
            threading.Thread(target=model.cancel).start()
            session.wait_for_cancel()

    session.before_forward = on_fourth
    reply = model.chat(HI, **GREEDY)
    assert (reply.text, reply.finish_reason) == ("abc", "cancelled")
    session.before_forward = None
    assert model.chat(HI, **GREEDY).text == "abcdefgh"


def test_cancelling_one_generation_leaves_the_others():
    model = says("abcdefgh")
    first, second = model.stream("<bot>", **GREEDY), model.stream("<user><bot>", **GREEDY)
    assert (next(first), next(second)) == ("a", "a")
    first.cancel()
    assert list(first) == []
    assert first.reply.finish_reason == "cancelled"
    assert "".join(second) == "bcdefgh"


def test_a_cancel_that_hits_the_wrong_forward_is_made_up_for():
    session = ToySession()
    model = Model(session)
    expected = Model(ToySession()).complete([1, 2], max_tokens=5, seed=1)
    hits = []

    def stray_cancel(session):
        if len(session.calls) == 2 and not hits:
            hits.append(1)
            session.cancel()

    session.before_forward = stray_cancel
    reply = model.complete([1, 2], max_tokens=5, seed=1)
    assert hits
    assert reply.token_ids == expected.token_ids


def test_closing_from_another_thread_while_it_computes():
    session = ScriptSession(lambda prompt: b"abcdefgh")
    model = Model(session, tokenizer=toy_tokenizer())
    stream = model.stream("<bot>", **GREEDY)

    def close_it(session):
        if len(session.calls) == 2:
            threading.Thread(target=stream.close).start()
            session.wait_for_cancel()

    session.before_forward = close_it
    assert "".join(stream) == "ab"
    assert stream.reply.finish_reason == "cancelled"
    assert session.open_sequences == 0


# -- several at once --------------------------------------------------------------------------------


def test_threads_share_a_model():
    model = toy(context_length=200)
    prompts = [[i, i + 1] for i in range(8)]
    expected = [Model(ToySession()).complete(p, seed=3, max_tokens=30).token_ids for p in prompts]
    results = [None] * len(prompts)

    def work(i):
        results[i] = model.complete(prompts[i], seed=3, max_tokens=30).token_ids

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == expected
    assert model.session.open_sequences == 0


def test_n_computes_the_prompt_once_and_decodes_in_one_batch():
    model = toy()
    reply = model.complete([1, 2, 3], n=3, seed=7, max_tokens=4)
    assert model.session.calls == [(3,), (1, 1, 1), (1, 1, 1), (1, 1, 1)]
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert len({choice.token_ids for choice in reply.choices}) == 3
    assert reply.usage.completion_tokens == 12
    assert model.session.open_sequences == 0


def test_a_choice_does_not_depend_on_the_others():
    alone = toy().complete([1, 2], seed=7, max_tokens=20)
    two = toy().complete([1, 2], seed=7, n=2, max_tokens=20)
    five = toy().complete([1, 2], seed=7, n=5, max_tokens=20)
    assert alone.choices[0] == two.choices[0] == five.choices[0]
    assert two.choices[1] == five.choices[1]


def test_choices_that_end_early_leave_the_batch():
    stop = toy().complete([1, 2], seed=7, n=3, max_tokens=20).choices[1].token_ids[2]
    model = toy()
    reply = model.complete([1, 2], seed=7, n=3, max_tokens=20, stop_tokens=[stop])
    assert {choice.finish_reason for choice in reply.choices} >= {"stop"}
    sizes = [len(call) for call in model.session.calls[1:]]
    assert sizes[0] == 3
    assert sizes == sorted(sizes, reverse=True)
    assert sum(sizes) == sum(len(c.token_ids) - 1 for c in reply.choices)


def test_closing_several_choices_frees_all():
    model = toy()
    generation = model.start([1, 2], n=3, max_tokens=20)
    for _ in range(4):
        next(generation)
    assert model.session.open_sequences == 3
    generation.close()
    assert model.session.open_sequences == 0


def test_the_seed_of_a_reply_repeats_it():
    first = toy().complete([1], max_tokens=20)
    assert toy().complete([1], max_tokens=20, seed=first.seed).token_ids == first.token_ids
    assert toy().complete([1], max_tokens=20).token_ids != first.token_ids


# -- numbers ----------------------------------------------------------------------------------------


def test_logprobs_come_from_the_models_own_logits():
    session = ToySession()
    reply = Model(session).complete(
        [1], max_tokens=5, logprobs=3, temperature=5.0, logit_bias={0: 3.0}, seed=1
    )
    tokens = [1]
    for token, entry in zip(reply.token_ids, reply.logprobs, strict=True):
        expected = log_softmax(session.row(tokens))
        assert entry.token == token
        assert entry.logprob == pytest.approx(expected[token])
        best = np.argsort(-expected, kind="stable")[:3]
        assert [t for t, _ in entry.top] == best.tolist()
        assert [p for _, p in entry.top] == pytest.approx(expected[best].tolist())
        tokens.append(token)
    assert Model(session).complete([1], max_tokens=2).logprobs is None
    assert Model(session).complete([1], max_tokens=2, logprobs=0).logprobs[0].top == ()


def test_logits_in_chunks():
    session = ToySession(context_length=30)
    model = Model(session, prefill_chunk=8)
    tokens = list(range(20))
    logits = model.logits(tokens)
    assert logits.shape == (20, 64)
    assert logits.dtype == np.float32
    np.testing.assert_array_equal(logits, [session.row(tokens[: i + 1]) for i in range(20)])
    assert session.calls == [(8,), (8,), (4,)]
    assert session.open_sequences == 0
    with pytest.raises(ContextLengthError):
        model.logits([1] * 31)


def test_timings_leave_out_the_consumers_time():
    import time

    stream = says("abc").stream("<bot>", **GREEDY)
    for _ in stream:
        time.sleep(0.05)
    timings = stream.reply.timings
    assert timings.prefill + timings.decode < 0.1
    assert (timings.prefill_tokens, timings.decode_tokens) == (2, 4)
    assert timings.decode_tokens_per_second == pytest.approx(4 / timings.decode)


# -- prefix reuse -----------------------------------------------------------------------------------


def conversation(model, turns, **options):
    messages, replies = [], []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        replies.append(model.chat(messages, **options))
        messages.append({"role": "assistant", "content": replies[-1].text})
    return replies


def echo(prompt):
    """Answers the last message in capitals, so that an answer shows what was read."""
    text = bytes(t for t in prompt if t < 256)
    return text[-6:].upper()


def test_a_chat_that_goes_on_reuses_its_tokens():
    model = Model(ScriptSession(echo), tokenizer=toy_tokenizer(), render=toy_template)
    replies = conversation(model, ["one", "two", "three"], **GREEDY)
    fresh = Model(ScriptSession(echo), tokenizer=toy_tokenizer(), render=toy_template)
    expected = conversation(fresh, ["one", "two", "three"], reuse_prefix=False, **GREEDY)
    assert [r.token_ids for r in replies] == [r.token_ids for r in expected]
    assert replies[0].usage.cached_tokens == 0
    # Everything but the end token that was drawn last, the new turn and the mark after it.
    for before, after in itertools.pairwise(replies):
        assert after.usage.cached_tokens == before.usage.total_tokens - 1
    assert [r.usage.cached_tokens for r in expected] == [0, 0, 0]
    assert model.session.open_sequences == 1
    model.forget()
    assert model.session.open_sequences == 0


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=8), st.integers(1, 3)
)
def test_reuse_equals_a_fresh_result(prompts, capacity):
    model = Model(ToySession(), cached_sequences=capacity)
    for prompt in prompts:
        reply = model.complete(prompt, seed=1, max_tokens=3, top_k=3, reuse_prefix=True)
        assert (
            reply.token_ids == Model(ToySession()).complete(prompt, seed=1, max_tokens=3, top_k=3).token_ids
        )
        assert reply.usage.cached_tokens + reply.timings.prefill_tokens == len(prompt)
    assert model.session.open_sequences <= capacity
    model.forget()
    assert model.session.open_sequences == 0


def test_asking_the_same_again_computes_no_prompt():
    model = toy()
    first = model.complete([1, 2, 3], reuse_prefix=True, max_tokens=2, seed=1)
    del model.session.calls[:]
    again = model.complete([1, 2, 3], reuse_prefix=True, max_tokens=2, seed=1)
    assert again.token_ids == first.token_ids
    assert again.usage.cached_tokens == 3
    assert model.session.calls == [(1,)]


def test_two_conversations_in_turn_keep_their_tokens():
    model = Model(ToySession(), cached_sequences=2)
    a, b = [1, 2, 3], [1, 9, 9]
    model.complete(a, reuse_prefix=True, max_tokens=1)
    assert model.complete(b, reuse_prefix=True, max_tokens=1).usage.cached_tokens == 1
    assert model.complete([*a, 4], reuse_prefix=True, max_tokens=1).usage.cached_tokens == 3
    assert model.complete([*b, 4], reuse_prefix=True, max_tokens=1).usage.cached_tokens == 3
    assert model.session.open_sequences == 2


def test_raw_text_is_not_reused_unless_asked_for():
    model = toy()
    model.complete([1, 2, 3], max_tokens=1)
    assert model.complete([1, 2, 3, 4], max_tokens=1).usage.cached_tokens == 0
    assert model.session.open_sequences == 0


def test_a_device_that_can_keep_less_or_nothing_is_believed(monkeypatch):
    from support.toy import ToySequence

    expected = toy().complete([1, 2, 3, 4, 5], max_tokens=3, seed=1).token_ids
    for keep in (2, 0, None):
        model = toy()
        model.complete([1, 2, 3, 9, 9], max_tokens=1, reuse_prefix=True)

        def truncate(self, length, keep=keep):
            if keep is None:
                raise NybbleError("those pages are gone")
            del self._tokens[min(keep, length) :]

        with monkeypatch.context() as patch:
            patch.setattr(ToySequence, "truncate", truncate)
            reply = model.complete([1, 2, 3, 4, 5], max_tokens=3, seed=1, reuse_prefix=True)
        assert reply.token_ids == expected
        assert reply.usage.cached_tokens == (keep or 0)
        assert model.session.open_sequences == 1


def test_cached_prefixes_make_room_when_memory_is_short():
    model = toy()
    model.complete([1, 2], max_tokens=1, reuse_prefix=True)
    model.session.most_sequences = 1
    assert len(model.complete([3], max_tokens=2).token_ids) == 2
    model.session.most_sequences = 0
    with pytest.raises(OutOfMemoryError):
        model.complete([3], max_tokens=2)
    assert model.session.open_sequences == 0


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_common_prefix(a, b):
    n = common_prefix(a, b)
    assert a[:n] == b[:n]
    assert n in (len(a), len(b)) or a[n] != b[n]


# -- closing ----------------------------------------------------------------------------------------


def test_a_closed_model_says_so():
    with toy() as model:
        model.complete([1], max_tokens=1, reuse_prefix=True)
        stream = model.start([1])
        next(stream)
    model.close()
    assert model.session.closed
    with pytest.raises(NybbleError, match="the model is closed"):
        model.complete([1])
    assert [piece.finish_reason for piece in stream] == ["cancelled"]
    assert stream.reply.finish_reason == "cancelled"


def test_bot_mark_is_the_end_of_the_prompt():
    assert says("a").encode_chat(HI)[-1] == BOT
