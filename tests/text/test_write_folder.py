"""Folders written from GGUF tokenizers: read back by nybble they give the same ids and text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from folders import checkpoint, folder, special_texts
from random_texts import random_texts
from vocabularies import NAMES, metadata, tokenizer, vectors

from nybble.text.tokenizer import FolderTokenizerSource
from nybble.text.write_folder import folder_files

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
