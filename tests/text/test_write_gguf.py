"""GGUF keys from folders: what came from GGUF returns as it was, the rest encodes the same."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folders import CONFIG, checkpoint, folder, special_texts
from random_texts import random_texts
from vocabularies import NAMES, metadata, tokenizer

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.errors import FormatError, UnsupportedError
from nybble.text.pretokenizer_names import cut, pre_tokenizer_name
from nybble.text.pretokenizers import PRE_TOKENIZERS
from nybble.text.tokenizer import FolderTokenizerSource, GGUFTokenizerSource
from nybble.text.tokenizer_json import split_steps
from nybble.text.write_folder import folder_files
from nybble.text.write_gguf import gguf_tokenizer, gguf_tokenizer_metadata

TEXTS = random_texts(100, seed=11)


def from_folder(path: Path, vocab_size: int, **changes: Any) -> Checkpoint:
    config = dataclasses.replace(CONFIG, vocab_size=vocab_size)
    return Checkpoint(config=config, tensors={}, tokenizer=FolderTokenizerSource(path), **changes)


def size(name: str) -> int:
    return len(metadata(name)["tokenizer.ggml.tokens"])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_gguf_to_folder_to_gguf(name: str, tmp_path: Path) -> None:
    before = metadata(name)
    after = gguf_tokenizer_metadata(from_folder(folder(before, tmp_path), size(name)))
    types = np.array(before["tokenizer.ggml.token_type"])
    if name == "phi-3":
        # An old converter called padding unknown tokens; a folder has one unknown token.
        types[32011:] = 3
    assert after["tokenizer.ggml.tokens"] == before["tokenizer.ggml.tokens"]
    np.testing.assert_array_equal(after["tokenizer.ggml.token_type"], types)
    assert after["tokenizer.ggml.token_type"].dtype == np.int32  # type: ignore[attr-defined]
    ids = {key for key in before if key.endswith("_token_id")}
    for key in ids | {"tokenizer.ggml.model", "tokenizer.ggml.merges"}:
        assert after.get(key) == before.get(key), key
    if name != "bert-bge":  # GGUF readers do not look at it there
        assert after["tokenizer.ggml.pre"] == before["tokenizer.ggml.pre"]
    if "tokenizer.ggml.scores" in before:
        scores = after["tokenizer.ggml.scores"]
        assert isinstance(scores, np.ndarray) and scores.dtype == np.float32
        np.testing.assert_array_equal(scores, before["tokenizer.ggml.scores"])  # type: ignore[arg-type]
    built, old = GGUFTokenizerSource(after).build(), tokenizer(name)
    assert (built.prefix, built.suffix, built.special) == (old.prefix, old.suffix, old.special)
    for text in [*TEXTS, *special_texts(old, 50)]:
        assert built.encode(text) == old.encode(text)
        assert built.encode(text, parse_special=False) == old.encode(text, parse_special=False)


@pytest.mark.parametrize("name", ["llama-spm", "phi-3"])
def test_scores_come_from_merges_where_there_is_no_tokenizer_model(name: str, tmp_path: Path) -> None:
    path = folder(metadata(name), tmp_path)
    (path / "tokenizer.model").unlink()
    after = gguf_tokenizer_metadata(from_folder(path, size(name)))
    built, old = GGUFTokenizerSource(after).build(), tokenizer(name)
    for text in [*TEXTS, *special_texts(old, 50)]:
        assert built.encode(text) == old.encode(text)


def test_a_tokenizer_model_of_other_tokens_is_not_believed(tmp_path: Path) -> None:
    path = folder(metadata("llama-spm"), tmp_path)
    other = folder_files(checkpoint({**metadata("phi-3"), "tokenizer.ggml.tokens": swapped("phi-3")}))
    (path / "tokenizer.model").write_bytes(other["tokenizer.model"])
    after = gguf_tokenizer_metadata(from_folder(path, size("llama-spm")))
    assert not np.array_equal(after["tokenizer.ggml.scores"], metadata("llama-spm")["tokenizer.ggml.scores"])  # type: ignore[arg-type]
    (path / "tokenizer.model").write_bytes(b"\xff\xff")
    with pytest.raises(FormatError, match=r"tokenizer\.model is not a SentencePiece model"):
        gguf_tokenizer_metadata(from_folder(path, size("llama-spm")))


def swapped(name: str) -> list[str]:
    texts = list(metadata(name)["tokenizer.ggml.tokens"])  # type: ignore[call-overload]
    texts[500], texts[501] = texts[501], texts[500]
    return texts


def test_keys_of_gguf_go_through_and_templates_are_the_checkpoints() -> None:
    before = metadata("phi-3")
    after = gguf_tokenizer_metadata(checkpoint(before))
    assert after == {key: value for key, value in before.items() if key.startswith("tokenizer.")}
    changed = dataclasses.replace(
        checkpoint(before), chat_template="{{ new }}", chat_templates={"tool_use": "{{ tools }}"}
    )
    after = gguf_tokenizer_metadata(changed)
    assert after["tokenizer.chat_template"] == "{{ new }}"
    assert after["tokenizer.chat_template.tool_use"] == "{{ tools }}"
    assert after["tokenizer.chat_templates"] == ["tool_use"]
    assert "tokenizer.chat_template" not in gguf_tokenizer_metadata(
        dataclasses.replace(changed, chat_template=None)
    )
    assert gguf_tokenizer_metadata(dataclasses.replace(changed, tokenizer=None)) == {}


def test_every_row_of_the_table_is_recognised() -> None:
    rows = {row for row in PRE_TOKENIZERS.values() if row.byte_level and not row.add_sep}
    assert len(rows) > 25
    for row in rows:
        steps = {"type": "Sequence", "pretokenizers": split_steps(row)}
        name, same = pre_tokenizer_name(steps, ignore_merges=row.ignore_merges)
        assert same and PRE_TOKENIZERS[name] == row
        # A Split in a form that no row has, so that behaviour decides.
        other = [dict(step) for step in steps["pretokenizers"]]
        other[0]["pattern"] = {"Regex": f"(?:{other[0]['pattern']['Regex']})"}
        found, _ = pre_tokenizer_name(
            {"type": "Sequence", "pretokenizers": other}, ignore_merges=row.ignore_merges
        )
        assert cut({"type": "Sequence", "pretokenizers": split_steps(PRE_TOKENIZERS[found])}) == cut(steps)


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PLAIN_BYTES = {**BYTE_LEVEL, "use_regex": False}


@pytest.mark.parametrize(
    ("pre_tokenizer", "name"),
    [
        (BYTE_LEVEL, "gpt-2"),
        (
            {
                "type": "Sequence",
                "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL],
            },
            "smollm",
        ),
        (
            # DeepSeek-coder's own file.
            {
                "type": "Sequence",
                "pretokenizers": [
                    split("[\r\n]"),
                    split("\\s?\\p{L}+"),
                    split("\\s?\\p{P}+"),
                    split("[一-龥ࠀ-一가-퟿]+"),
                    {"type": "Digits", "individual_digits": True},
                    PLAIN_BYTES,
                ],
            },
            "deepseek-coder",
        ),
        (
            # What is between the matches goes, and everything matches.
            {
                "type": "Sequence",
                "pretokenizers": [
                    {**split(PRE_TOKENIZERS["gpt-4o"].patterns[0]), "behavior": "Removed", "invert": True},
                    PLAIN_BYTES,
                ],
            },
            "gpt-4o",
        ),
    ],
)
def test_pre_tokenizers_of_other_files(pre_tokenizer: dict[str, Any], name: str) -> None:
    assert pre_tokenizer_name(pre_tokenizer, ignore_merges=False) == (name, True)


def changed_folder(name: str, path: Path, **parts: Any) -> Path:
    """A folder whose tokenizer.json has some parts replaced."""
    folder(metadata(name), path)
    description = json.loads((path / "tokenizer.json").read_bytes())
    description.update(parts)
    (path / "tokenizer.json").write_text(json.dumps(description), "utf-8")
    (path / "tokenizer.model").unlink(missing_ok=True)
    return path


@pytest.mark.parametrize(
    ("name", "parts", "message"),
    [
        (
            "gpt-2",
            {"pre_tokenizer": {**BYTE_LEVEL, "add_prefix_space": True}},
            "adds a space before the text",
        ),
        ("gpt-2", {"normalizer": {"type": "Lowercase"}}, "no form for this normalizer.*Lowercase"),
        (
            "gpt-2",
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split("[aeiou]"), PLAIN_BYTES]}},
            r"no name for the pre-tokenizer.*aeiou.*Known: .*llama-bpe",
        ),
        (
            "llama-spm",
            {"normalizer": {"type": "NFKC"}},
            "no form for this normalizer and pre-tokenizer.*NFKC",
        ),
        (
            "gpt-2",
            {
                "post_processor": {
                    "type": "TemplateProcessing",
                    "single": [
                        {"SpecialToken": {"id": "!", "type_id": 0}},
                        {"Sequence": {"id": "A", "type_id": 0}},
                    ],
                    "pair": [
                        {"Sequence": {"id": "A", "type_id": 0}},
                        {"Sequence": {"id": "B", "type_id": 1}},
                    ],
                    "special_tokens": {"!": {"id": "!", "ids": [0], "tokens": ["!"]}},
                }
            },
            r"puts \['!'\] around a text",
        ),
    ],
)
def test_what_gguf_cannot_say_is_refused(
    name: str, parts: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = changed_folder(name, tmp_path, **parts)
    config = json.loads((path / "tokenizer_config.json").read_bytes())
    for key in ("add_bos_token", "add_eos_token"):
        config.pop(key, None)
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match=message):
        gguf_tokenizer_metadata(from_folder(path, size(name)))


def test_notes_say_what_is_lost(tmp_path: Path) -> None:
    path = changed_folder("gpt-2", tmp_path, normalizer={"type": "NFC"})
    found = gguf_tokenizer(from_folder(path, size("gpt-2")))
    assert len(found.notes) == 1 and "NFC" in found.notes[0]
    marks = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    path = changed_folder("llama-spm", tmp_path, normalizer=None, pre_tokenizer=marks)
    found = gguf_tokenizer(from_folder(path, size("llama-spm")))
    assert found.metadata["tokenizer.ggml.add_space_prefix"] is True
    assert len(found.notes) == 2
    assert "that starts with one" in found.notes[0] and "before the whole text only" in found.notes[1]
    built, old = GGUFTokenizerSource(found.metadata).build(), FolderTokenizerSource(path).build()
    assert all(built.encode(text) == old.encode(text) for text in TEXTS if not text.startswith(" "))


def test_ignore_merges_may_differ_only_where_it_does_not_matter(tmp_path: Path) -> None:
    path = folder(metadata("gpt-2"), tmp_path)
    description = json.loads((path / "tokenizer.json").read_bytes())
    description["model"]["ignore_merges"] = True
    (path / "tokenizer.json").write_text(json.dumps(description), "utf-8")
    found = gguf_tokenizer_metadata(from_folder(path, size("gpt-2")))
    assert found["tokenizer.ggml.pre"] == "gpt-2"
    # " the" and its like become tokens only because ignore_merges looks whole words up.
    description["model"]["merges"] = description["model"]["merges"][1000:]
    (path / "tokenizer.json").write_text(json.dumps(description), "utf-8")
    with pytest.raises(UnsupportedError, match="ignore_merges is True"):
        gguf_tokenizer_metadata(from_folder(path, size("gpt-2")))


def test_vocabularies_larger_and_smaller_than_the_models(tmp_path: Path) -> None:
    path = folder(metadata("gpt-2"), tmp_path)
    padded = gguf_tokenizer_metadata(from_folder(path, 50260))
    assert padded["tokenizer.ggml.tokens"][50256:] == [  # type: ignore[index]
        "<|endoftext|>",
        "[PAD50257]",
        "[PAD50258]",
        "[PAD50259]",
    ]
    assert padded["tokenizer.ggml.token_type"][50256:].tolist() == [3, 5, 5, 5]  # type: ignore[index]
    # ... and the padding does not come back into a folder.
    again = tmp_path / "again"
    again.mkdir()
    folder(padded, again)
    assert (again / "tokenizer.json").read_bytes() == (path / "tokenizer.json").read_bytes()
    # An added token behind the model's vocabulary has no embedding: it cannot be used anyway.
    smaller = gguf_tokenizer_metadata(from_folder(path, 50256))
    assert len(smaller["tokenizer.ggml.tokens"]) == 50256  # type: ignore[arg-type]
    assert "tokenizer.ggml.eos_token_id" not in smaller
    with pytest.raises(FormatError, match="vocabulary ends at 49999"):
        gguf_tokenizer_metadata(from_folder(path, 50000))
    with pytest.raises(FormatError, match="the limit is 16777216"):
        gguf_tokenizer_metadata(from_folder(path, 2**31 - 1))


def test_an_end_token_of_an_unusual_name_is_kept(tmp_path: Path) -> None:
    path = folder(metadata("gpt-2"), tmp_path)
    (path / "generation_config.json").write_text('{"eos_token_id": [50256, 11, 12]}')
    found = gguf_tokenizer(from_folder(path, 50257))
    assert found.metadata["tokenizer.ggml.eot_token_id"] == 11
    assert len(found.notes) == 1 and found.notes[0].endswith("further end tokens: -")
    assert GGUFTokenizerSource(found.metadata).build().eos_ids == {50256, 11}
