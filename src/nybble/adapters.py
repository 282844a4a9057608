"""LoRA adapters as callers give them: paths, weights and names, in several ways.

A list is ``["pirate.gguf", ("folder", 0.5)]``: each is named after its file or folder. A mapping is by name,
``{"pirate": "pirate.gguf", "formal": ("folder", 0.5)}``, or has weights by path, ``{"pirate.gguf": 0.7}``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

from nybble.errors import DeviceError

if TYPE_CHECKING:
    from nybble.checkpoint.adapter import Adapter
    from nybble.checkpoint.checkpoint import Checkpoint
    from nybble.hub import ProgressCallback

    Source: TypeAlias = str | os.PathLike[str] | Adapter
    Given: TypeAlias = Source | tuple[Source, float] | float

MAX_WEIGHT = 1e4
_REMOTE = ("hf:", "pypi:", "http://", "https://")


def read_adapters(
    given: Mapping[str, Given] | Sequence[Given],
    *,
    progress: ProgressCallback | None = None,
    offline: bool | None = None,
) -> list[tuple[Adapter, float]]:
    """The adapters and their weights; a weight that is not given is 1.

    A path may be ``hf:owner/repo`` or another name of ``nybble.hub``; ``progress`` and ``offline`` as there.

    Raises:
        NotFoundError, DownloadError, FormatError, UnsupportedError: one of them cannot be read.
        ValueError: two have the same name, or a weight is no number from -10000 to 10000.
    """
    from nybble.checkpoint.adapter import Adapter

    rows: Iterable[tuple[str | None, Given]]
    if isinstance(given, Mapping):
        by_path = any(isinstance(item, (int, float)) for item in given.values())
        rows = ((None, (path, item)) for path, item in given.items()) if by_path else given.items()  # type: ignore[misc]
    elif isinstance(given, (str, os.PathLike)):
        raise ValueError(f"adapters must be a list or a mapping, not {given!r}: write [{given!r}]")
    else:
        rows = ((None, item) for item in given)
    found: list[tuple[Adapter, float]] = []
    for name, item in rows:
        source, weight = item if isinstance(item, tuple) else (item, 1.0)
        if not isinstance(source, (str, os.PathLike, Adapter)):
            raise ValueError(f"an adapter is a path or (path, weight), not {item!r}")
        if isinstance(source, Adapter):
            adapter = source if name is None else replace(source, name=name)
        else:
            adapter = _read(os.fspath(source), name, progress, offline)
        if any(adapter.name == other.name for other, _ in found):
            raise ValueError(
                f"two adapters are named {adapter.name!r}; give names: adapters={{'one': ..., 'other': ...}}"
            )
        found.append((adapter, checked_weight(adapter.name, weight)))
    return found


def checked_weight(name: str, weight: Any) -> float:
    """A weight as a float.

    Raises:
        ValueError: it is no number, or far from any that makes sense.
    """
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not abs(weight) <= MAX_WEIGHT:
        raise ValueError(
            f"the weight of adapter {name!r} must be a number up to {MAX_WEIGHT:g}, got {weight!r}"
        )
    assert math.isfinite(weight)
    return float(weight)


def with_read_adapters(
    checkpoint: Checkpoint, adapters: Sequence[tuple[Adapter, float]], device: str
) -> Checkpoint:
    """The checkpoint with adapters that a device applies while it runs.

    Raises:
        DeviceError: the device cannot.
        UnsupportedError: an adapter does not fit the model.
    """
    if not adapters:
        return checkpoint
    if device.partition(":")[0] == "onnxruntime":
        raise DeviceError(
            f"device {device!r} runs ONNX models as they are and cannot apply LoRA adapters: merge them into"
            " the model with nybble convert MODEL OUTPUT --adapter ADAPTER, or use device 'cpu'"
        )
    from nybble.checkpoint.apply_adapters import with_adapters

    return with_adapters(checkpoint, [adapter for adapter, _ in adapters])


def _read(source: str, name: str | None, progress: ProgressCallback | None, offline: bool | None) -> Adapter:
    from nybble.formats.adapter import read_adapter

    if not source.startswith(_REMOTE) or os.path.exists(source):
        return read_adapter(source, name)
    from nybble.hub import resolve

    path = resolve(source, progress=progress, offline=offline)
    # The folder in the cache has another name than the repository.
    last = source.partition("@")[0].rstrip("/").rpartition("/")[2]
    return read_adapter(path, name or last.removesuffix(".gguf"))
