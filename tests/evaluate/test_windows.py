"""Windows: which tokens a model sees, and which count."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.evaluate.windows import WindowError, Windows, context_before, tokens_of


def ids(count: int) -> np.ndarray:
    return np.arange(100, 100 + count, dtype=np.int32)


def test_side_by_side_is_what_llama_perplexity_does() -> None:
    """Chunks of n_ctx tokens; logits of positions n_ctx / 2 to n_ctx - 2 are compared with what follows."""
    windows = Windows(ids(1700), 512, prefix=(1,))
    assert len(windows) == 3 and windows.scored == 3 * 255
    second = list(windows)[1]
    assert second.start == 512
    assert second.tokens == (1, *range(613, 1124))
    assert second.context == second.tokens[:256]
    assert second.inputs == tuple(range(868, 1123))
    assert second.targets == tuple(range(869, 1124))


def test_strided() -> None:
    windows = Windows(ids(20), 8, stride=3)
    assert [window.start for window in windows] == [0, 3, 6, 9, 12]
    targets = [token for window in windows for token in window.targets]
    assert targets == list(range(105, 120))
    assert all(len(window.context) == 4 for window in windows)


@given(st.integers(4, 40), st.integers(0, 200), st.data())
def test_properties(window: int, more: int, data: st.DataObject) -> None:
    stride = data.draw(st.none() | st.integers(1, window - 1))
    prefix = data.draw(st.sampled_from([(), (1,), (1, 2)]))
    tokens = ids(window + more)
    windows = Windows(tokens, window, stride, prefix)
    seen: list[int] = []
    for piece in windows:
        assert len(piece.tokens) == window
        assert len(piece.inputs) == len(piece.targets) > 0
        assert (*piece.context, *piece.inputs, piece.tokens[-1]) == piece.tokens
        # A target is a token of the text at its own place, never a begin token.
        first = piece.start + piece.first_target
        assert piece.targets == tuple(tokens[first : piece.start + window].tolist())
        assert piece.tokens[: len(prefix)] == prefix
        seen += piece.targets
    assert len(seen) == len(set(seen)) == windows.scored
    if stride is not None and stride < window - len(prefix):
        assert seen == list(range(seen[0], seen[0] + len(seen)))


def test_as_many_as_asked_for() -> None:
    assert len(Windows(ids(100), 10, most=4)) == 4
    assert len(list(Windows(ids(100), 10, most=4))) == 4
    assert len(Windows(ids(30), 10, most=4)) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 3}, "at least 4 tokens"),
        ({"window": 8, "stride": 8}, "between 1 and 7"),
        ({"window": 8, "stride": 0}, "between 1 and 7"),
        ({"window": 8, "most": 0}, "at least one window"),
        ({"window": 4, "prefix": (1, 2, 3)}, "no room"),
    ],
)
def test_sizes_that_are_none(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Windows(ids(100), **options)  # type: ignore[arg-type]


def test_a_text_that_is_too_short() -> None:
    with pytest.raises(WindowError, match="the text has 9 tokens, fewer than one window of 10"):
        Windows(ids(9), 10)


class Letters:
    """A tokenizer with a token a letter."""

    prefix = (1,)

    def __init__(self) -> None:
        self.longest = 0

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        assert not add_special and not parse_special
        self.longest = max(self.longest, len(text))
        return [ord(letter) for letter in text]

    def decode(self, tokens: list[int], *, skip_special: bool) -> str:
        return "".join(map(chr, tokens))


def test_tokens_of_a_text() -> None:
    tokenizer = Letters()
    assert tokens_of(tokenizer, "abc").tolist() == [1, 97, 98, 99]  # type: ignore[arg-type]
    text = "x" * 100_000
    assert len(tokens_of(tokenizer, text, 50)) == 50  # type: ignore[arg-type]
    assert tokenizer.longest < 5_000
    assert len(tokens_of(tokenizer, "abc", 50)) == 4  # type: ignore[arg-type]


def test_context_is_the_end_of_a_text() -> None:
    tokens = [ord(letter) for letter in "a long text"]
    assert context_before(Letters(), tokens, 4) == "text"  # type: ignore[arg-type]
