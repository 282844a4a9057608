"""Importance matrices: how much each input column of each linear matters, in llama.cpp's file formats.

For every linear the sum over tokens of the squares of its input, and the number of tokens. Quantizers
weigh the error of column i with the mean of x_i ** 2.

=========  =====================================================================================
GGUF       ``general.type`` = ``imatrix``; for each linear float32 ``<name>.in_sum2`` (in_features)
           and ``<name>.counts`` (1: tokens); ``imatrix.datasets``, ``imatrix.chunk_count``,
           ``imatrix.chunk_size``. ``<name>.in_sum`` (sums of x), which newer versions add, is not read.
legacy     i32 entries; each: i32 length, name, i32 calls, i32 values, f32 values[]: the mean of squares
           times calls, a call being a chunk of text; then i32 chunks, i32 length, name of the text.
           Little-endian.
=========  =====================================================================================

Names in files are GGUF's, names here canonical. Source: llama.cpp, ``tools/imatrix/imatrix.cpp`` and
``tools/quantize/quantize.cpp``.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.encodings import encoding
from nybble.checkpoint.tensor import Tensor
from nybble.errors import FormatError, UnsupportedError
from nybble.formats.gguf.cursor import Cursor
from nybble.formats.gguf.metadata import GGUFMetadata
from nybble.formats.gguf.names import canonical_name, gguf_name
from nybble.formats.gguf.reader import GGUFFile
from nybble.formats.gguf.writer import write_file
from nybble.formats.mapping import map_file
from nybble.formats.output import staged_file
from nybble.quantize.statistics import InputStatistics

Format = Literal["gguf", "legacy"]

DEFAULT_CHUNK = 512
"""Tokens of a chunk where a file does not say: llama-imatrix's default."""
_SUM, _COUNTS = ".in_sum2", ".counts"
_MAX_NAME = 1 << 10


@dataclass(frozen=True)
class Importance:
    """What is known of one linear's input."""

    sum_squares: npt.NDArray[np.float64]
    """(in_features,): sum over tokens of x ** 2."""
    tokens: int

    @property
    def mean_squares(self) -> npt.NDArray[np.float32]:
        """(in_features,) float32: what quantizers weigh errors with."""
        return (self.sum_squares / max(self.tokens, 1)).astype(np.float32)


@dataclass(frozen=True)
class ImportanceMatrix:
    """The importance of every linear of a model, by the canonical name of its weight."""

    entries: Mapping[str, Importance]
    datasets: tuple[str, ...] = ()
    """Names of the texts that it was made from."""
    chunk_count: int = 0
    chunk_size: int = DEFAULT_CHUNK
    """Tokens."""

    @classmethod
    def from_statistics(
        cls,
        statistics: Mapping[str, InputStatistics],
        *,
        datasets: Sequence[str] = (),
        chunk_count: int = 0,
        chunk_size: int = DEFAULT_CHUNK,
    ) -> ImportanceMatrix:
        """What calibration saw, as far as an importance matrix holds it."""
        entries = {name: Importance(seen.sum_squares, seen.tokens) for name, seen in statistics.items()}
        return cls(entries, tuple(datasets), chunk_count, chunk_size)

    def weights(self, name: str) -> npt.NDArray[np.float32] | None:
        """(in_features,) float32, the mean of squares for a weight; None where nothing is known."""
        entry = self.entries.get(name)
        return None if entry is None else entry.mean_squares

    def digest(self) -> str:
        """sha256 of all names and numbers, as hexadecimal digits."""
        found = hashlib.sha256()
        for name, entry in sorted(self.entries.items()):
            found.update(f"{name} {entry.tokens} ".encode() + entry.sum_squares.astype("<f8").tobytes())
        return found.hexdigest()

    def check(self, checkpoint: Checkpoint) -> None:
        """Whether it belongs to a model.

        Raises:
            UnsupportedError: it has a tensor that the model lacks, or of another size.
        """
        for name, entry in self.entries.items():
            tensor = checkpoint.tensors.get(name)
            columns = len(entry.sum_squares)
            if tensor is None or len(tensor.shape) != 2 or tensor.shape[1] != columns:
                found = "no such tensor" if tensor is None else f"the shape {tensor.shape}"
                raise UnsupportedError(
                    f"the importance matrix has {columns} columns for {name}, but the model has {found}:"
                    " it was made from another model"
                )


