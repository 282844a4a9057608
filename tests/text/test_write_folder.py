"""Folders written from GGUF tokenizers: read back by nybble they give the same ids and text."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from folders import checkpoint, folder, special_texts
from random_texts import random_texts
from vocabularies import NAMES, metadata, tokenizer, vectors

from nybble.errors import FormatError, NotFoundError
from nybble.text.sentencepiece_model import read_pieces
from nybble.text.tokenizer import FolderTokenizerSource, GGUFTokenizerSource
from nybble.text.write_folder import folder_files
from nybble.text.write_gguf import gguf_tokenizer_metadata

READABLE = [name for name in NAMES if name != "bert-bge"]


@pytest.mark.parametrize("name", READABLE)
def test_folder_gives_the_same_ids_and_text(name: str, tmp_path: Path) -> None:
    built, gguf = FolderTokenizerSource(folder(metadata(name), tmp_path)).build(), tokenizer(name)
    texts = [*random_texts(100, seed=3), *special_texts(gguf, 100), *(text for text, _ in vectors(name)), ""]
    for text in texts:
        ids = gguf.encode(text)
        assert built.encode(text) == ids, repr(text)
        assert built.decode(ids) == gguf.decode(ids)
        assert built.decode(ids, skip_special=False) == gguf.decode(ids, skip_special=False)
    assert (built.vocab_size, built.special) == (gguf.vocab_size, gguf.special)
    assert (built.prefix, built.suffix) == (gguf.prefix, gguf.suffix)


def test_files_of_phi3() -> None:
    files = folder_files(checkpoint(metadata("phi-3"), max_position_embeddings=4096))
    assert files == folder_files(checkpoint(metadata("phi-3"), max_position_embeddings=4096))
    config = json.loads(files["tokenizer_config.json"])
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (config["bos_token"], config["eos_token"], config["unk_token"]) == (
        "<s>",
        "<|endoftext|>",
        "<unk>",
    )
    assert (config["add_bos_token"], config["add_eos_token"]) == (True, False)
    assert config["model_max_length"] == 4096
    assert files["chat_template.jinja"].decode() == config["chat_template"]
    generation = json.loads(files["generation_config.json"])
    assert generation == {"bos_token_id": 1, "eos_token_id": [32000, 2, 32007], "pad_token_id": 32000}
    added = {token["content"]: token for token in json.loads(files["tokenizer.json"])["added_tokens"]}
    assert added["<|end|>"]["rstrip"] and added["<|end|>"]["special"]
    assert not added["<|endoftext|>"]["rstrip"]
    assert not added["</s>"]["special"]


def test_word_piece(tmp_path: Path) -> None:
    built, gguf = FolderTokenizerSource(folder(metadata("bert-bge"), tmp_path)).build(), tokenizer("bert-bge")
    for text in [*random_texts(100, seed=3), *special_texts(gguf, 100), *(t for t, _ in vectors("bert-bge"))]:
        for parse_special in (True, False):
            ids = gguf.encode(text, parse_special=parse_special)
            assert built.encode(text, parse_special=parse_special) == ids, repr(text)
        assert built.decode(ids) == gguf.decode(ids)
    assert [built.token_text(i) for i in range(1000, 3000)] == [gguf.token_text(i) for i in range(1000, 3000)]
    config = json.loads((tmp_path / "tokenizer_config.json").read_bytes())
    assert (config["cls_token"], config["sep_token"], config["mask_token"]) == ("[CLS]", "[SEP]", "[MASK]")
    assert "add_bos_token" not in config
    assert "eos_token_id" not in json.loads((tmp_path / "generation_config.json").read_bytes())


@pytest.mark.parametrize("name", READABLE)
def test_untrusted_text_cannot_spell_special_tokens(name: str, tmp_path: Path) -> None:
    built, gguf = FolderTokenizerSource(folder(metadata(name), tmp_path)).build(), tokenizer(name)
    for text in [*special_texts(gguf, 100), "".join(gguf.token_text(i) for i in sorted(gguf.eos_ids))]:
        ids = built.encode(text, add_special=False, parse_special=False)
        assert ids == gguf.encode(text, add_special=False, parse_special=False)
        assert not any(built.is_special(i) for i in ids)


def unigram(**keys: object) -> dict[str, object]:
    texts = ["<pad>", "</s>", "<unk>", "▁", "▁he", "llo", "▁hello", "l", "o", "▁world", "h", "e", "[x]"]
    return {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.scores": np.array([0, 0, 0, -3, -4, -4, -5, -6, -6, -5, -7, -7, 0], np.float32),
        "tokenizer.ggml.token_type": np.array([3, 3, 2, *[1] * 9, 4], np.int32),
        **{f"tokenizer.ggml.{key}": value for key, value in keys.items()},
    }


@pytest.mark.parametrize("merge_spaces", [True, False])
@pytest.mark.parametrize("space_prefix", [True, False])
def test_unigram(space_prefix: bool, merge_spaces: bool, tmp_path: Path) -> None:
    source = unigram(add_space_prefix=space_prefix, remove_extra_whitespaces=merge_spaces)
    built, gguf = FolderTokenizerSource(folder(source, tmp_path)).build(), GGUFTokenizerSource(source).build()
    for text in ("hello world", " hello   hex </s> lo [x] he", "", "z", "he[x]llo"):
        ids = gguf.encode(text)
        assert built.encode(text) == ids
        assert built.decode(ids) == gguf.decode(ids)
    after = gguf_tokenizer_metadata(
        dataclasses.replace(checkpoint(source), tokenizer=FolderTokenizerSource(tmp_path))
    )
    assert after["tokenizer.ggml.tokens"] == source["tokenizer.ggml.tokens"]
    for key in ("scores", "token_type"):
        np.testing.assert_array_equal(after[f"tokenizer.ggml.{key}"], source[f"tokenizer.ggml.{key}"])  # type: ignore[arg-type]
    assert after["tokenizer.ggml.remove_extra_whitespaces"] is merge_spaces
    assert after["tokenizer.ggml.add_eos_token"] is True and after["tokenizer.ggml.add_bos_token"] is False


def marked_byte_pair() -> dict[str, object]:
    """A tiny vocabulary in the manner of Gemma 4: merges over ▁ text that follow no scores."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    texts = [
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        *byte_tokens,
        "\n",
        "\n\n",
        "\n\n\n",
        *"▁abcd",
        "ab",
        "abcd",
        "cd",
        "▁ab",
        "bcd",
    ]
    return {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": np.array([3, 3, 3, 2, *[6] * 256, *[1] * 13], np.int32),
        # The other cut of abcd is no merge: no scores can say so.
        "tokenizer.ggml.merges": ["a b", "▁ ab", "c d", "ab cd", "b cd"],
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
    }


