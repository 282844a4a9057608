"""What ``nybble inspect`` says about a LoRA adapter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from nybble.cli import console

if TYPE_CHECKING:
    from nybble.checkpoint.adapter import Adapter


def summary(adapter: Adapter) -> str:
    """The adapter in a few lines."""
    modules = Counter(name.removesuffix(".weight").rpartition(".")[2] for name in adapter.pairs)
    return console.heading("LoRA adapter") + console.pairs(
        [
            ("name", adapter.name),
            ("file", adapter.source),
            ("architecture", adapter.architecture or "not said"),
            ("parameters", console.number(adapter.parameters)),
            ("size", console.size(adapter.nbytes)),
            ("encodings", _values(pair.a.encoding.name for pair in adapter.pairs.values())),
            ("rank", _values(pair.rank for pair in adapter.pairs.values())),
            ("scale", _values(f"{pair.scale:.6g}" for pair in adapter.pairs.values())),
            ("modules", ", ".join(f"{count} x {name}" for name, count in modules.items())),
        ]
    )


def tensors(adapter: Adapter) -> str:
    """One line a weight."""
    return console.table(
        ("WEIGHT", "RANK", "SCALE", "A", "B", "ENCODING"),
        [
            (
                row["name"],
                row["rank"],
                f"{row['scale']:.6g}",
                *(" x ".join(map(str, row[k])) for k in "ab"),
                row["encoding"],
            )
            for row in _rows(adapter)
        ],
        right=("RANK", "SCALE"),
    )


def everything(adapter: Adapter) -> dict[str, Any]:
    """For JSON."""
    return {
        "adapter": adapter.name,
        "file": None if adapter.source is None else str(adapter.source),
        "architecture": adapter.architecture or None,
        "parameters": adapter.parameters,
        "nbytes": adapter.nbytes,
        "pairs": list(_rows(adapter)),
    }


def _rows(adapter: Adapter) -> Iterable[dict[str, Any]]:
    for name, pair in adapter.pairs.items():
        yield {
            "name": name,
            "rank": pair.rank,
            "scale": pair.scale,
            "a": list(pair.a.shape),
            "b": list(pair.b.shape),
            "encoding": pair.a.encoding.name,
        }


def _values(found: Iterable[object]) -> str:
    return ", ".join(map(str, dict.fromkeys(found)))
