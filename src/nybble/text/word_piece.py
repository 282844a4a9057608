"""WordPiece's two spellings: ``word`` and ``##rest`` in tokenizer.json, ``▁word`` and ``rest`` in GGUF."""

from __future__ import annotations

from nybble.text.vocabulary import SPACE_MARK


def plain_text(text: str) -> str:
    """A token of GGUF as tokenizer.json spells it."""
    if text.startswith(SPACE_MARK):
        return text[1:]
    return text if _is_name(text) else "##" + text


def marked_text(text: str) -> str:
    """A token of tokenizer.json as GGUF spells it."""
    if text.startswith("##"):
        return text[2:]
    return text if _is_name(text) else SPACE_MARK + text


def _is_name(text: str) -> bool:
    """Names such as [CLS] and [unused0] have no mark in either spelling."""
    return text.startswith("[") and text.endswith("]")