def test_byte_pairs_over_marked_text(tmp_path: Path) -> None:
    source = marked_byte_pair()
    built, gguf = FolderTokenizerSource(folder(source, tmp_path)).build(), GGUFTokenizerSource(source).build()
    texts = ["abcd ab\n\n\ncd", "a\n\n\n\n\nb", " é中 <eos>ab", "abcdabcd  ab  ", ""]
    for text in texts:
        ids = gguf.encode(text)
        assert built.encode(text) == ids
        assert built.decode(ids) == gguf.decode(ids)
    assert gguf.token_id("\n\n\n") in built.encode(texts[0])
    after = gguf_tokenizer_metadata(
        dataclasses.replace(checkpoint(source), tokenizer=FolderTokenizerSource(tmp_path))
    )
    for key in ("model", "tokens", "merges"):
        assert after[f"tokenizer.ggml.{key}"] == source[f"tokenizer.ggml.{key}"]
    np.testing.assert_array_equal(
        after["tokenizer.ggml.token_type"],  # type: ignore[arg-type]
        source["tokenizer.ggml.token_type"],  # type: ignore[arg-type]
    )
    again = GGUFTokenizerSource(after).build()
    assert [again.encode(text) for text in texts] == [gguf.encode(text) for text in texts]


def test_named_templates_have_files_of_their_own() -> None:
    source = dataclasses.replace(checkpoint(metadata("phi-3")), chat_templates={"tool_use": "{{ tools }}"})
    files = folder_files(source)
    assert files["additional_chat_templates/tool_use.jinja"] == b"{{ tools }}"
    assert isinstance(json.loads(files["tokenizer_config.json"])["chat_template"], str)
    for name in ("../../evil", "", "a/b", "nul.", "a\\b"):
        with pytest.raises(FormatError, match="cannot be a file"):
            folder_files(dataclasses.replace(source, chat_templates={name: "x"}))


