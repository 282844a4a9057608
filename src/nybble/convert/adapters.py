"""Adapters in conversions: merged into a model, or converted themselves."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from nybble.checkpoint.adapter import EMBEDDING, OUTPUT, Adapter, fitted, interleaved_in_gguf
from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.config import ModelConfig
from nybble.checkpoint.encodings import encoding as encoding_of
from nybble.checkpoint.forms import Change
from nybble.checkpoint.merge_adapters import PLAIN, merge_adapters, merged_names
from nybble.checkpoint.tensor import Tensor
from nybble.convert.choice import Choice
from nybble.convert.errors import ValueErrors
from nybble.convert.manifest import FileHash, Manifest, hash_file, manifest_path, tensor_entries
from nybble.convert.report import Report, TensorReport
from nybble.convert.rules import Rules
from nybble.errors import ConversionError, UnsupportedError
from nybble.formats.adapter import read_adapter
from nybble.formats.gguf.adapter import with_one_alpha, write_gguf_adapter
from nybble.formats.huggingface.adapter import write_peft_adapter

if TYPE_CHECKING:
    from nybble.adapters import Given
    from nybble.hub import ProgressCallback

FORMATS = ("gguf", "safetensors")
_PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")


# -- merging -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Merge:
    """A model with adapters in it, and what a conversion has to know about them."""

    checkpoint: Checkpoint
    """Changed tensors are f32, so that they are rounded once, and the report tells by how much."""
    choice: Choice
    """The caller's, with the encodings that changed tensors had wherever the caller names none."""
    names: frozenset[str] = frozenset()
    """Tensors that adapters changed."""
    made: frozenset[str] = frozenset()
    """Tensors that somebody made in place of the source's."""
    inputs: tuple[FileHash, ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)

    def changes(self, of_the_form: Mapping[str, Change]) -> dict[str, Change]:
        """What was done to tensors before their encodings change, merging included."""
        merged = {name: Change(name, "adapters merged") for name in self.names}
        for name, change in of_the_form.items():
            if name in merged:
                merged[name] = replace(change, what=f"adapters merged, {change.what}")
            else:
                merged[name] = change
        return merged

    def with_tensors(self, tensors: Mapping[str, Tensor], *, removed: Collection[str] = ()) -> Merge:
        """The same with tensors in place of the source's, or besides."""
        kept = {name: tensor for name, tensor in self.checkpoint.tensors.items() if name not in removed}
        checkpoint = replace(self.checkpoint, tensors={**kept, **tensors})
        return replace(self, checkpoint=checkpoint, made=self.made | frozenset(tensors))

    def without(self, carried: Mapping[str, Any]) -> dict[str, Any]:
        """What a manifest carried, without the blocks and encodings of tensors that are others now."""
        part = carried.get("gguf")
        changed = self.names | self.made
        if not changed or not isinstance(part, dict):
            return dict(carried)
        kept = dict(part)
        for key in ("blocks", "encodings"):
            if isinstance(part.get(key), dict):
                kept[key] = {name: value for name, value in part[key].items() if name not in changed}
        return {**carried, "gguf": kept}


def merged(
    read: Checkpoint,
    given: Mapping[str, Given] | Sequence[Given],
    rules: Rules,
    choice: Choice,
    *,
    progress: ProgressCallback | None = None,
    offline: bool | None = None,
) -> Merge:
    """The model with adapters merged; see ``nybble.adapters`` for how they are given.

    Raises:
        ConversionError: quantized weights would change and nobody says what they become.
    """
    from nybble.adapters import read_adapters

    adapters = dict(read_adapters(given, progress=progress, offline=offline)) if given else {}
    if not adapters:
        return Merge(read, choice)
    names = merged_names(adapters)
    targets: dict[str, str] = {}
    unsaid: set[str] = set()
    for name in sorted(names):
        tensor = read.tensors.get(name) or read.tensors.get(EMBEDDING)
        if (
            tensor is None
            or rules.prescribes
            or choice.encoding is not None
            or choice.named(name) is not None
        ):
            continue
        if tensor.encoding.name not in PLAIN and not choice.allow_lossy:
            unsaid.add(name)
        elif rules.holds(tensor, tensor.encoding):
            targets[name] = tensor.encoding.name
    return Merge(
        merge_adapters(read, adapters, encoding=dict.fromkeys(names - unsaid, "f32")),
        replace(choice, encodings={**choice.encodings, **targets}),
        names,
        inputs=tuple(item for adapter in adapters for item in _hashes(adapter)),
        recipe={"adapters": {adapter.name: weight for adapter, weight in adapters.items()}},
    )


