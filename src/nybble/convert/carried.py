"""What a format has no place for, carried beside it, so that the way back restores it.

Part ``carried`` of a manifest, by the format that it belongs to:

- ``gguf``: the metadata keys in order and with their types (``tokenizer.*`` only where the target's
  tokenizer files do not give them back), the order of the tensors and their encodings, and where in
  ``nybble.blocks`` the record of each tensor is that became plain numbers.
- ``huggingface`` and ``onnx``: the metadata that their readers found (config.json, generation_config.json,
  genai_config.json).

``nybble.blocks`` holds, one after another and without any header of its own, for each piece of a tensor:
the blocks' headers if there are any, places of blocks (u32), those blocks whole (``blocks.py``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.encodings import Encoding, encoding
from nybble.checkpoint.encodings.base import Bytes, Floats
from nybble.checkpoint.forms import ROPE_FREQS
from nybble.checkpoint.tensor import Tensor
from nybble.convert.blocks import REBUILDABLE, Record, header_bytes, kept, rebuilt
from nybble.convert.choice import Choice
from nybble.convert.manifest import BLOCKS_NAME
from nybble.convert.relation import PLAIN_FLOATS, Look
from nybble.convert.threads import in_order
from nybble.errors import FormatError, NybbleError
from nybble.formats.gguf.metadata import GGUFMetadata
from nybble.formats.mapping import release_pages
from nybble.text.tokenizer import GGUFTokenizerSource

_TOKENIZER = "tokenizer."
_PREFIXES = {"safetensors": "huggingface", "onnx": "onnx"}


# -- keeping blocks ------------------------------------------------------------------------------------


class BlockKeeper:
    """Writes ``nybble.blocks`` while tensors go by, each one's record once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index: dict[str, dict[str, Any]] = {}
        """By canonical name: encoding, offset in the file, and for each piece its number of blocks,
        whether it has headers, and how many blocks are whole."""
        self._file: BinaryIO | None = None
        self._position = 0

    def of(self, tensor: Tensor) -> Look | None:
        """What wants to see the pieces of a tensor; None where its record is there already."""
        if tensor.name in self.index or tensor.encoding.name not in REBUILDABLE:
            return None
        pieces: list[list[int]] = []
        entry = {"encoding": tensor.encoding.name, "offset": self._position, "pieces": pieces}
        self.index[tensor.name] = entry
        return _Keeping(tensor.encoding, self.write, pieces)

    def write(self, data: Bytes) -> None:
        """Appends to the file, which is made when there is something to write."""
        if not data.size:
            return
        if self._file is None:
            self._file = self.path.open("wb")
        self._file.write(np.ascontiguousarray(data).data)
        self._position += data.size

    def close(self) -> list[Path]:
        """Ends the file; returns it unless nothing had to be kept."""
        if self._file is None:
            return []
        self._file.close()
        return [self.path]


@dataclass(frozen=True)
class _Keeping:
    """Makes the records of one tensor's pieces."""

    row: Encoding
    write: Callable[[Bytes], None]
    pieces: list[list[int]]

    def see(self, part: Bytes, values: Floats) -> Record:
        return kept(self.row, values, part)

    def take(self, made: Record) -> None:
        if made.headers is not None:
            self.write(made.headers)
        self.write(made.places.astype("<u4").view(np.uint8))
        self.write(made.whole)
        self.pieces.append([made.count, int(made.headers is not None), len(made.places)])


def _records(entry: Mapping[str, Any], row: Encoding, data: Bytes) -> Iterator[Record]:
    """The records of a tensor's pieces, checked against the file's size."""
    position = _integer(entry.get("offset"))
    for piece in _list(entry.get("pieces")):
        count, has_headers, places = (_integer(item) for item in _list(piece))
        sizes = (has_headers and count * header_bytes(row), 4 * places, places * row.block_bytes)
        parts = []
        for size in sizes:
            part = data[position : position + size]
            if part.size != size:
                raise FormatError(f"{BLOCKS_NAME}: is too short: the manifest belongs to another one")
            parts.append(part)
            position += size
        where = parts[1].view("<u4").astype(np.int64)
        if (where >= count).any():
            raise FormatError(f"{BLOCKS_NAME}: names a block that its piece does not have")
        headers = parts[0].reshape(count, -1) if has_headers else None
        yield Record(count, headers, where, parts[2].reshape(places, row.block_bytes))


# -- what goes into the manifest -----------------------------------------------------------------------