# -- reading -------------------------------------------------------------------------------------------


def read_importance(path: str | os.PathLike[str], architecture: str) -> ImportanceMatrix:
    """An importance matrix that llama.cpp or nybble wrote, in either format.

    Args:
        path: the file.
        architecture: the model's, ``ModelConfig.architecture``: it says what names mean.

    Raises:
        NotFoundError: there is no such file.
        FormatError: it is none, or is damaged.
        UnsupportedError: it has tensors that a model of this architecture does not have.
    """
    path = Path(path)
    data = map_file(path, "an importance matrix")
    try:
        is_gguf = data[:4] == b"GGUF"
        cursor = Cursor(data[:], str(path), "little")
    finally:
        data.close()
    if is_gguf:
        with GGUFFile.open(path) as file:
            return _from_gguf(file, str(path), architecture)
    return _from_legacy(cursor, architecture)


def _from_gguf(file: GGUFFile, where: str, architecture: str) -> ImportanceMatrix:
    kind = file.metadata.get("general.type")
    if kind != "imatrix":
        raise FormatError(f"{where}: general.type is {kind!r}; an importance matrix has 'imatrix'")
    entries: dict[str, Importance] = {}
    for full in file.tensors:
        if full.endswith(_COUNTS):
            if full.removesuffix(_COUNTS) + _SUM not in file.tensors:
                raise FormatError(f"{where}: {full} has no {_SUM[1:]} beside it")
            continue
        if not full.endswith(_SUM):
            continue
        name = full.removesuffix(_SUM)
        counts = file.tensors.get(name + _COUNTS)
        if counts is None:
            raise FormatError(f"{where}: {full} has no {_COUNTS[1:]} beside it")
        sums, tokens = _floats(file.tensors[full], where), _floats(counts, where)
        if tokens.size != 1:
            raise UnsupportedError(f"{where}: {name} has {tokens.size} experts; nybble knows none")
        count = float(tokens[0])
        if not (count >= 0 and count < 2**63):
            raise FormatError(f"{where}: {full.removesuffix(_SUM)}{_COUNTS} is {count}")
        entries[_canonical(architecture, name, where)] = _importance(sums, round(count), name, where)
    if not entries:
        raise FormatError(f"{where}: holds no sums of any tensor")
    datasets = file.metadata.get("imatrix.datasets", ())
    return ImportanceMatrix(
        entries,
        tuple(str(name) for name in datasets) if isinstance(datasets, Sequence) else (),
        _whole(file.metadata.get("imatrix.chunk_count"), 0),
        _whole(file.metadata.get("imatrix.chunk_size"), DEFAULT_CHUNK),
    )


def _floats(tensor: Tensor, where: str) -> npt.NDArray[np.float32]:
    if tensor.encoding.name != "f32":
        raise FormatError(f"{where}: {tensor.name} is {tensor.encoding.name}, not f32")
    return tensor.dequantize().reshape(-1)


