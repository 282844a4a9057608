"""Budget: what one rendering of a template may use, and size estimates that keep it small.

Templates come with models from strangers. Nothing in Python can stop a thread that is busy inside
one long operation, so each operation is made short (sizes are checked before it runs) and counted
(the time is checked between operations). No signals: this works on Windows and in any thread.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nybble.errors import TemplateError

MAX_INTEGER_BITS = 4096
_WIDE_PERCENT = re.compile(r"%(\([^)]*\))?[-+ #0]*(\d{4,}|\*|\d*\.(\d{4,}|\*))")
_WIDE_BRACE = re.compile(r"\{[^{}]*[:!][^{}]*\d{4,}|\{[^{}]*\{")


@dataclass(frozen=True)
class Limits:
    """Limits of one rendering. ``work_chars`` counts the characters of all strings that are made."""

    source_chars: int = 200_000
    output_chars: int = 8_000_000
    work_chars: int = 64_000_000
    nodes: int = 1_000_000
    seconds: float = 5.0


class Budget:
    """Counts down while a template renders; raises TemplateError when something runs out."""

    def __init__(self, limits: Limits, input_chars: int = 0) -> None:
        self._limits = limits
        # Long conversations may be handled a few times over by honest templates.
        self._chars = limits.work_chars + 20 * input_chars
        self._end = time.monotonic() + limits.seconds

    def spend(self, chars: int = 0) -> None:
        """One step, and ``chars`` characters about to be made."""
        self._chars -= chars
        if self._chars < 0:
            raise TemplateError("the chat template makes too much text; it may be hostile")
        if time.monotonic() > self._end:
            raise TemplateError(
                f"the chat template ran for more than {self._limits.seconds:g} seconds; it may be hostile"
            )

    def weigh(self, value: object) -> int:
        """Counts the nodes of nested containers (shared ones again each time they appear) and
        returns the characters of the text in them. Raises when there are too many."""
        from jinja2.utils import Namespace

        nodes = chars = 0
        stack = [value]
        while stack:
            item = stack.pop()
            nodes += 1
            if isinstance(item, str):
                chars += len(item)
            elif isinstance(item, (list, tuple)):
                stack.extend(item)
            elif isinstance(item, Mapping):
                stack.extend(item.keys())
                stack.extend(item.values())
            elif isinstance(item, Namespace):
                # Namespace hides its attributes from vars().
                stack.extend(item._Namespace__attrs.values())
            if nodes + len(stack) > self._limits.nodes:
                raise TemplateError("the chat template makes a list or mapping that is too large")
        self.spend(nodes // 8)
        return chars

    def made(self, value: Any) -> Any:
        """Charges for a value that an operation returned, and returns it."""
        if isinstance(value, str):
            self.spend(len(value))
        elif isinstance(value, (list, tuple, dict)):
            self.weigh(value)
        return value

    def count_items(self, items: Iterable[Any]) -> Iterable[Any]:
        """The same items, one step each."""
        for item in items:
            self.spend()
            yield item

    def to_text(self, value: object) -> str:
        """``str(value)`` that cannot explode."""
        if not isinstance(value, str):
            self.spend(2 * self.weigh(value))
            value = str(value)
        self.spend(len(value))
        return value


def binary_size(operator: str, left: Any, right: Any) -> int:
    """Characters or items that ``left operator right`` would make; TemplateError if far too many."""
    if operator == "*":
        for sequence, times in ((left, right), (right, left)):
            if isinstance(sequence, (str, list, tuple)) and isinstance(times, int):
                return len(sequence) * max(0, times)
    if operator == "%" and isinstance(left, str):
        if _WIDE_PERCENT.search(left):
            raise TemplateError("the chat template formats with a width that is too large")
        return len(left) + left.count("%") * text_size(right)
    if operator == "+" and isinstance(left, (str, list, tuple)) and isinstance(right, (str, list, tuple)):
        return len(left) + len(right)
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() + right.bit_length()
        if operator == "**":
            bits = left.bit_length() * abs(right)
        if bits > MAX_INTEGER_BITS:
            raise TemplateError("the chat template computes a number that is too large")
    return 0


def text_size(value: Any) -> int:
    """About how long ``str(value)`` is, one level deep."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return sum(len(item) if isinstance(item, str) else 1000 for item in value)
    return 1300


def method_size(owner: str, name: str, arguments: list[Any]) -> int:
    """Characters that a string method would make."""
    first = arguments[0] if arguments else None
    if name == "replace" and len(arguments) > 1 and isinstance(first, str) and isinstance(arguments[1], str):
        return len(owner) + (owner.count(first) if first else len(owner) + 1) * len(arguments[1])
    if name == "join" and isinstance(first, (list, tuple, dict)):
        return sum(len(item) for item in first if isinstance(item, str)) + len(owner) * len(first)
    if name in ("center", "ljust", "rjust", "zfill") and isinstance(first, int):
        return max(len(owner), first)
    if name == "expandtabs":
        return len(owner) + owner.count("\t") * (first if isinstance(first, int) else 8)
    if name == "format":
        if _WIDE_BRACE.search(owner.replace("{{", "").replace("}}", "")):
            raise TemplateError("the chat template formats with a width that is too large")
        return len(owner) + owner.count("{") * sum(text_size(argument) for argument in arguments)
    return len(owner)
