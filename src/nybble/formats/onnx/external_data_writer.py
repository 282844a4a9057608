"""Writes initializers into one data file, one group after another, and says where each lies.

Offsets are aligned so that a reader can map the file and use the values in place. Nothing is kept
after it is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nybble.formats.output import Progress
from nybble.graph.onnx.nodes import Initializer, InitializerGroup

ALIGNMENT = 64
"""Of small tensors: a cache line."""
PAGE = 4096
"""Of tensors from ``LARGE`` bytes on."""
LARGE = 1 << 20


@dataclass(frozen=True)
class Placed:
    """Where an initializer's bytes lie in the data file."""

    initializer: Initializer
    offset: int


def place(groups: Sequence[InitializerGroup]) -> tuple[list[Placed], int]:
    """Where all initializers go, in order, and the size of the file."""
    placed: list[Placed] = []
    end = 0
    for group in groups:
        for number, item in enumerate(group.initializers):
            begin = _aligned(end, item.nbytes)
            placed.append(Placed(item, begin))
            placed += [Placed(alias, begin) for at, alias in group.aliases if at == number]
            end = begin + item.nbytes
    return placed, end


def write_external_data(
    groups: Sequence[InitializerGroup], path: Path, progress: Progress | None = None
) -> list[Placed]:
    """Makes and writes all data.

    Args:
        groups: what to write.
        path: the data file; it must not exist.
        progress: told after each initializer.

    Returns:
        All initializers with their offsets, aliases included.

    Raises:
        ValueError: a group made data of another size than it declared, or values that do not fit.
        OSError: the file cannot be written.
    """
    placed, total = place(groups)
    offsets = {item.initializer.name: item.offset for item in placed}
    with path.open("xb") as file:
        for group in groups:
            for item, chunk in _made(group):
                begin = offsets[item.name]
                file.write(bytes(begin - file.tell()))
                file.write(chunk.data)
                if progress is not None:
                    progress(begin + item.nbytes, total)
    return placed


def _made(group: InitializerGroup) -> Iterator[tuple[Initializer, npt.NDArray[np.uint8]]]:
    for item, array in zip(group.initializers, group.make(), strict=True):
        data = np.ascontiguousarray(array)
        if data.dtype.byteorder == ">" or data.nbytes != item.nbytes:
            raise ValueError(f"{item.name}: made {data.nbytes} bytes of {data.dtype}, declared {item.nbytes}")
        yield item, data.reshape(-1).view(np.uint8)


def _aligned(offset: int, nbytes: int) -> int:
    step = PAGE if nbytes >= LARGE else ALIGNMENT
    return -(-offset // step) * step
