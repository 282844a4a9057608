"""The tokenizer's part of a Hugging Face folder, from any source: tokenizer.json and what stands beside it.

A folder's own files go through as they are. From GGUF they are made anew (``tokenizer_json``) so that
nybble, transformers and onnxruntime-genai give the same ids as the GGUF tokenizer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.errors import FormatError, NotFoundError, UnsupportedError
from nybble.text.gguf_description import GGUFDescription, describe
from nybble.text.gguf_tokenizer import no_garbage_collection
from nybble.text.sentencepiece_model import Piece, write_model
from nybble.text.tokenizer import FolderTokenizerSource, GGUFTokenizerSource
from nybble.text.tokenizer_json import token_count, tokenizer_json
from nybble.text.vocabulary import TokenType

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
_MORE_TEMPLATES = "additional_chat_templates"
_TEMPLATE_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_SAMPLING = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}
"""What generation_config.json can recommend, and GGUF's name for it (``general.sampling.*``)."""


def folder_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The files by name: tokenizer.json, tokenizer_config.json, special_tokens_map.json,
    generation_config.json, chat_template.jinja and ``additional_chat_templates/NAME.jinja`` where there
    are templates, tokenizer.model for SentencePiece vocabularies, and what else a source folder has.
    Names have ``/`` in them where a file lies in a folder. Empty when the checkpoint has no tokenizer.
    The same checkpoint gives the same bytes.

    Raises:
        NotFoundError: the source folder has no tokenizer.json.
        FormatError: the tokenizer in the file is broken.
        UnsupportedError: a tokenizer that nybble does not know.
    """
    source = checkpoint.tokenizer
    if source is None:
        return {}
    if isinstance(source, FolderTokenizerSource):
        return _copied(source.folder, checkpoint)
    if isinstance(source, GGUFTokenizerSource):
        with no_garbage_collection():
            return _made(source.metadata, checkpoint)
    raise UnsupportedError(
        f"cannot write a tokenizer from {type(source).__name__}; from GGUF metadata or a folder it can"
    )


def _copied(folder: Path, checkpoint: Checkpoint) -> dict[str, bytes]:
    files = {name: (folder / name).read_bytes() for name in _TOKENIZER_FILES if (folder / name).is_file()}
    if "tokenizer.json" not in files:
        raise NotFoundError(f"{folder} has no tokenizer.json")
    for path in sorted((folder / _MORE_TEMPLATES).glob("*.jinja")):
        files[f"{_MORE_TEMPLATES}/{path.name}"] = path.read_bytes()
    # A template that was given to the checkpoint, not found in the folder.
    places = ("chat_template.jinja", "chat_template.json")
    config = json.loads(files.get("tokenizer_config.json", b"{}"))
    if not (
        any(place in files for place in places) or (isinstance(config, dict) and config.get("chat_template"))
    ):
        files.update(_template_files(checkpoint))
    return files


def _made(metadata: Mapping[str, object], checkpoint: Checkpoint) -> dict[str, bytes]:
    found = describe(metadata)
    special = _special_tokens(found)
    files = {
        "tokenizer.json": _json(tokenizer_json(found)),
        "tokenizer_config.json": _json(_tokenizer_config(found, special, checkpoint), indent=2),
        "special_tokens_map.json": _json(special, indent=2),
        "generation_config.json": _json(_generation_config(found, checkpoint.metadata), indent=2),
    }
    if found.model in ("llama", "t5"):
        files["tokenizer.model"] = _sentencepiece_model(found)
    return {**files, **_template_files(checkpoint)}


def _template_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The chat templates, where transformers 5 and onnxruntime-genai look for them."""
    files: dict[str, bytes] = {}
    if checkpoint.chat_template is not None:
        files["chat_template.jinja"] = checkpoint.chat_template.encode()
    for name, template in checkpoint.chat_templates.items():
        if not _TEMPLATE_NAME.fullmatch(name):
            raise FormatError(
                f"the chat template {name!r} cannot be a file: its name may have A-Z, 0-9, _, -"
            )
        files[f"{_MORE_TEMPLATES}/{name}.jinja"] = template.encode()
    return files