def _hashes(adapter: Adapter) -> Iterator[FileHash]:
    for path in _files(adapter):
        yield hash_file(path, f"{adapter.name}/{path.name}" if len(_files(adapter)) > 1 else path.name)


def _files(adapter: Adapter) -> list[Path]:
    source = adapter.source
    if source is None:
        return []
    return [source / name for name in _PEFT_FILES] if source.is_dir() else [source]


# -- adapters themselves -------------------------------------------------------------------------------


def convert_adapter(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    to: str,
    base: str | os.PathLike[str] | None = None,
    encoding: str | None = None,
    allow_lossy: bool = False,
    overwrite: bool = False,
    offline: bool | None = None,
) -> Report:
    """A LoRA adapter from one format to another.

    Args:
        source: a PEFT folder or a GGUF file.
        target: the GGUF file or the folder to write.
        to: ``gguf`` or ``safetensors`` (a PEFT folder).
        base: the model that it belongs to, as for ``nybble.load``. Needed to write GGUF from a PEFT folder,
            and where q's and k's rows change their order (llama, mistral and smollm3 in GGUF).
        encoding: what the matrices become: f32, f16 or bf16, and in GGUF any type that divides their rows.
            None: each keeps its own.
        allow_lossy: where pairs have different alphas, multiply B for a GGUF file, which has one.
        overwrite: replace a target that exists.
        offline: True: never download the base; None: what the environment says.

    Raises:
        ConversionError: something would be lost, or ``base`` is needed.
        UnsupportedError: another target, or the adapter does not fit the base.
    """
    started = perf_counter()
    if to not in FORMATS:
        raise UnsupportedError(f"an adapter can be written as {' or '.join(FORMATS)}, not as {to}")
    read = read_adapter(source)
    output = Path(target)
    config = None if base is None else _base_config(read, base, offline)
    ordered = _in_form(read, to, config)
    formed = with_one_alpha(ordered) if to == "gguf" and allow_lossy else ordered
    if encoding is not None:
        formed = _recoded(formed, encoding)
    elif to == "safetensors":
        _check_plain(formed)
    reports = tuple(_reports(read, ordered, formed))
    inputs = tuple(hash_file(path) for path in _files(read))
    from nybble.convert.convert import check_target, staged_output

    if overwrite:
        check_target(output, read.source, folder=to != "gguf")
    with staged_output(output, overwrite=overwrite, folder=to != "gguf") as stage:
        write = write_gguf_adapter if to == "gguf" else write_peft_adapter
        files = write(formed, stage.path)
        outputs = tuple(hash_file(path, output.name if to == "gguf" else path.name) for path in files)
        recipe = {"to": to, "encoding": encoding, "allow_lossy": allow_lossy or None}
        recipe = {key: value for key, value in recipe.items() if value is not None}
        stage.finish(Manifest(inputs, outputs, recipe, tensor_entries(reports)).to_bytes())
    written = [output.parent / item.name if to == "gguf" else output / item.name for item in outputs]
    return Report(
        source=os.fspath(source),
        target=os.fspath(target),
        to=to,
        tensors=reports,
        files=(*written, manifest_path(output)),
        notes=_notes(formed, to, config),
        seconds=perf_counter() - started,
    )


def _notes(adapter: Adapter, to: str, config: ModelConfig | None) -> tuple[str, ...]:
    if to != "gguf" or config is None or not config.tie_word_embeddings:
        return ()
    if not {EMBEDDING, OUTPUT} & adapter.pairs.keys():
        return ()
    return ("llama.cpp crashes with adapters of the embedding or the output matrix where the two are one",)


