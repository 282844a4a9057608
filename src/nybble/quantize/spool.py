"""Spool: quantized tensors on the disk until all are there, so that a kill costs at most one layer.

A folder beside the output, ``<output>.quantizing``:

    job.json       what the work depends on: a job of another fingerprint begins anew
    0007.bin       the encoded bytes of unit 7 (a layer; the last unit is all the rest), one after another
    0007.json      their names, shapes, encodings, places and errors; written after the bytes
    hidden.npz     the number of a layer and the hidden states before it, now and then
"""

from __future__ import annotations

import json
import math
import shutil
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nybble.checkpoint.encodings import encoding
from nybble.checkpoint.tensor import Bytes, Tensor
from nybble.convert.errors import ValueErrors
from nybble.convert.made import MadeTensor
from nybble.errors import FormatError, UnsupportedError
from nybble.formats.output import OutputError, require_space, staged_file

SUFFIX = ".quantizing"

_DAMAGED = (
    OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error,
    struct.error,
    RuntimeError,  # by zip files whose headers look like encryption or another compression
)  # fmt: skip
"""What NumPy raises about an .npz that is none."""


class Spool:
    """The folder of one job.

    Args:
        folder: made where it is missing; what is in it of another job is removed.
        fingerprint: of everything that the results depend on.

    Raises:
        FormatError: the folder is damaged, or something else's.
        OutputError: it cannot be made.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder
        self.resumed = False
        """Whether results of an earlier run of the same job were found."""
        job = folder / "job.json"
        if folder.is_dir():
            self.resumed = job.is_file() and _fingerprint_in(job) == fingerprint
            if not self.resumed:
                _remove(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{folder} cannot be made: {error}") from error
        if not self.resumed:
            with staged_file(job, overwrite=True) as stage:
                stage.write_text(json.dumps({"fingerprint": fingerprint}), encoding="ascii")
        self._units: dict[int, dict[str, MadeTensor]] = {}
        for path in sorted(folder.glob("[0-9]*.json")):
            if path.stem.isdecimal():
                self._units[int(path.stem)] = self._read(path)

    def unit(self, number: int) -> Mapping[str, MadeTensor] | None:
        """The tensors of a unit that is done."""
        return self._units.get(number)

    def write(self, number: int, made: Mapping[str, MadeTensor]) -> Mapping[str, MadeTensor]:
        """Keeps a unit; gives its tensors back, their bytes now on the disk."""
        place = self.folder / f"{number:04}.bin"
        rows: list[dict[str, Any]] = []
        at = 0
        require_space(self.folder, sum(item.tensor.nbytes for item in made.values()))
        with staged_file(place, overwrite=True) as stage, stage.open("wb") as file:
            for name, item in made.items():
                file.write(np.ascontiguousarray(item.tensor.data).data)
                rows.append(
                    {
                        "name": name,
                        "shape": list(item.tensor.shape),
                        "encoding": item.tensor.encoding.name,
                        "at": at,
                        "how": item.how,
                        "errors": vars(item.errors),
                    }
                )
                at += item.tensor.nbytes
        index = place.with_suffix(".json")
        with staged_file(index, overwrite=True) as stage:
            stage.write_text(json.dumps({"nbytes": at, "tensors": rows}), encoding="ascii")
        self._units[number] = self._read(index)
        return self._units[number]

    def tensors(self) -> dict[str, MadeTensor]:
        """Of all units."""
        return {name: item for unit in self._units.values() for name, item in unit.items()}

    def save_hidden(self, layer: int, hidden: npt.NDArray[np.float32]) -> None:
        """Keeps the hidden states before a layer."""
        require_space(self.folder, hidden.nbytes)
        with staged_file(self.folder / "hidden.npz", overwrite=True) as stage, stage.open("wb") as file:
            np.savez(file, layer=np.array(layer), hidden=hidden)

    def hidden(self) -> tuple[int, npt.NDArray[np.float32]] | None:
        """The last ones that were kept, and their layer."""
        path = self.folder / "hidden.npz"
        if not path.is_file():
            return None
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as found:
                layer, hidden = int(found["layer"]), found["hidden"]
                if hidden.dtype != np.float32 or hidden.ndim != 2:
                    raise ValueError(f"hidden states are {hidden.dtype} {hidden.shape}")
                return layer, hidden
        except _DAMAGED as error:
            raise self.damaged(path.name, error) from error

    def damaged(self, name: str, error: Exception) -> FormatError:
        """The error for a file of the spool that is not as it was written."""
        return FormatError(f"{self.folder / name}: is damaged ({error}); remove {self.folder} to begin anew")

    def remove(self) -> None:
        """The result is safe elsewhere."""
        _remove(self.folder)

    def _read(self, index: Path) -> dict[str, MadeTensor]:
        place = index.with_suffix(".bin")
        try:
            content = json.loads(index.read_bytes())
            if place.stat().st_size != content["nbytes"]:
                raise ValueError(f"{place.name} has {place.stat().st_size} bytes, not {content['nbytes']}")
            return {row["name"]: _made(place, row, content["nbytes"]) for row in content["tensors"]}
        except (OSError, ValueError, LookupError, TypeError, UnsupportedError) as error:
            raise self.damaged(index.name, error) from error


def _made(place: Path, row: Mapping[str, Any], end: int) -> MadeTensor:
    kind, shape, at = encoding(row["encoding"]), tuple(map(int, row["shape"])), int(row["at"])
    nbytes = kind.nbytes(math.prod(shape))
    if min(shape, default=1) < 0 or at < 0 or at + nbytes > end:
        raise ValueError(f"{row['name']} lies outside of {place.name}")

    def data() -> Bytes:
        return np.fromfile(place, np.uint8, nbytes, offset=at)

    return MadeTensor(Tensor(row["name"], shape, kind, data), row["how"], ValueErrors(**row["errors"]))


def _fingerprint_in(path: Path) -> str | None:
    try:
        found = json.loads(path.read_bytes())["fingerprint"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return found if isinstance(found, str) else None


def _remove(folder: Path) -> None:
    """Removes a spool; a folder that looks like none is not touched."""
    strange = [
        path.name
        for path in folder.iterdir()
        if path.name not in ("job.json", "hidden.npz")
        and path.suffix not in (".partial",)
        and not (path.stem.isdigit() and path.suffix in (".bin", ".json"))
    ]
    if strange:
        raise FormatError(
            f"{folder}: has {', '.join(strange[:3])}, which no quantization wrote; move it away"
        )
    shutil.rmtree(folder)