def _sentencepiece_model(found: GGUFDescription) -> bytes:
    """tokenizer.model: scores and types, which tokenizer.json has no place for. Programs that make GGUF
    files from folders read them there."""
    special, count = found.special, token_count(found)
    kinds = found.file_types[:count].tolist()
    for i, kind in enumerate(kinds):
        if kind == TokenType.UNKNOWN and i != special.unk:
            kinds[i] = int(TokenType.CONTROL)  # SentencePiece has one unknown token
    if special.unk is not None:
        kinds[special.unk] = int(TokenType.UNKNOWN)
    triples = zip(found.vocabulary.texts, found.scores()[:count].tolist(), kinds, strict=False)
    return write_model(
        [Piece(text, score, kind) for text, score, kind in triples],
        "bpe" if found.model == "llama" else "unigram",
        {"unk": special.unk, "bos": special.bos, "eos": special.main_eos, "pad": special.pad},
        byte_fallback=TokenType.BYTE in kinds,
        charsmap=found.keys.raw_bytes("precompiled_charsmap"),
        space_prefix=found.space_prefix,
        merge_spaces=found.model == "t5" and found.merge_spaces,
    )


def _json(value: object, indent: int | None = None) -> bytes:
    separators = (",", ":") if indent is None else (",", ": ")
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators)
    # Half a surrogate pair cannot be UTF-8; GGUF strings are, so there is none.
    return (text + "\n").encode()


def _special_tokens(found: GGUFDescription) -> dict[str, str]:
    """Texts of the tokens with a meaning, by transformers' names for them."""
    ids = {
        "bos_token": found.special.bos,
        "eos_token": found.special.main_eos,
        "unk_token": found.special.unk,
        "pad_token": found.special.pad,
    }
    if found.model == "bert":
        ids["cls_token"] = found.prefix[0] if found.prefix else None
        ids["sep_token"] = found.suffix[0] if found.suffix else None
        ids["mask_token"] = found.keys.token("mask", len(found.vocabulary))
    texts = found.vocabulary.texts
    return {name: texts[i] for name, i in ids.items() if i is not None}


def _tokenizer_config(
    found: GGUFDescription, special: dict[str, str], checkpoint: Checkpoint
) -> dict[str, Any]:
    config: dict[str, Any] = {
        # The class that takes tokenizer.json as it is: LlamaTokenizer and others of transformers 5 build
        # their own normalizer and pre-tokenizer. onnxruntime-genai knows this name as well.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "clean_up_tokenization_spaces": False,
        "model_max_length": checkpoint.config.max_position_embeddings,
    }
    if found.model != "bert":
        config["add_bos_token"] = bool(found.prefix)
        config["add_eos_token"] = bool(found.suffix)
    if checkpoint.chat_template is not None:
        # For readers that do not know chat_template.jinja. Never a list with the named ones, which
        # onnxruntime-genai refuses.
        config["chat_template"] = checkpoint.chat_template
    return config


def _generation_config(found: GGUFDescription, metadata: Mapping[str, object]) -> dict[str, Any]:
    special = found.special
    config: dict[str, Any] = {}
    if special.bos is not None:
        config["bos_token_id"] = special.bos
    ends = sorted(special.eos, key=lambda i: (i != special.main_eos, i))
    if ends and found.model != "bert":  # an encoder's text has no end to generate
        config["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    if special.pad is not None:
        config["pad_token_id"] = special.pad
    return {**config, **_sampling(metadata)}


def _sampling(metadata: Mapping[str, object]) -> dict[str, Any]:
    """Recommendations of the file; values that are no numbers are not recommendations."""
    found: dict[str, Any] = {}
    for name, key in _SAMPLING.items():
        value = metadata.get(f"general.sampling.{key}")
        value = value.item() if hasattr(value, "item") else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        # Files store float32: 0.6 comes back as 0.60000002.
        found[name] = value if isinstance(value, int) else float(f"{value:.6g}")
    if not found:
        return {}
    if found.get("temperature") == 0:
        return {"do_sample": False}
    return {"do_sample": True, **found}
