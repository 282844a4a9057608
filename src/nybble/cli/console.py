"""What commands print with: standard output for results, standard error for notes, colour, tables."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TextIO

_STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}

Style = Literal["bold", "dim", "red", "green", "yellow", "cyan"]


class OutputClosed(Exception):
    """The reader of standard output went away (``nybble ... | head -1``)."""


def prepare_streams() -> None:
    """UTF-8 for piped text on every system (Windows pipes use a code page), and no crash on odd text."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not stream.isatty():
            if stream is sys.stdin:
                stream.reconfigure(encoding="utf-8")
            else:
                stream.reconfigure(encoding="utf-8", errors="backslashreplace")


# -- standard output ------------------------------------------------------------------------------


def write(text: str) -> None:
    """Write results to standard output now.

    Raises:
        OutputClosed: nobody reads any more.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        _raise_closed(error)


def flush() -> None:
    """Push out what is left; raises OutputClosed as ``write`` does."""
    write("")


def write_json(value: Any) -> None:
    """One JSON value, indented, on standard output."""
    write(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _raise_closed(error: OSError) -> None:
    # Windows reports a closed pipe as EINVAL.
    if error.errno in (errno.EPIPE, errno.EINVAL):
        raise OutputClosed from error
    raise error


# -- standard error -------------------------------------------------------------------------------


def note(text: str) -> None:
    """One line for the person at the terminal, on standard error."""
    print(styled(text, "dim", sys.stderr), file=sys.stderr, flush=True)


def error(text: str) -> None:
    """``nybble: error: text`` on standard error."""
    print(f"nybble: {styled('error:', 'red', sys.stderr)} {text}", file=sys.stderr, flush=True)


# -- colour ---------------------------------------------------------------------------------------


def colours(stream: TextIO) -> bool:
    """Whether to colour: only on a terminal, never with NO_COLOR (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def styled(text: str, style: Style, stream: TextIO | None = None) -> str:
    """``text`` in a colour or weight if the stream (default: standard output) takes colours."""
    stream = sys.stdout if stream is None else stream
    return f"\x1b[{_STYLES[style]}m{text}\x1b[0m" if colours(stream) else text


# -- numbers and tables ---------------------------------------------------------------------------


def size(count: float) -> str:
    """Bytes in decimal units: 98.1 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.95 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def number(count: float) -> str:
    """A count in short: 134.5 M."""
    for unit in ("", " k", " M", " B"):
        if count < 999.95 or unit == " B":
            return f"{count:.0f}" if unit == "" else f"{count:.1f}{unit}"
        count /= 1000
    raise AssertionError("unreachable")


def table(header: Sequence[str], rows: Iterable[Sequence[object]], right: Sequence[str] = ()) -> str:
    """Columns under a header; those named in ``right`` are aligned to the right."""
    cells = [[_one_line(value) for value in row] for row in rows]
    widths = [max([len(name), *(len(row[i]) for row in cells)]) for i, name in enumerate(header)]
    flags = [name in right for name in header]

    def line(row: Sequence[str]) -> str:
        padded = (
            text.rjust(width) if flag else text.ljust(width)
            for text, width, flag in zip(row, widths, flags, strict=True)
        )
        return "  ".join(padded).rstrip()

    return "\n".join([styled(line(header), "bold"), *map(line, cells)]) + "\n"


def pairs(items: Iterable[tuple[str, object]], indent: str = "  ") -> str:
    """``name  value`` lines, values aligned."""
    lines = [(name, _one_line(value)) for name, value in items]
    width = max((len(name) for name, _ in lines), default=0)
    return "".join(
        f"{indent}{styled(name.ljust(width), 'cyan')}  {value}".rstrip() + "\n" for name, value in lines
    )


def heading(text: str) -> str:
    """A section's title."""
    return styled(text, "bold") + "\n"


def _one_line(value: object) -> str:
    return printable("" if value is None else str(value))


def printable(text: str) -> str:
    """``text`` on one line, with control characters of a hostile file made visible, not obeyed."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
