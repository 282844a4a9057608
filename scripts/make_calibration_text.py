"""Writes src/nybble/quantize/data/calibration.txt, the text that calibration runs by default.

python scripts/make_calibration_text.py SHAKESPEARE

SHAKESPEARE is tinyshakespeare's input.txt (https://github.com/karpathy/char-rnn, public domain). All else
is nybble's own: texts in scripts/calibration_text, documentation, code, and exercises, tables and records
that this script makes up. Short pieces of all kinds alternate, so that any part of the file is a mixture.
The file is checked in: run this again only to change what calibration sees.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "src" / "nybble" / "quantize" / "data" / "calibration.txt"
PIECE = 1800  # characters
WRITTEN = ("prose.txt", "dialogue.txt", "languages.txt")
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "docs/conversion.md",
    "docs/formats-onnx.md",
    "docs/formats-safetensors.md",
    "docs/generation.md",
    "docs/models.md",
)
PYTHON = ("src/nybble/graph/reference.py", "src/nybble/generate/sampler.py", "src/nybble/text/merges.py")
NATIVE = ("native/core/thread_pool.cpp", "native/core/kv_cache.cpp", "native/kernels/generic/half.h")
SHAKESPEARE_PIECES = 14
EXERCISES = 240


class Numbers:
    """Numbers that look random and are the same everywhere."""

    def __init__(self) -> None:
        self._count = 0

    def below(self, limit: int) -> int:
        self._count += 1
        digest = hashlib.sha256(str(self._count).encode()).digest()
        return int.from_bytes(digest[:8], "little") % limit

    def between(self, low: int, high: int) -> int:
        return low + self.below(high - low + 1)

    def of(self, items: list[str]) -> str:
        return items[self.below(len(items))]


NAMES = ["Ada", "Bruno", "Chidi", "Dana", "Emre", "Farah", "Goran", "Hana", "Ines", "Jonas", "Keiko", "Lars"]
CITIES = ["Lisbon", "Nairobi", "Osaka", "Quito", "Riga", "Seville", "Tampere", "Utrecht", "Valencia"]
GOODS = ["lamp", "kettle", "bicycle bell", "notebook", "USB cable", "rain jacket", "chess set", "desk fan"]


def exercise(n: Numbers, kind: int) -> str:
    """One small exercise, table or record."""
    a, b, c = n.between(12, 989), n.between(12, 989), n.between(2, 19)
    name, city, item = n.of(NAMES), n.of(CITIES), n.of(GOODS)
    if kind == 0:
        return f"Question: What is {a} + {b}?\nAnswer: {a} + {b} = {a + b}.\n"
    if kind == 1:
        return (
            f"Compute {a} × {c}. Split it: {a // 10 * 10} × {c} = {a // 10 * 10 * c} and {a % 10} × {c} ="
            f" {a % 10 * c}; together {a * c}.\n"
        )
    if kind == 2:
        x = n.between(-9, 20)
        return (
            f"Solve {c}x + {b} = {c * x + b}.\nSubtract {b} on both sides: {c}x = {c * x}.\n"
            f"Divide by {c}: x = {x}.\n"
        )
    if kind == 3:
        p, q = Fraction(n.between(1, 9), n.between(2, 12)), Fraction(n.between(1, 9), n.between(2, 12))
        return (
            f"${p} + {q} = {p + q}$, and $\\frac{{{p.numerator}}}{{{p.denominator}}} \\cdot {q} = {p * q}$.\n"
        )
    if kind == 4:
        price = n.between(199, 9999) / 100
        return (
            f"{name} buys {c} pieces of '{item}' at {price:.2f} each and pays with {c * price + 5:.2f}."
            f" The total is {c * price:.2f}, so the change is 5.00.\n"
        )
    if kind == 5:
        rows = [
            f"{n.between(1, 28):02d}.{n.between(1, 12):02d}.2024,{n.of(CITIES)},{n.between(-5, 35)}"
            for _ in range(4)
        ]
        return "date,city,temperature\n" + "\n".join(rows) + "\n"
    if kind == 6:
        record = {"id": a, "name": name, "city": city, "active": a % 2 == 0, "scores": [b, c, b - c]}
        return json.dumps(record, indent=2) + "\n"
    if kind == 7:
        levels = ["INFO", "WARNING", "ERROR", "DEBUG"]
        return "".join(
            f"2024-0{n.between(1, 9)}-{n.between(10, 28)} {n.between(10, 23)}:{n.between(10, 59)}:"
            f"{n.between(10, 59)} {n.of(levels)} worker-{n.between(1, 8)} request {n.between(1000, 9999)}"
            f" took {n.between(1, 900)} ms\n"
            for _ in range(4)
        )
    if kind == 8:
        return (
            f"SELECT name, COUNT(*) AS orders\nFROM customers JOIN orders USING (customer_id)\nWHERE city ="
            f" '{city}' AND total > {a}\nGROUP BY name\nHAVING COUNT(*) >= {c}\nORDER BY orders DESC;\n"
        )
    if kind == 9:
        rows = "".join(
            f"| {n.of(GOODS)} | {n.between(1, 99)} | {n.between(100, 9999) / 100:.2f} |\n" for _ in "abc"
        )
        return f"| item | pieces | price |\n|---|---|---|\n{rows}"
    if kind == 10:
        start, step = n.between(1, 20), n.between(2, 9)
        terms = ", ".join(str(start + step * i) for i in range(5))
        return f"The sequence {terms}, ... grows by {step}; its 20th term is {start + 19 * step}.\n"
    if kind == 11:
        return (
            f'<li class="product" data-id="{a}"><a href="/shop/{b}?page={c}">{item}</a>'
            f" <b>{a / 100:.2f} €</b></li>\n"
        )
    if kind == 12:
        return (
            f"$ ls -l reports/ | head -3\n-rw-r--r-- 1 {name.lower()} staff {a * 37} Mar {c} 09:14"
            f" {city.lower()}.csv\n$ grep -c {item.split()[0]} reports/{city.lower()}.csv\n{b}\n"
        )
    return f"{a} km are {a * 1000} m; at {b % 90 + 10} km/h that takes {a / (b % 90 + 10):.1f} hours.\n"


def exercises() -> str:
    """All exercises."""
    numbers = Numbers()
    return "\n".join(exercise(numbers, i * 5 % 14) for i in range(EXERCISES))


def pieces(text: str) -> Iterator[str]:
    """Pieces of about ``PIECE`` characters, cut between paragraphs."""
    piece = ""
    for paragraph in text.strip().split("\n\n"):
        if piece and len(piece) + len(paragraph) > PIECE:
            yield piece
            piece = ""
        piece += ("\n\n" if piece else "") + paragraph
    if piece:
        yield piece


def mixed(sources: list[list[str]]) -> Iterator[str]:
    """Pieces of all sources, each source spread over the whole."""
    places = [
        ((index + 0.5) / len(source), number, piece)
        for number, source in enumerate(sources)
        for index, piece in enumerate(source)
    ]
    for _, _, piece in sorted(places):
        yield piece


def main() -> int:
    """Write the file."""
    if len(sys.argv) != 2:
        print(__doc__)
        return 2

    def read(folder: Path, names: tuple[str, ...]) -> list[str]:
        return [piece for name in names for piece in pieces((folder / name).read_text(encoding="utf-8"))]

    plays = list(pieces(Path(sys.argv[1]).read_text(encoding="utf-8")))
    step = len(plays) // SHAKESPEARE_PIECES
    sources = [
        read(ROOT / "scripts" / "calibration_text", WRITTEN),
        read(ROOT, DOCUMENTS),
        read(ROOT, PYTHON),
        read(ROOT, NATIVE),
        plays[::step][:SHAKESPEARE_PIECES],
        list(pieces(exercises())),
    ]
    text = "\n\n".join(mixed(sources)) + "\n"
    TARGET.write_text(text, encoding="utf-8", newline="\n")
    for source, name in zip(sources, ("written", "docs", "python", "c++", "plays", "exercises"), strict=True):
        print(f"{name}: {sum(map(len, source))} characters")
    print(f"{TARGET}: {len(text.encode())} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
