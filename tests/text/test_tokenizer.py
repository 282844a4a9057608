"""Tokenizers from GGUF metadata: llama.cpp's vectors, special tokens, decoding, refusals."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_texts import random_texts
from vocabularies import NAMES, metadata, tokenizer, vectors

from nybble.errors import FormatError, UnsupportedError
from nybble.text.pretokenizers import PRE_TOKENIZERS
from nybble.text.tokenizer import GGUFTokenizerSource

LOSSLESS = [name for name in NAMES if name != "bert-bge"]
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=60)


def changed(name: str, **values: object) -> dict[str, object]:
    keys = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    return {key: value for key, value in {**metadata(name), **keys}.items() if value is not None}


@pytest.mark.parametrize("name", NAMES)
def test_llama_cpp_vectors(name: str) -> None:
    built = tokenizer(name)
    for text, expected in vectors(name):
        assert built.encode(text, add_special=False, parse_special=False) == expected, repr(text)


@pytest.mark.parametrize("name", LOSSLESS)
@settings(max_examples=100, deadline=None)
@given(text=TEXT)
def test_round_trip(name: str, text: str) -> None:
    built = tokenizer(name)
    for parse_special in (False, True):
        ids = built.encode(text, add_special=False, parse_special=parse_special)
        if parse_special and any(map(built.is_special, ids)):
            continue  # Hypothesis knows names such as <|endoftext|> from the source; decoding drops them
        assert built.decode(ids) == text


@pytest.mark.parametrize("name", LOSSLESS)
def test_round_trip_of_random_texts(name: str) -> None:
    built = tokenizer(name)
    for text in random_texts(200, seed=1):
        assert built.decode(built.encode(text, parse_special=False)) == text


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_incremental_decoding_is_decoding(name: str, data: st.DataObject) -> None:
    built = tokenizer(name)
    ids = data.draw(st.lists(st.integers(0, built.vocab_size - 1), max_size=30))
    for skip_special in (True, False):
        decoder = built.decoder(skip_special=skip_special)
        pieces = [decoder.add(i) for i in ids]
        assert "".join(pieces) + decoder.finish() == built.decode(ids, skip_special=skip_special)


@pytest.mark.parametrize("name", LOSSLESS)
def test_decoder_never_emits_half_a_character(name: str) -> None:
    text = "a👩🏽‍💻𠮷߷中é\U0010fffd"
    decoder = tokenizer(name).decoder()
    pieces = [decoder.add(i) for i in tokenizer(name).encode(text, add_special=False)]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert "" in pieces  # some character of these is spread over tokens in each vocabulary
    assert decoder.finish() == ""


def test_unfinished_character_becomes_a_replacement_character() -> None:
    built = tokenizer("llama-spm")
    ids = [built.token_id("<0xF0>"), built.token_id("<0x9F>")]
    decoder = built.decoder()
    assert [decoder.add(i) for i in ids if i is not None] == ["", ""]
    assert decoder.finish() == "\ufffd"


def test_untrusted_text_cannot_spell_special_tokens() -> None:
    for name in NAMES:
        built = tokenizer(name)
        steering = [i for i in range(built.vocab_size) if built.is_special(i)]
        assert steering
        for i in steering[:40]:
            text = built.token_text(i)
            ids = built.encode(f"a{text}b{text}", add_special=False, parse_special=False)
            assert not set(ids) & set(steering) - {built.unk_id}, (name, text)
            assert i in built.encode(f"a{text}b", add_special=False)


def test_special_tokens_by_file() -> None:
    llama3, phi3, qwen2 = tokenizer("llama-bpe"), tokenizer("phi-3"), tokenizer("qwen2")
    assert llama3.bos_token == "<|begin_of_text|>" and llama3.encode("") == [llama3.bos_id]
    assert {llama3.token_text(i) for i in llama3.eos_ids} == {"<|end_of_text|>", "<|eot_id|>"}
    assert {phi3.token_text(i) for i in phi3.eos_ids} == {"<|endoftext|>", "<|end|>", "</s>"}
    assert (phi3.bos_id, phi3.unk_id, phi3.pad_id, phi3.eos_id) == (1, 0, 32000, 32000)
    # "</s>" is an ordinary word in Qwen2's vocabulary.
    assert {qwen2.token_text(i) for i in qwen2.eos_ids} == {"<|endoftext|>", "<|im_end|>"}
    assert qwen2.encode("Hi") == qwen2.encode("Hi", add_special=False)
    bert = tokenizer("bert-bge")
    assert bert.encode("hi")[0] == 101 and bert.encode("hi")[-1] == 102
    assert phi3.token_bytes(phi3.encode("\n", add_special=False)[-1]) == b"\n"
    assert llama3.token_bytes(llama3.encode("é", add_special=False)[0]) == "é".encode()
    assert phi3.is_special(32007) and not phi3.is_special(1000)
    assert phi3.decode([1, 32010, 15043, 32007]) == "Hello"
    assert phi3.decode([1, 32010, 15043, 32007], skip_special=False) == "<s><|user|>Hello<|end|>"


def test_phi3_white_space_after_special_tokens_goes() -> None:
    built = tokenizer("phi-3")
    assert built.encode("<|user|>\nHi<|end|>\n \n<|assistant|>") == built.encode(
        "<|user|>Hi<|end|><|assistant|>"
    )
    # ... but stays after these, and before any.
    assert built.decode(built.encode("<|endoftext|>\nHi \n<|end|>"), skip_special=True) == "\nHi \n"


def test_phi3_growing_chat_keeps_its_tokens() -> None:
    built = tokenizer("phi-3")
    text, before = "", []
    for turn in range(6):
        text += f"<|user|>\nQuestion {turn}?  \n<|end|>\n<|assistant|>\n"
        ids = built.encode(text)
        assert ids[: len(before)] == before
        # What the model answers is appended as tokens, the next turn re-tokenizes the text.
        answer = f"Answer 数 {turn}.\n\n  - a list\n<|end|>\n"
        text += answer
        before = built.encode(text)
        assert before[: len(ids)] == ids
        assert before == ids + built.encode(answer, add_special=False)


def test_every_known_pre_tokenizer_builds_and_loses_nothing() -> None:
    sample = "Hello WORLD it's 1234567 ünï भाषा 中文かな 한국어 👩‍💻\r\n\n  \t x+=1; <a> 'LL ſ"
    rows = {row: name for name, row in PRE_TOKENIZERS.items() if row.byte_level}
    assert len(rows) > 25
    for name in rows.values():
        built = GGUFTokenizerSource(changed("gpt-2", pre=name)).build()
        assert built.decode(built.encode(sample, add_special=False)) == sample, name


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("smollm", "a 12 b", ["a", " ", "1", "2", " b"]),
        ("gpt-2", "a 123 b", ["a", " 123", " b"]),
        ("llama3", "a12345'RE x\n\n y", ["a", "123", "45", "'RE", " x", "\n\n", " y"]),
        ("qwen2", "a123!!\n", ["a", "1", "2", "3", "!!\n"]),
        ("gpt-4o", "camelCase'll HTTPServer", ["camel", "Case'll", " HTTPServer"]),
        ("tekken", "camelCase 12", ["camel", "Case", " ", "1", "2"]),
        ("deepseek-v3", "ab中文12345 +x", ["ab", "中文", "123", "45", " +", "x"]),
        ("deepseek-coder", "ab\n12", ["ab", "\n", "1", "2"]),
        ("superbpe", "x 1234567 y", ["x ", "1", "234", "567", " y"]),
        ("afmoe", "12345 1234567", ["12", "345", " ", "1", "234", "567"]),
        ("kimi-k2", "ab中文cd12345", ["ab", "中文", "cd", "123", "45"]),
        ("bloom", "Hi, you  there", ["Hi", ",", " you", " ", " there"]),
        ("default", "a+b 12", ["a", "+", "b", " ", "12"]),
    ],
)
def test_pre_tokenizers_cut(pre: str, text: str, words: list[str]) -> None:
    built = GGUFTokenizerSource(changed("gpt-2", pre=pre)).build()
    cut = built._encoder._runner.pre_tokenizer.pre_tokenize_str(text)  # type: ignore[attr-defined]
    assert [text[start:end] for _, (start, end) in cut] == words


def test_unigram() -> None:
    texts = ["<pad>", "</s>", "<unk>", "▁", "▁he", "llo", "▁hello", "l", "o", "▁world", "h", "e"]
    scores = [0, 0, 0, -3, -4, -4, -5, -6, -6, -5, -7, -7]
    types = [3, 3, 2, *[1] * 9]
    built = GGUFTokenizerSource(
        {
            "tokenizer.ggml.model": "t5",
            "tokenizer.ggml.tokens": texts,
            "tokenizer.ggml.scores": np.array(scores, np.float32),
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.remove_extra_whitespaces": True,
            "tokenizer.ggml.add_space_prefix": True,
        }
    ).build()
    assert [texts[i] for i in built.encode("  hello   world ")] == ["▁hello", "▁world", "</s>"]
    assert [texts[i] for i in built.encode("hex", add_special=False)] == ["▁he", "<unk>"]
    assert built.decode(built.encode("hello world")) == "hello world"
    assert 1 not in built.encode("</s>", add_special=False, parse_special=False)


def test_scored_bpe_merges_best_first_and_falls_back_to_bytes() -> None:
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    texts = [
        "<unk>",
        "<s>",
        "</s>",
        *byte_tokens,
        "▁",
        "a",
        "b",
        "c",
        "ab",
        "bc",
        "▁a",
        "</",
        "s>",
        "<",
        "s",
        ">",
        "/",
    ]
    scores = [0.0] * 259 + [-9, -9, -9, -9, -2, -1, -3, -5, -6, -9, -9, -9, -9]
    types = [2, 3, 3, *[6] * 256, *[1] * 13]
    built = GGUFTokenizerSource(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": texts,
            "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.token_type": types,
        }
    ).build()

    def pieces(text: str, **options: bool) -> list[str]:
        return [texts[i] for i in built.encode(text, add_special=False, **options)]

    assert pieces("abc") == ["▁a", "bc"]
    assert pieces("é") == ["▁", "<0xC3>", "<0xA9>"]
    # "</" and "s>" are tokens, and joined they spell the end token: never from plain text.
    assert pieces("</s>", parse_special=False) == ["▁", "</", "s>"]
    assert pieces("</s>a") == ["</s>", "▁a"]
    assert built.decode(built.encode(" a</s>  b"), skip_special=False) == "<s> a</s>  b"


def test_surrogates_and_unknown_ids() -> None:
    built = tokenizer("gpt-2")
    assert built.decode(built.encode("a\ud800b")) == "a\ufffdb"
    with pytest.raises(IndexError, match="token id 50257 is not in the vocabulary of 50257"):
        built.decode([50257])
    with pytest.raises(IndexError):
        built.token_text(-1)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"pre": "no-such"}, UnsupportedError, "unknown pre-tokenizer 'no-such'.*Known: .*llama-bpe"),
        ({"model": "rwkv"}, UnsupportedError, "unknown tokenizer model 'rwkv'; known: llama, gpt2"),
        ({"model": None}, FormatError, "tokenizer.ggml.model is missing"),
        ({"model": 3}, FormatError, "must be a string, not int"),
        ({"tokens": None}, FormatError, "tokenizer.ggml.tokens is missing"),
        ({"tokens": "abc"}, FormatError, "must be an array of strings"),
        ({"tokens": [1, 2]}, FormatError, "must be an array of strings"),
        ({"tokens": ["a", "b", "a"]}, FormatError, "'a' is twice in the vocabulary"),
        ({"token_type": [1, 1]}, FormatError, "has 2 entries for 50257 tokens"),
        ({"token_type": ["x"] * 50257}, FormatError, "must be an array of numbers"),
        ({"merges": None}, FormatError, "tokenizer.ggml.merges is missing"),
        ({"add_bos_token": True, "bos_token_id": 99999}, FormatError, "wants a bos token"),
        ({"model": "llama"}, FormatError, "tokenizer.ggml.scores is missing"),
        ({"model": "llama", "scores": [0.0]}, FormatError, "has 1 entries"),
    ],
)
def test_broken_metadata_is_refused(values: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GGUFTokenizerSource(changed("gpt-2", **values)).build()


def test_merges_that_cannot_be_used_are_skipped() -> None:
    merges = ["zz9 yy8", "nospace", *list(metadata("gpt-2")["tokenizer.ggml.merges"])]  # type: ignore[call-overload]
    built = GGUFTokenizerSource(changed("gpt-2", merges=merges)).build()
    assert built.encode("Hello world") == tokenizer("gpt-2").encode("Hello world")


def test_importing_and_describing_loads_no_library() -> None:
    code = (
        "import sys, nybble.text.tokenizer as t, nybble.text.chat as c;"
        "t.GGUFTokenizerSource({}); c.ChatTemplate('x');"
        "assert not {'tokenizers', 'jinja2'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