def _base_config(adapter: Adapter, base: str | os.PathLike[str], offline: bool | None) -> ModelConfig:
    from nybble.hub import resolve
    from nybble.loading import read_checkpoint

    model = read_checkpoint(resolve(os.fspath(base), offline=offline))
    fitted(adapter, model.config, model.tensors)
    return model.config


def _in_form(adapter: Adapter, to: str, config: ModelConfig | None) -> Adapter:
    """The adapter with the target's order of rows, and with an architecture where that is needed."""
    architecture = adapter.architecture or ("" if config is None else config.architecture)
    if to == "gguf" and not architecture:
        raise ConversionError(
            f"adapter {adapter.name!r} does not say which architecture it is for, and a GGUF file must:"
            " name the model that it belongs to (--base MODEL)"
        )
    interleaved = to == "gguf" and interleaved_in_gguf(architecture)
    if config is None and adapter.has_rotated and adapter.interleaved != interleaved:
        raise ConversionError(
            f"adapter {adapter.name!r} changes q or k, whose rows have another order in {to} files; how"
            " depends on the size of the heads: name the model that it belongs to (--base MODEL)"
        )
    if config is not None:
        adapter = adapter.with_rows(config, interleaved=interleaved)
    return replace(adapter, architecture=architecture, interleaved=interleaved)


def _check_plain(adapter: Adapter) -> None:
    for name, pair in adapter.pairs.items():
        for tensor in (pair.a, pair.b):
            if tensor.encoding.name not in PLAIN:
                raise ConversionError(
                    f"{name}: is {tensor.encoding.name}, which PEFT folders cannot hold; name an encoding"
                    " (f32 holds the same values)"
                )


def _recoded(adapter: Adapter, kind: str) -> Adapter:
    row = encoding_of(kind)
    quantize = row.quantize
    if quantize is None:
        raise UnsupportedError(f"nybble cannot write {kind}; f32, f16 and bf16 suit adapters")

    def recoded(tensor: Tensor) -> Tensor:
        if tensor.encoding.name == kind:
            return tensor
        if tensor.shape[-1] % row.block_size:
            raise ConversionError(f"{tensor.name}: rows of {tensor.shape[-1]} elements do not fit {kind}")
        assert quantize is not None
        return tensor.changed(encoding=row, data=quantize(tensor.dequantize().reshape(-1)))

    pairs = {
        name: replace(pair, a=recoded(pair.a), b=recoded(pair.b)) for name, pair in adapter.pairs.items()
    }
    return replace(adapter, pairs=pairs)


def _reports(read: Adapter, ordered: Adapter, written: Adapter) -> Iterator[TensorReport]:
    """What became of each matrix; ``ordered`` is what was read with the target's order of rows."""
    for name, pair in written.pairs.items():
        old, before = read.pairs[name], ordered.pairs[name]
        # What with_one_alpha takes from the scale is no error of B.
        factor = before.scale / pair.scale if pair.scale else 1.0
        module = name.removesuffix(".weight")
        yield _report(f"{module}.lora_A.weight", before.a, pair.a, moved=False, factor=1.0)
        moved = before.b is not old.b
        yield _report(f"{module}.lora_B.weight", before.b, pair.b, moved=moved, factor=factor)


def _report(name: str, old: Tensor, new: Tensor, *, moved: bool, factor: float) -> TensorReport:
    how = ["rows permuted"] if moved else []
    errors = ValueErrors()
    if new is not old:
        # In float64: that a factor rounds is what is measured.
        meant: Any = old.dequantize().astype(np.float64) * factor
        got: Any = new.dequantize().astype(np.float64)
        errors = ValueErrors.of(meant, got)
        how.append("values" if factor == 1.0 else f"multiplied by {factor:g}")
    return TensorReport(
        name=name,
        shape=new.shape,
        source=old.encoding.name,
        target=new.encoding.name,
        relation="exact" if errors.exact else "lossy",
        how=", ".join(how) or "kept",
        nbytes=new.stored_bytes,
        max_error=errors.max_error,
        rms_error=errors.rms_error,
        relative_error=errors.relative_error,
    )
