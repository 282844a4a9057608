"""Stop strings: the same end however the text is cut, and never a part of one in the text."""

from __future__ import annotations

import itertools

from hypothesis import example, given
from hypothesis import strategies as st

from nybble.generate.stop import StopStrings

texts = st.text(alphabet="ab<é", max_size=30)
stops = st.lists(st.text(alphabet="ab<é", min_size=1, max_size=5), max_size=3)


def by_definition(text, strings):
    """Read character by character; end where a stop string is complete first."""
    for end in range(1, len(text) + 1):
        complete = [s for s in strings if text[:end].endswith(s)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(texts, stops, st.lists(st.integers(0, 30), max_size=8))
@example("abcd", ["abcd", "bc"], [3])
def test_any_cut_gives_the_same_text(text, strings, cuts):
    expected, found = by_definition(text, strings)
    matcher = StopStrings(strings)
    places = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    emitted = ""
    for start, end in itertools.pairwise(places):
        emitted += matcher.push(text[start:end])
        assert expected.startswith(emitted), "a part of a stop string got out"
    if matcher.found is None:
        emitted += matcher.finish()
    assert (emitted, matcher.found) == (expected, found)


def test_holds_back_no_more_than_needed():
    matcher = StopStrings(["</end>"])
    assert matcher.push("hello <") == "hello "
    assert matcher.push("b> x") == "<b> x"
    assert matcher.push("</en") == ""
    assert matcher.push("d") == ""
    assert matcher.push("?") == "</end?"
    assert matcher.push("</end> more") == ""
    assert matcher.found == "</end>"
    assert matcher.push("more") == ""