def carried_from(
    source: Checkpoint,
    to: str,
    *,
    earlier: Mapping[str, Any],
    generated_tokenizer: Mapping[str, object],
    blocks: Mapping[str, Any],
) -> dict[str, Any]:
    """The part ``carried`` of the manifest of an output in the format ``to``.

    Args:
        source: the checkpoint as it was read.
        to: ``gguf``, ``safetensors`` or ``onnx``.
        earlier: that part of the source's own manifest; what it has for other formats goes on.
        generated_tokenizer: the GGUF keys that the output's tokenizer files give back.
        blocks: ``BlockKeeper.index``.
    """
    result = {key: value for key, value in earlier.items() if key != _PREFIXES.get(to, to) and key != "gguf"}
    gguf = earlier.get("gguf")
    if to != "gguf":
        if isinstance(source.metadata, GGUFMetadata) and source.format == "gguf":
            result["gguf"] = _gguf_part(source, generated_tokenizer, blocks)
        elif isinstance(gguf, dict) and "metadata" in gguf:
            result["gguf"] = {"metadata": gguf["metadata"]}
    own = _PREFIXES.get(source.format)
    if own is not None and own != _PREFIXES.get(to):
        found = {
            key: value
            for key, value in source.metadata.items()
            if key.startswith(f"{own}.") and _is_json(value)
        }
        if found:
            result[own] = found
    return result


def _gguf_part(
    source: Checkpoint, generated: Mapping[str, object], blocks: Mapping[str, Any]
) -> dict[str, Any]:
    metadata = source.metadata
    assert isinstance(metadata, GGUFMetadata)
    rows: list[dict[str, Any]] = []
    for key, value in metadata.items():
        if key.startswith("split."):
            continue
        if key.startswith(_TOKENIZER) and key in generated and _equal(value, generated[key]):
            row: dict[str, Any] = {"key": key, "tokenizer": True}
            if key in metadata.types:
                row["type"] = metadata.types[key]
            rows.append(row)
            continue
        for row in GGUFMetadata({key: value}, {key: metadata.types.get(key, "")}).to_json(leave_out=()):
            if _is_json(row["value"]):
                rows.append({name: item for name, item in row.items() if item != "" or name == "value"})
    part: dict[str, Any] = {
        "metadata": rows,
        "encodings": {name: tensor.encoding.name for name, tensor in source.tensors.items()},
        "blocks": dict(blocks),
    }
    if source.config.rope.frequency_factors:
        part["rope_freqs"] = list(source.config.rope.frequency_factors)
    return part


def _is_tokenizer(key: object) -> bool:
    return isinstance(key, str) and key.startswith(_TOKENIZER)


def _equal(one: object, other: object) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return isinstance(one, str) and one == other
    if isinstance(one, (Sequence, np.ndarray)) and isinstance(other, (Sequence, np.ndarray)):
        if len(one) != len(other):
            return False
        if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
            return bool(np.array_equal(np.asarray(one), np.asarray(other)))
        return all(a == b for a, b in zip(one, other, strict=True))
    return type(one) is type(other) and one == other


def _is_json(value: object) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


# -- the way back --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Restored:
    """A checkpoint with what its manifest carried for a target."""

    checkpoint: Checkpoint
    preferred: Mapping[str, str]
    """The encodings that the tensors had in GGUF, by canonical name."""
    rebuilt: frozenset[str]
    """Tensors that are blocks again."""


def restored(
    checkpoint: Checkpoint,
    carried: Mapping[str, Any],
    folder: Path,
    to: str,
    *,
    unchanged: bool,
    choice: Choice,
) -> Restored:
    """The checkpoint with the metadata of the target's format, and GGUF's blocks if that is the target.

    Args:
        checkpoint: as it was read.
        carried: of the manifest beside it.
        folder: where ``nybble.blocks`` is.
        to: ``gguf``, ``safetensors`` or ``onnx``.
        unchanged: the files are those that the manifest was written for; otherwise every rebuilt
            tensor is compared with its values first, and left as it is where they differ.
        choice: tensors for which it names another encoding than they had stay as they are.
    """
    if to != "gguf":
        extra = carried.get(_PREFIXES[to])
        if not isinstance(extra, dict):
            return Restored(checkpoint, {}, frozenset())
        return Restored(replace(checkpoint, metadata={**extra, **checkpoint.metadata}), {}, frozenset())
    part = carried.get("gguf")
    if not isinstance(part, dict):
        return Restored(checkpoint, {}, frozenset())
    checkpoint = _with_gguf_metadata(checkpoint, part, tokenizer=unchanged)
    preferred = {n: e for n, e in _object(part.get("encodings")).items() if isinstance(e, str)}
    index = {
        name: entry
        for name, entry in _object(part.get("blocks")).items()
        if (choice.named(name) or choice.encoding) in (None, preferred.get(name))
    }
    blocks = _rebuilt_tensors(checkpoint, index, folder, unchanged=unchanged)
    # The order of the GGUF file, so that the same file can come out.
    names = [name for name in preferred if name in checkpoint.tensors]
    names += [name for name in checkpoint.tensors if name not in preferred]
    tensors = {name: blocks.get(name, checkpoint.tensors[name]) for name in names}
    changed = replace(checkpoint, tensors=tensors, format="gguf" if preferred else checkpoint.format)
    return Restored(changed, preferred, frozenset(blocks))