def _whole(value: object, default: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else default


def _from_legacy(cursor: Cursor, architecture: str) -> ImportanceMatrix:
    where = cursor.source
    count = cursor.u32("the number of entries")
    if not 0 < count <= cursor.remaining // 13:
        raise cursor.error(f"{count} entries: not an importance matrix, or damaged", 0)
    entries: dict[str, Importance] = {}
    for _ in range(count):
        name = _legacy_string(cursor, "a tensor's name")
        calls = cursor.u32(f"the calls of {name}")
        size = cursor.u32(f"the number of values of {name}")
        if not size or calls >= 2**31:
            raise cursor.error(f"{name} has {size} values of {calls} calls")
        cursor.need(4 * size, f"the values of {name}")
        values = np.frombuffer(cursor.data, "<f4", size, cursor.position)
        cursor.position += 4 * size
        calls = max(calls, 1)  # llama.cpp takes the values as they are where nothing was called
        tokens = calls * DEFAULT_CHUNK
        sums = values.astype(np.float64) / calls * tokens
        entries[_canonical(architecture, name, where)] = _importance(sums, tokens, name, where)
    chunks, datasets = 0, []
    if cursor.remaining:  # the oldest files end here
        chunks = cursor.u32("the number of chunks")
        datasets = [_legacy_string(cursor, "the name of the text")] if cursor.remaining else []
    return ImportanceMatrix(entries, tuple(filter(None, datasets)), chunks, DEFAULT_CHUNK)


def _legacy_string(cursor: Cursor, what: str) -> str:
    start = cursor.position
    length = cursor.u32(what)
    if length > _MAX_NAME:
        raise cursor.error(f"{what} is {length} bytes long; at most {_MAX_NAME} are allowed", start)
    cursor.need(length, what)
    text = cursor.data[cursor.position : cursor.position + length]
    cursor.position += length
    try:
        return text.decode()
    except UnicodeDecodeError:
        raise cursor.error(f"{what} is not UTF-8", start) from None


def _importance(sums: npt.NDArray[np.floating], tokens: int, name: str, where: str) -> Importance:
    if not np.isfinite(sums).all() or sums.min() < 0:
        raise FormatError(f"{where}: {name} has sums of squares that are negative or not finite")
    return Importance(sums.astype(np.float64), tokens)


def _canonical(architecture: str, name: str, where: str) -> str:
    try:
        found = canonical_name(architecture, name)
    except UnsupportedError as error:
        raise UnsupportedError(f"{where}: {error}") from None
    if found is None:
        raise FormatError(f"{where}: {name} is no weight of a linear")
    return found


# -- writing -------------------------------------------------------------------------------------------


def write_importance(
    matrix: ImportanceMatrix,
    path: str | os.PathLike[str],
    architecture: str,
    *,
    file_format: Format = "gguf",
    overwrite: bool = False,
) -> None:
    """Writes an importance matrix as llama.cpp reads it; the same matrix gives the same bytes.

    The legacy format has no place for numbers of tokens: ``tokens / chunk_size``, rounded up, takes it.

    Raises:
        OutputError: the file exists and ``overwrite`` is False, or it cannot be written.
        UnsupportedError: GGUF has no name for a tensor.
    """
    named = sorted((gguf_name(architecture, name), entry) for name, entry in matrix.entries.items())
    with staged_file(Path(path), overwrite=overwrite) as stage:
        if file_format == "gguf":
            metadata = GGUFMetadata(
                {
                    "general.type": "imatrix",
                    "imatrix.datasets": list(matrix.datasets),
                    "imatrix.chunk_count": matrix.chunk_count,
                    "imatrix.chunk_size": matrix.chunk_size,
                },
                {"imatrix.datasets": "array[string]"},
            )
            write_file(stage, metadata, [tensor for name, entry in named for tensor in _tensors(name, entry)])
        else:
            stage.write_bytes(b"".join(_legacy_bytes(matrix, named)))


def _tensors(name: str, entry: Importance) -> Iterator[Tensor]:
    for suffix, values in ((_SUM, entry.sum_squares), (_COUNTS, np.array([entry.tokens]))):
        data = values.astype("<f4")
        yield Tensor(name + suffix, data.shape, encoding("f32"), data.view(np.uint8))


def _legacy_bytes(matrix: ImportanceMatrix, named: Sequence[tuple[str, Importance]]) -> Iterator[bytes]:
    yield struct.pack("<i", len(named))
    for name, entry in named:
        calls = max(1, math.ceil(entry.tokens / max(matrix.chunk_size, 1)))
        values = (entry.sum_squares / max(entry.tokens, 1) * calls).astype("<f4")
        encoded = name.encode()
        yield struct.pack("<i", len(encoded)) + encoded + struct.pack("<ii", calls, len(values))
        yield values.tobytes()
    text = (matrix.datasets[-1] if matrix.datasets else "").encode()
    yield struct.pack("<ii", matrix.chunk_count, len(text)) + text


def format_of(path: str | os.PathLike[str]) -> Format:
    """The format that a file's name asks for: legacy for ``.dat``, else GGUF."""
    return "legacy" if re.fullmatch(r".*\.(dat|imatrix)", os.fspath(path).lower()) else "gguf"
