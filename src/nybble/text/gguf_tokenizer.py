"""Tokenizers from GGUF metadata.

The file gives a vocabulary, its scores or merges and a few switches; what a fragment between special
tokens looks like is llama.cpp's behaviour, which this reproduces:
https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from nybble.text.gguf_description import GGUFDescription, describe
from nybble.text.gguf_models import FragmentEncoder, byte_pair, scored_byte_pair, unigram, word_piece
from nybble.text.special import SpecialTokenSplitter
from nybble.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import tokenizers


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Half a million short-lived tuples would start the collector hundreds of times."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def build_gguf_tokenizer(metadata: Mapping[str, object]) -> Tokenizer:
    """A tokenizer from GGUF metadata.

    FormatError: keys missing, of a wrong type, or contradicting each other. UnsupportedError: a
    tokenizer model or pre-tokenizer that nybble does not know.
    """
    # Before the strings are there: modules between them would keep their memory from being freed.
    import tokenizers.models  # noqa: F401

    with no_garbage_collection():
        tokenizer = _build(describe(metadata))
    _give_back_memory()
    return tokenizer


def _give_back_memory() -> None:
    """Return freed memory to the system: glibc would keep several megabytes of the merges' copies."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(0)


def _build(found: GGUFDescription) -> Tokenizer:
    model, texts = found.model, found.vocabulary.texts
    runner, space_prefix = _runner(found)
    always = SpecialTokenSplitter(((texts[i], i) for i in found.user), found.strip_left, found.strip_right)
    both = (*found.user, *found.steering)
    parsed = SpecialTokenSplitter(((texts[i], i) for i in both), found.strip_left, found.strip_right)
    encoder = FragmentEncoder(
        runner,
        always,
        parsed,
        space_mark=found.row.space_mark or model == "llama",
        space_prefix=space_prefix and model == "llama",
    )
    found.vocabulary.pack()
    return Tokenizer(
        found.vocabulary,
        encoder,
        found.special,
        prefix=found.prefix,
        suffix=found.suffix,
        space_prefix=space_prefix or model == "bert",
    )


def _runner(found: GGUFDescription) -> tuple[tokenizers.Tokenizer, bool]:
    """The `tokenizers` pipeline for plain fragments, and whether it drops a space on decoding."""
    vocabulary, special = found.vocabulary, found.special
    if found.model in ("gpt2", "gemma4"):
        return byte_pair(vocabulary, found.ids, found.merges(), found.row, special), False
    if found.model == "bert":
        runner = word_piece(vocabulary, special, lowercase=found.lowercase, strip_accents=found.strip_accents)
        return runner, False
    scores = found.scores()
    if found.model == "llama":
        return scored_byte_pair(vocabulary, found.ids, scores, special), found.space_prefix
    runner = unigram(
        vocabulary,
        scores,
        special,
        charsmap=found.keys.raw_bytes("precompiled_charsmap"),
        merge_spaces=found.merge_spaces,
        space_prefix=found.space_prefix,
    )
    return runner, found.space_prefix or found.merge_spaces