def _with_gguf_metadata(checkpoint: Checkpoint, part: Mapping[str, Any], *, tokenizer: bool) -> Checkpoint:
    """``tokenizer`` False: its files may have changed since, so that its keys are made anew."""
    rows = part.get("metadata")
    if not isinstance(rows, list):
        return checkpoint
    if not tokenizer:
        rows = [row for row in rows if not (isinstance(row, dict) and _is_tokenizer(row.get("key")))]
    generated: Mapping[str, object] = {}
    if any(isinstance(row, dict) and row.get("tokenizer") for row in rows):
        from nybble.text.write_gguf import gguf_tokenizer_metadata

        generated = gguf_tokenizer_metadata(checkpoint)
    full = []
    for row in rows:
        if isinstance(row, dict) and row.get("tokenizer"):
            if row.get("key") in generated:
                full.append({**row, "value": generated[row["key"]]})
        else:
            full.append(row)
    found = GGUFMetadata.from_json(full)
    values: dict[str, object] = dict(found)
    freqs = part.get("rope_freqs")
    if isinstance(freqs, list):
        values[ROPE_FREQS] = freqs
    metadata = GGUFMetadata(values, found.types)
    name = values.get("general.name")
    known = "tokenizer.ggml.model" in values
    return replace(
        checkpoint,
        metadata=metadata,
        tokenizer=GGUFTokenizerSource(metadata) if known else checkpoint.tokenizer,
        name=name if isinstance(name, str) else checkpoint.name,
    )


def _rebuilt_tensors(
    checkpoint: Checkpoint, index: Mapping[str, Any], folder: Path, *, unchanged: bool
) -> dict[str, Tensor]:
    """Tensors of plain numbers as the blocks that they were, where that is still what they are."""
    path = folder / BLOCKS_NAME
    has_file = path.is_file() and path.stat().st_size > 0
    data = np.memmap(path, np.uint8, "r") if has_file else np.empty(0, np.uint8)
    found: dict[str, Tensor] = {}
    for name, entry in index.items():
        tensor = checkpoint.tensors.get(name)
        if tensor is None or tensor.encoding.name not in PLAIN_FLOATS or not isinstance(entry, dict):
            continue
        kind = entry.get("encoding")
        if kind not in REBUILDABLE:
            continue
        row = encoding(kind)
        if tensor.shape[-1] % row.block_size:
            continue
        candidate = _rebuilt(tensor, row, entry, data)
        if unchanged or _same_values(candidate, tensor):
            found[name] = candidate
    return found


def _rebuilt(tensor: Tensor, row: Encoding, entry: Mapping[str, Any], kept_data: Bytes) -> Tensor:
    per_block = tensor.encoding.nbytes(row.block_size)

    def data() -> Bytes:
        source = tensor.data

        def pieces() -> Iterator[tuple[Record, Bytes]]:
            block = 0
            for record in _records(entry, row, kept_data):
                yield record, source[block * per_block : (block + record.count) * per_block]
                block += record.count
            if block * per_block != source.size:
                raise FormatError(f"{tensor.name}: {BLOCKS_NAME} has a record of {block} blocks, not of all")

        def work(piece: tuple[Record, Bytes]) -> Bytes:
            record, part = piece
            values = tensor.encoding.dequantize(part)
            if values.size != record.count * row.block_size:
                raise FormatError(f"{tensor.name}: {BLOCKS_NAME} has records of more blocks than there are")
            return rebuilt(row, values, record)

        return np.concatenate([np.empty(0, np.uint8), *in_order(work, pieces())])

    return tensor.changed(encoding=row, data=data)


def _same_values(candidate: Tensor, tensor: Tensor) -> bool:
    """Whether two tensors of other encodings decode to the same, some blocks at a time."""
    row, plain = candidate.encoding, tensor.encoding
    step = (1 << 18) // row.block_size
    try:
        one, other = candidate.data, tensor.data
        for start in range(0, one.size // row.block_bytes, step):
            stop = start + step
            blocks = one[start * row.block_bytes : stop * row.block_bytes]
            values = other[plain.nbytes(start * row.block_size) : plain.nbytes(stop * row.block_size)]
            if not np.array_equal(row.dequantize(blocks), plain.dequantize(values), equal_nan=True):
                return False
        return True
    except (NybbleError, ValueError):
        return False
    finally:
        release_pages()


def _object(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise FormatError("the manifest's record of blocks is broken")
    return value


def _integer(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**48:
        raise FormatError("the manifest's record of blocks is broken")
    return value