def test_sampling_is_recommended_where_the_file_does() -> None:
    def generation(**sampling: object) -> dict[str, object]:
        keys = {f"general.sampling.{key}": value for key, value in sampling.items()}
        found = folder_files(checkpoint({**metadata("gpt-2"), **keys}))["generation_config.json"]
        content = json.loads(found)
        assert isinstance(content, dict)
        return {key: content[key] for key in content if not key.endswith("_token_id")}

    assert generation() == {}
    assert generation(temp=np.float32(0.6), top_k=20, penalty_repeat=1.05) == {
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 20,
        "repetition_penalty": 1.05,
    }
    assert generation(temp=0.0, top_k=1) == {"do_sample": False}
    assert generation(temp="hot", top_p=True) == {}


def test_files_of_a_folder_are_copied(tmp_path: Path) -> None:
    folder(metadata("phi-3"), tmp_path)
    (tmp_path / "added_tokens.json").write_text("{}")
    (tmp_path / "config.json").write_text("{}")
    source = dataclasses.replace(checkpoint(metadata("phi-3")), tokenizer=FolderTokenizerSource(tmp_path))
    files = folder_files(source)
    assert files == {
        path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != "config.json"
    }
    # A template that was given to the checkpoint goes along where the folder has none.
    (tmp_path / "chat_template.jinja").unlink()
    config = json.loads(files["tokenizer_config.json"])
    del config["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert folder_files(dataclasses.replace(source, chat_template="new"))["chat_template.jinja"] == b"new"
    assert folder_files(dataclasses.replace(source, tokenizer=None)) == {}
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(NotFoundError, match=r"has no tokenizer\.json"):
        folder_files(source)


def test_control_tokens_that_stay_text_cannot_be_spelled_by_untrusted_text(tmp_path: Path) -> None:
    texts = list(metadata("gpt-2")["tokenizer.ggml.tokens"])  # type: ignore[call-overload]
    types = np.ones(len(texts), np.int32)
    texts[500:502] = ["<|start|>", "<|channel|>"]
    types[500:502] = 3
    types[-1] = 3
    source = {
        **metadata("gpt-2"),
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": types,
    }
    built, gguf = FolderTokenizerSource(folder(source, tmp_path)).build(), GGUFTokenizerSource(source).build()
    text = "<|start|>assistant<|channel|>final"
    for one in (built, gguf):
        ids = one.encode(text)
        assert {500, 501} <= set(ids) and one.decode(ids) == text
        assert not {500, 501} & set(one.encode(text, parse_special=False))


def test_pieces_of_a_tokenizer_model() -> None:
    data = folder_files(checkpoint(metadata("llama-spm")))["tokenizer.model"]
    pieces = read_pieces(data, "x")
    assert [piece.text for piece in pieces] == metadata("llama-spm")["tokenizer.ggml.tokens"]
    for broken in (data[:1000], b"\x0a\xff\xff\xff\xff\x0f", b"\x0b", b"\x80" * 11, b"\x08\x01\x0a"):
        with pytest.raises(FormatError, match="x is not a SentencePiece model"):
            read_pieces(broken, "x")
