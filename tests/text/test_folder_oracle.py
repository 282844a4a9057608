"""Written folders in transformers, onnxruntime-genai and SentencePiece: the ids of the GGUF tokenizer."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from folders import checkpoint, folder, special_texts
from random_texts import random_texts
from vocabularies import NAMES, metadata, tokenizer, vectors

from nybble.formats.gguf.reader import GGUFFile
from nybble.text.chat import ChatTemplate
from nybble.text.tokenizer import FolderTokenizerSource, GGUFTokenizerSource, Tokenizer
from nybble.text.write_folder import folder_files
from nybble.text.write_gguf import gguf_tokenizer_metadata

pytestmark = pytest.mark.oracle

TEXTS = random_texts(300, seed=21)
# Without the white space that onnxruntime-genai does not take for such.
PLAIN = [text.replace("\x00", "").replace("\x85", "") for text in TEXTS]


def auto(path: Path, model_type: str = "") -> Any:
    transformers = pytest.importorskip("transformers")
    if model_type:
        (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    return transformers.AutoTokenizer.from_pretrained(path)


def same_in_transformers(gguf: Tokenizer, theirs: Any, texts: list[str]) -> None:
    for text in texts:
        for add_special in (True, False):
            ids = gguf.encode(text, add_special=add_special)
            assert theirs.encode(text, add_special_tokens=add_special) == ids, repr(text)


@pytest.mark.parametrize("name", NAMES)
def test_transformers_gives_the_same_ids(name: str, tmp_path: Path) -> None:
    theirs, gguf = auto(folder(metadata(name), tmp_path)), tokenizer(name)
    texts = [*TEXTS, *special_texts(gguf, 200), *(text for text, _ in vectors(name)), "", " ", "a" * 3000]
    same_in_transformers(gguf, theirs, texts)
    assert theirs.bos_token_id == gguf.bos_id and theirs.pad_token_id == gguf.pad_id
    if name != "bert-bge":
        assert theirs.eos_token_id == gguf.eos_id
    if name in ("gpt-2", "llama-bpe", "qwen2"):
        for text in TEXTS:
            assert theirs.decode(gguf.encode(text), skip_special_tokens=True) == text


@pytest.mark.parametrize(
    ("name", "model_type"),
    [
        ("llama-spm", "llama"),
        ("llama-spm", "mistral"),
        ("llama-bpe", "llama"),
        ("phi-3", "phi3"),
        ("qwen2", "qwen3"),
    ],
)
def test_transformers_takes_the_file_whatever_the_model(name: str, model_type: str, tmp_path: Path) -> None:
    theirs = auto(folder(metadata(name), tmp_path), model_type)
    same_in_transformers(tokenizer(name), theirs, [*TEXTS[:100], *special_texts(tokenizer(name), 50)])


@pytest.mark.parametrize("name", ["phi-3", "qwen2"])
def test_transformers_renders_the_template(name: str, tmp_path: Path) -> None:
    theirs, gguf = auto(folder(metadata(name), tmp_path)), tokenizer(name)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " Yes\n"}]
    messages.append({"role": "user", "content": "中"})
    source = str(metadata(name)["tokenizer.chat_template"])
    ours = ChatTemplate(source, bos_token=gguf.bos_token, eos_token=gguf.eos_token).render(messages)
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == ours
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ids == gguf.encode(ours, add_special=False)


def real(path: Path) -> dict[str, object]:
    return dict(GGUFFile.open(path).metadata)


@pytest.mark.slow
@pytest.mark.real_model
def test_real_models(smollm2_path: Path, gemma3_path: Path, tmp_path: Path) -> None:
    for path, model_type in ((smollm2_path, "llama"), (smollm2_path, "phi3"), (gemma3_path, "gemma3_text")):
        source = real(path)
        at = tmp_path / model_type
        at.mkdir()
        gguf = GGUFTokenizerSource(source).build()
        texts = [*TEXTS, *special_texts(gguf, 200)]
        same_in_transformers(gguf, auto(folder(source, at), model_type), texts)
        built = FolderTokenizerSource(at).build()
        after = gguf_tokenizer_metadata(with_folder(source, at))
        again = GGUFTokenizerSource(after).build()
        for key in ("tokens", "merges", "scores", "token_type", "pre", "model"):
            key = f"tokenizer.ggml.{key}"
            assert list(after.get(key, ())) == list(source.get(key, ())), key  # type: ignore[call-overload]
        for text in texts:
            for parse_special in (True, False):
                ids = gguf.encode(text, parse_special=parse_special)
                assert built.encode(text, parse_special=parse_special) == ids
                assert again.encode(text, parse_special=parse_special) == ids


def with_folder(source: dict[str, object], path: Path) -> Any:
    found = checkpoint(source)
    found.tokenizer = FolderTokenizerSource(path)
    return found


def genai(path: Path) -> Any:
    """onnxruntime-genai's tokenizer of a folder, with a model that does nothing beside it."""
    library = pytest.importorskip("onnxruntime_genai")
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper

    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, [None, None])
    out = helper.make_tensor_value_info("logits", TensorProto.INT64, [None, None])
    graph = helper.make_graph([helper.make_node("Identity", ["input_ids"], ["logits"])], "none", [ids], [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path / "model.onnx")
    decoder = {
        "filename": "model.onnx",
        "head_size": 1,
        "hidden_size": 1,
        "num_attention_heads": 1,
        "num_hidden_layers": 1,
        "num_key_value_heads": 1,
        "inputs": {"input_ids": "input_ids"},
        "outputs": {"logits": "logits"},
        "session_options": {"provider_options": []},
    }
    numbers = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "context_length": 9, "vocab_size": 9}
    config = {"model": {**numbers, "type": "llama", "decoder": decoder}, "search": {"max_length": 9}}
    (path / "genai_config.json").write_text(json.dumps(config))
    return library.Tokenizer(library.Model(str(path)))


