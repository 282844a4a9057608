"""Tokenizers of real models against transformers, and folders that transformers wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from random_texts import random_texts

from nybble.formats.gguf.reader import GGUFFile
from nybble.text.tokenizer import FolderTokenizerSource, GGUFTokenizerSource, Tokenizer

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.oracle, pytest.mark.real_model]

TEXTS = random_texts(1000, seed=7)


def ours(path: Path) -> Tokenizer:
    return GGUFTokenizerSource(GGUFFile.open(path).metadata).build()


def theirs(path: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def same(tokenizer: Tokenizer, oracle: Any, texts: list[str]) -> None:
    for text in texts:
        ids = tokenizer.encode(text, add_special=False)
        assert ids == oracle.encode(text, add_special_tokens=False), repr(text)
        assert tokenizer.decode(ids) == text


def with_digits_split(oracle: Any) -> Any:
    """transformers builds every gpt2 tokenizer of a GGUF file alike and drops the digit splitting that
    ``tokenizer.ggml.pre = smollm`` stands for. SmolLM2's own tokenizer.json has Digits before ByteLevel,
    llama.cpp splits digits as well and gives our ids on all of these texts."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    oracle.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    return oracle


@pytest.mark.slow
def test_smollm2_equals_transformers(smollm2_path: Path) -> None:
    same(ours(smollm2_path), with_digits_split(theirs(smollm2_path)), TEXTS)


@pytest.mark.slow
def test_smollm2_differs_from_transformers_only_where_digits_follow_space(smollm2_path: Path) -> None:
    tokenizer, oracle = ours(smollm2_path), theirs(smollm2_path)
    same(tokenizer, oracle, [text for text in TEXTS if not any(c.isnumeric() for c in text)])
    # llama.cpp's ids for this text; transformers, without digit splitting, says [198, 216, 33, 37].
    assert tokenizer.encode("\n 15", add_special=False) == [3805, 33, 37]


@pytest.mark.slow
def test_gemma3_equals_transformers(gemma3_path: Path) -> None:
    same(ours(gemma3_path), theirs(gemma3_path), TEXTS)


@pytest.mark.slow
def test_gemma3_special_tokens(gemma3_path: Path) -> None:
    tokenizer = ours(gemma3_path)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<bos>", "<eos>")
    assert tokenizer.encode("") == [2]
    assert {1, 106} <= tokenizer.eos_ids
    # U+2581 is how the vocabulary spells a space; llama.cpp gives these ids for it in raw text.
    assert tokenizer.decode(tokenizer.encode("a▁b", add_special=False)) == "a b"


@pytest.mark.slow
def test_folder_equals_gguf(smollm2_path: Path, tmp_path: Path) -> None:
    oracle = with_digits_split(theirs(smollm2_path))
    oracle.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    folder, gguf = FolderTokenizerSource(tmp_path).build(), ours(smollm2_path)
    assert folder.vocab_size == gguf.vocab_size
    assert (folder.bos_id, folder.eos_id, folder.pad_id) == (gguf.bos_id, gguf.eos_id, gguf.pad_id)
    assert folder.eos_ids == {0, 2}
    for text in [*TEXTS[:300], "<|im_start|>user\nHi<|im_end|>\n"]:
        for parse_special in (True, False):
            options = {"add_special": False, "parse_special": parse_special}
            ids = folder.encode(text, **options)
            assert ids == gguf.encode(text, **options), repr(text)
            assert folder.decode(ids, skip_special=False) == text
    assert folder.token_bytes(folder.encode(" the")[0]) == b" the"
