"""Whether models speak of the same tokens: without that, their logits cannot be compared."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from nybble.errors import NybbleError
from nybble.evaluate.windows import Ids

OTHER_SPLIT = "its own tokenizer cuts this text into other tokens; the reference's were used"


class VocabularyError(NybbleError):
    """Models whose tokens do not mean the same cannot be compared."""


def check_size(label: str, size: int, reference: str, reference_size: int) -> None:
    """Refuse logits of another width.

    Raises:
        VocabularyError: they are.
    """
    if size != reference_size:
        raise VocabularyError(
            f"{label}: gives logits of {size} tokens, and {reference} of {reference_size}:"
            " only models with one vocabulary can be compared"
        )


def check_pieces(
    label: str, pieces: Sequence[str | None], reference: str, expected: Sequence[str], ids: Sequence[int]
) -> None:
    """Refuse tokens that stand for other bytes.

    Args:
        label: what the model is called.
        pieces: the bytes of each token in hexadecimal; None: the model has no such token.
        reference: what the reference is called.
        expected: the reference's bytes.
        ids: the tokens, those that the text is made of.

    Raises:
        VocabularyError: the first one that differs is named.
    """
    for token, piece, wanted in zip(ids, pieces, expected, strict=True):
        if piece != wanted:
            found = "not there" if piece is None else repr(_text(piece))
            raise VocabularyError(
                f"{label}: token {token} is {found}, but {_text(wanted)!r} in {reference}:"
                " only models with one vocabulary can be compared"
            )


def digest(ids: Ids) -> str:
    """A fingerprint of token ids."""
    return hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest()


def _text(piece: str) -> str:
    return bytes.fromhex(piece).decode(errors="replace")