@pytest.mark.slow
def test_onnxruntime_genai_byte_level(tmp_path: Path) -> None:
    for name in ("gpt-2", "llama-bpe", "qwen2"):
        at = tmp_path / name
        at.mkdir()
        theirs, gguf = genai(folder(metadata(name), at)), tokenizer(name)
        # It ends a piece at the first of line breaks with other white space between them.
        texts = [*PLAIN, *special_texts(gguf, 200)]
        texts = [text for text in texts if not re.search(r"[\r\n]\s*[^\S\r\n]\s*[\r\n]", text)]
        assert len(texts) > 200
        for text in texts:
            assert list(theirs.encode(text)) == gguf.encode(text, add_special=False), repr(text)
        for text in texts[:50]:
            assert theirs.decode(gguf.encode(text, add_special=False)) == text


def test_onnxruntime_genai_phi3(tmp_path: Path) -> None:
    theirs, gguf = genai(folder(metadata("phi-3"), tmp_path)), tokenizer("phi-3")
    messages = [{"role": "user", "content": "Write a short text, please: 3 lines of 12 words."}]
    text = theirs.apply_chat_template(json.dumps(messages), add_generation_prompt=True)
    source = str(metadata("phi-3")["tokenizer.chat_template"])
    assert text == ChatTemplate(source, bos_token="<s>").render(messages)
    assert list(theirs.encode(text)) == gguf.encode(text, add_special=False)


def test_sentencepiece_reads_tokenizer_model() -> None:
    library = pytest.importorskip("sentencepiece")
    for name in ("llama-spm", "phi-3"):
        data = folder_files(checkpoint(metadata(name)))["tokenizer.model"]
        theirs, gguf = library.SentencePieceProcessor(model_proto=data), tokenizer(name)
        assert theirs.get_piece_size() == gguf.vocab_size
        assert (theirs.bos_id(), theirs.eos_id(), theirs.unk_id()) == (gguf.bos_id, gguf.eos_id, gguf.unk_id)
        for text in TEXTS:
            ids = gguf.encode(text, add_special=False, parse_special=False)
            assert theirs.encode(text) == ids, repr(text)
