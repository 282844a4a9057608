"""PEFT's ``alpha_pattern``: module names, or regular expressions for the end of one.

A pattern comes with a file that nobody vouches for, and some regular expressions take forever. So only
such are matched whose time is bounded: short ones with few groups and repetitions, no group repeated.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from nybble.errors import UnsupportedError

MAX_LENGTH = 500
MAX_GROUPS = 3
MAX_REPETITIONS = 3
MAX_NAME = 200
"""Letters of a name that is matched."""
MAX_EXPRESSIONS = 100
_PLAIN = re.compile(r"[\w.]+")
_GROUP = re.compile(r"(?<!\\)\(")
_REPETITION = re.compile(r"(?<!\\)[*+?{](?!:)")
_REFUSED = re.compile(r"\)[*+{]|\(\?(?!:)|\\[1-9]")


class Patterns:
    """Patterns in a file's order.

    Raises:
        UnsupportedError: one is not of those that are matched here; the message shows it.
    """

    def __init__(self, patterns: Iterable[str], where: str) -> None:
        self._plain: dict[str, int] = {}
        self._expressions: list[tuple[int, str, re.Pattern[str]]] = []
        for place, pattern in enumerate(patterns):
            if _PLAIN.fullmatch(pattern):
                # In PEFT a point stands for any letter, which makes no difference for names of modules.
                self._plain[pattern] = place
            elif len(self._expressions) < MAX_EXPRESSIONS:
                self._expressions.append((place, pattern, _compiled(pattern, where)))
            else:
                raise UnsupportedError(f"{where}: has more than {MAX_EXPRESSIONS} regular expressions")

    def first(self, module: str) -> str | None:
        """The first pattern that matches a module's name to its end, as PEFT's ``get_pattern_key`` does."""
        words = module.split(".")
        ends = (".".join(words[start:]) for start in range(len(words)))
        found = [(self._plain[end], end) for end in ends if end in self._plain]
        found += [(place, pattern) for place, pattern, row in self._expressions if row.match(module)]
        return min(found)[1] if found else None


def _compiled(pattern: str, where: str) -> re.Pattern[str]:
    refused = UnsupportedError(
        f"{where}: the pattern {pattern[:100]!r} is too complicated: names of modules are matched, and"
        f" regular expressions with at most {MAX_GROUPS} groups and {MAX_REPETITIONS} repetitions, none of"
        " a group"
    )
    if (
        len(pattern) > MAX_LENGTH
        or len(_GROUP.findall(pattern)) > MAX_GROUPS
        or len(_REPETITION.findall(pattern)) > MAX_REPETITIONS
        or _REFUSED.search(pattern)
    ):
        raise refused
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, OverflowError, RecursionError):
        raise refused from None
