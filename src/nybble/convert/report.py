"""Report: what a conversion did to each tensor, for people and as JSON."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nybble.convert.relation import Kind

_LAYER = re.compile(r"\.layers\.\d+\.")


@dataclass(frozen=True)
class TensorReport:
    """One tensor. Errors are differences of values between the source and what was written."""

    name: str
    shape: tuple[int, ...]
    source: str
    """Its encoding before."""
    target: str
    """Its encoding after."""
    relation: Kind
    how: str
    """``kept``, ``rows permuted, transcoded``, ..."""
    nbytes: int
    """Encoded size after."""
    max_error: float = 0.0
    rms_error: float = 0.0
    relative_error: float = 0.0
    """Root of the squared errors over that of the squared values."""

    @property
    def parameters(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def bits_per_weight(self) -> float:
        """Bits that a value takes after, scales included."""
        return 8 * self.nbytes / self.parameters if self.parameters else 0.0


@dataclass(frozen=True)
class Group:
    """Tensors of one kind that were treated alike."""

    name: str
    """``self_attn.q_proj.weight``, or several parted by commas."""
    source: str
    target: str
    relation: Kind
    how: str
    tensors: int
    nbytes: int
    parameters: int
    max_error: float
    """The largest of them all."""
    rms_error: float
    """The largest of them all."""
    relative_error: float
    """The largest of them all."""


@dataclass(frozen=True)
class Report:
    """What ``nybble.convert`` did."""

    source: str
    target: str
    to: str
    """``gguf``, ``safetensors`` or the name of an ONNX target."""
    tensors: tuple[TensorReport, ...]
    files: tuple[Path, ...] = ()
    """What was written, the manifest last."""
    notes: tuple[str, ...] = ()
    """What is worth knowing besides."""
    seconds: float = field(default=0.0, compare=False)

    @property
    def relation(self) -> Kind:
        """``exact`` if every tensor is."""
        return "exact" if all(tensor.relation == "exact" for tensor in self.tensors) else "lossy"

    @property
    def nbytes(self) -> int:
        """Encoded size of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def parameters(self) -> int:
        """Number of values in all tensors."""
        return sum(tensor.parameters for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Bits that a value takes, over all tensors."""
        return 8 * self.nbytes / self.parameters if self.parameters else 0.0

    def groups(self) -> list[Group]:
        """Tensors that were treated alike, in the order of the first of each."""
        alike: dict[tuple[str, str, str, str], list[TensorReport]] = {}
        for tensor in self.tensors:
            key = (tensor.source, tensor.target, tensor.relation, tensor.how)
            alike.setdefault(key, []).append(tensor)
        return [_group(members) for members in alike.values()]

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON can hold it."""
        return {
            "source": self.source,
            "target": self.target,
            "to": self.to,
            "relation": self.relation,
            "parameters": self.parameters,
            "nbytes": self.nbytes,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "seconds": round(self.seconds, 3),
            "files": [str(path) for path in self.files],
            "notes": list(self.notes),
            "tensors": [
                {**asdict(tensor), "shape": list(tensor.shape), "bits_per_weight": tensor.bits_per_weight}
                for tensor in self.tensors
            ],
        }

    def rows(self) -> Iterator[tuple[str, ...]]:
        """Lines of a table under ``HEADER``: tensors that were treated alike together."""
        return map(_row, self.groups())

    def tensor_rows(self) -> Iterator[tuple[str, ...]]:
        """Lines of a table under ``HEADER``, one a tensor."""
        return (_row(_group([tensor], tensor.name)) for tensor in self.tensors)

    HEADER = (
        "TENSORS",
        "COUNT",
        "FROM",
        "TO",
        "RELATION",
        "BITS/WEIGHT",
        "MAX ERROR",
        "RMS ERROR",
        "REL. ERROR",
        "HOW",
    )
    RIGHT = ("COUNT", "BITS/WEIGHT", "MAX ERROR", "RMS ERROR", "REL. ERROR")


def _row(group: Group) -> tuple[str, ...]:
    lossy = group.relation != "exact"
    return (
        group.name,
        str(group.tensors),
        group.source,
        group.target,
        group.relation,
        f"{8 * group.nbytes / group.parameters:.4g}" if group.parameters else "-",
        f"{group.max_error:.3g}" if lossy else "-",
        f"{group.rms_error:.3g}" if lossy else "-",
        f"{group.relative_error:.3g}" if lossy else "-",
        group.how,
    )


def _group(members: Sequence[TensorReport], name: str | None = None) -> Group:
    first = members[0]
    return Group(
        name=_common_name([tensor.name for tensor in members]) if name is None else name,
        source=first.source,
        target=first.target,
        relation=first.relation,
        how=first.how,
        tensors=len(members),
        nbytes=sum(tensor.nbytes for tensor in members),
        parameters=sum(tensor.parameters for tensor in members),
        max_error=max(tensor.max_error for tensor in members),
        rms_error=max(tensor.rms_error for tensor in members),
        relative_error=max(tensor.relative_error for tensor in members),
    )


def _common_name(names: Sequence[str]) -> str:
    """Kinds of tensors without their layer's number, the first three of them."""
    kinds = list(dict.fromkeys(_short(name) for name in names))
    more = f", and {len(kinds) - 3} kinds more" if len(kinds) > 3 else ""
    return ", ".join(kinds[:3]) + more


def _short(name: str) -> str:
    match = _LAYER.search(name)
    return (name[match.end() :] if match else name).removesuffix(".weight")
