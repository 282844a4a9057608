"""convert: a model from one format to another, tensor by tensor.

read, bring into the target's form, plan every tensor, check the disk, write to a place beside the
target, hash, write the manifest, rename. Nothing has the target's name before it is complete.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.encodings.affine import affine_format
from nybble.checkpoint.encodings.base import Bytes, Floats
from nybble.checkpoint.forms import in_form
from nybble.checkpoint.tensor import Tensor
from nybble.convert import carried
from nybble.convert.act_order import columns_in_order
from nybble.convert.adapters import convert_adapter, merged
from nybble.convert.choice import Choice
from nybble.convert.errors import ValueErrors
from nybble.convert.made import Made
from nybble.convert.manifest import (
    BLOCKS_NAME,
    FILE_SUFFIX,
    FOLDER_NAME,
    FileHash,
    Manifest,
    hash_file,
    input_files,
    manifest_path,
    read_manifest,
    tensor_entries,
)
from nybble.convert.plan import TensorPlan, make_plan, planned_size
from nybble.convert.relation import Look, recoded
from nybble.convert.report import Report, TensorReport
from nybble.convert.rules import output_name
from nybble.convert.targets import Destination, destination
from nybble.convert.tied import tied_again
from nybble.convert.verify import extra_files, is_unchanged
from nybble.errors import ConversionError, UnsupportedError
from nybble.formats.adapter import is_adapter
from nybble.formats.mapping import release_pages
from nybble.formats.output import OutputError, require_space, staged_file, staged_folder
from nybble.quantize.rtn import quantize_rtn
from nybble.text.tokenizer import FolderTokenizerSource

if TYPE_CHECKING:
    from nybble.adapters import Given
    from nybble.hub.progress import ProgressCallback

_ROOM = 64 << 20
"""Bytes besides the tensors: tokenizer, config, graph, manifest."""


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    to: str,
    encoding: str | None = None,
    encodings: Mapping[str, str] | None = None,
    allow_lossy: bool = False,
    overwrite: bool = False,
    method: str | None = None,
    quantization: str | None = None,
    split_bytes: int | None = None,
    adapters: Mapping[str, Given] | Sequence[Given] = (),
    base: str | os.PathLike[str] | None = None,
    progress: ProgressCallback | None = None,
    offline: bool | None = None,
    made: Made | None = None,
) -> Report:
    """Converts a model, or a LoRA adapter; exactly, unless told otherwise.

    Args:
        source: a model as for ``nybble.load``.
        target: the file (GGUF) or folder to write. A split GGUF is a folder with its parts.
        to: ``gguf``, ``safetensors``, ``onnx``, or the name of an ONNX target (``onnx-cpu-int4``, ...).
        encoding: what every matrix becomes (``f16``, ``q8_0``, ``int4_g128_f16``, ...). None: each keeps its
            own, or gets one that holds the same values.
        encodings: the same for tensors by pattern of their names (``{"*.mlp.*": "q8_0"}``); these count
            before ``encoding``, and of several the first.
        allow_lossy: go on where a tensor has no exact place; the report shows the errors.
        overwrite: replace a target that exists.
        method: how weights become integers for an ONNX target that does not say (``rtn``).
        quantization: for safetensors: ``awq``, ``gptq`` or ``compressed-tensors``, how integers are packed.
        split_bytes: most bytes of tensors in one file of a GGUF or safetensors output.
        adapters: LoRA adapters to merge into the model, as for ``nybble.load``: paths, or weights by path.
        base: where ``source`` is a LoRA adapter, the model that it belongs to; see ``convert_adapter``.
        progress: called with what is going on; see ``nybble.hub.progress``.
        offline: True: never download the source; None: what the environment says.
        made: tensors to take in place of the source's: what a quantizer made of them.

    Returns:
        What was done to each tensor. The same is in the manifest beside the output.

    Raises:
        ConversionError: tensors have no exact place; the message lists them and the choices.
        OutputError: the target exists, cannot be written, or does not fit on the disk.
        NotFoundError, DownloadError, FormatError, UnsupportedError: the source cannot be read, or the
            target cannot hold such a model.
    """
    from nybble.hub import resolve
    from nybble.loading import read_checkpoint

    if is_adapter(Path(source)):
        if encodings or method or quantization or split_bytes or adapters:
            raise UnsupportedError(
                "of the options about tensors, encoding and allow_lossy alone are for adapters"
            )
        return convert_adapter(
            source,
            target,
            to=to,
            base=base,
            encoding=encoding,
            allow_lossy=allow_lossy,
            overwrite=overwrite,
            offline=offline,
        )
    started = perf_counter()
    place = destination(to, quantization=quantization, method=method, split_bytes=split_bytes)
    output = Path(target)
    path = resolve(os.fspath(source), progress=progress, offline=offline)
    read = tied_again(_with_folder_tokenizer(read_checkpoint(path)))
    if overwrite:
        check_target(output, read.source, folder=place.is_folder)
    choice = Choice(encoding, dict(encodings or {}), allow_lossy)
    merge = merged(read, adapters, place.rules, choice, progress=progress, offline=offline)
    if made is not None:
        tensors = {name: item.tensor for name, item in made.tensors.items()}
        merge = merge.with_tensors(tensors, removed=made.removed)
    with staged_output(output, overwrite=overwrite, folder=place.is_folder) as stage:
        inputs = _hash_inputs(read, path, progress)
        earlier = _earlier_manifest(path)
        old = {} if earlier is None else earlier.carried
        restored = carried.restored(
            merge.checkpoint,
            merge.without(old),
            path if path.is_dir() else path.parent,
            place.format,
            unchanged=earlier is not None and is_unchanged(inputs, earlier),
            choice=choice,
        )
        formed, changes = in_form(restored.checkpoint, place.rules.form)
        ordered, notes = columns_in_order(formed, place.rules.form, merge.choice)
        notes += [*_notes(read), *(() if made is None else made.notes)]
        plans = make_plan(
            ordered, place.rules, merge.choice, merge.changes(changes), restored.preferred, made=merge.made
        )
        require_space(output.parent, planned_size(plans) + _ROOM)
        worker = _Worker(read, plans, restored.rebuilt, made, _keeper(place, stage.path))
        converted = replace(ordered, tensors=worker.tensors())
        try:
            meter = _meter(progress, output.name, planned_size(plans))
            files = place.write(converted, stage.path, meter, notes.append)
        except ValueError as error:  # a writer that cannot say something in its format
            raise ConversionError(f"{to} cannot hold this model: {error}") from error
        files = [*files, *worker.finish()]
        outputs = _hash_outputs(files, stage, output, progress)
        manifest = Manifest(
            inputs=(*inputs, *merge.inputs, *(() if made is None else made.inputs)),
            outputs=outputs,
            recipe={
                **_recipe(to, choice, method, quantization, split_bytes),
                **merge.recipe,
                **({} if made is None else made.recipe),
            },
            tensors=tensor_entries(worker.reports()),
            carried=carried.carried_from(
                merge.checkpoint,
                place.format,
                earlier=old,
                generated_tokenizer=place.generated_tokenizer(read, stage.path),
                blocks=worker.blocks,
            ),
        )
        stage.finish(manifest.to_bytes())
    written = [output.parent / item.name if stage.is_file else output / item.name for item in outputs]
    return Report(
        source=os.fspath(source),
        target=os.fspath(target),
        to=to,
        tensors=tuple(worker.reports()),
        files=(*written, manifest_path(output)),
        notes=tuple(notes),
        seconds=perf_counter() - started,
    )


def _notes(read: Checkpoint) -> list[str]:
    """What the source asks for that a conversion does not carry."""
    config = read.metadata.get("huggingface.config")
    section = config.get("quantization_config") if isinstance(config, Mapping) else None
    if not isinstance(section, Mapping) or section.get("quant_method") != "compressed-tensors":
        return []
    from nybble.formats.huggingface.quantized import unused_settings

    return [f"{key} of the source's quantization_config is not used" for key in unused_settings(section)]


# -- tensors -------------------------------------------------------------------------------------------


class _Worker:
    """Makes the tensors that the writer asks for, and notes what became of their values."""

    def __init__(
        self,
        read: Checkpoint,
        plans: list[TensorPlan],
        rebuilt: frozenset[str],
        made: Made | None,
        keeper: carried.BlockKeeper | None,
    ) -> None:
        self._made = {} if made is None else made.tensors
        self._read = read
        self._plans = plans
        self._rebuilt = rebuilt
        self._errors: dict[str, ValueErrors] = {}
        self._keeper = keeper

    @property
    def blocks(self) -> Mapping[str, Any]:
        """What ``nybble.blocks`` holds."""
        return {} if self._keeper is None else self._keeper.index

    def tensors(self) -> dict[str, Tensor]:
        """The tensors as they will be, by name."""
        return {plan.tensor.name: self._tensor(plan) for plan in self._plans}

    def finish(self) -> list[Path]:
        """Files besides the writer's."""
        return [] if self._keeper is None else self._keeper.close()

    def reports(self) -> Iterator[TensorReport]:
        """What became of each tensor."""
        return (self._report(plan) for plan in self._plans)

    def _tensor(self, plan: TensorPlan) -> Tensor:
        tensor = plan.tensor
        if plan.target.name != tensor.encoding.name:
            exact = plan.relation.kind == "exact"
            tensor = recoded(
                tensor,
                plan.target,
                how=plan.relation.how,
                done=None if exact else self._note(plan.tensor.name),
                look=self._look(plan) if exact and plan.target.block_size == 1 else None,
                quantize=None if exact else self._unclipped(plan),
            )
        return _releasing(tensor)

    def _unclipped(self, plan: TensorPlan) -> Callable[[Floats], Bytes] | None:
        """What rounds the matrix of the logits to integers in groups: its largest values are not cut off.

        A few of its inputs are hundreds of times larger than the rest (the final norm sees to that), so that
        a cut that makes the mean error smaller can make that of the logits larger. Which ones, only a
        calibration knows.
        """
        form = affine_format(plan.target.name)
        if form is None or form.has_minimum or plan.tensor.name != output_name(self._read.config):
            return None
        columns = plan.tensor.shape[-1]
        return lambda values: quantize_rtn(values.reshape(-1, columns), form, clipping=False, threads=1)

    def _look(self, plan: TensorPlan) -> Callable[[], Look | None] | None:
        keeper = self._keeper
        return None if keeper is None else lambda: keeper.of(plan.tensor)

    def _note(self, name: str) -> Any:
        def note(errors: ValueErrors) -> None:
            self._errors[name] = errors

        return note

    def _report(self, plan: TensorPlan) -> TensorReport:
        errors = self._errors.get(plan.tensor.name, ValueErrors())
        made = self._made.get(plan.tensor.name)
        change = plan.change
        changed_error = 0.0 if change is None else change.max_error
        exact = made is None and errors.exact and (change is None or change.exact)
        how = [] if made is None else [made.how]
        if made is not None:
            errors = errors + made.errors
        if change is not None:
            how.append(change.what)
        if plan.tensor.name in self._rebuilt:
            how.append("blocks rebuilt from their values")
        if plan.relation.how != "kept" or not how:
            how.append(plan.relation.how)
        source = self._read.tensors.get(plan.tensor.name, plan.tensor)
        return TensorReport(
            name=plan.tensor.name,
            shape=plan.tensor.shape,
            source=source.encoding.name,
            target=plan.target.name,
            relation="exact" if exact else "lossy",
            how=", ".join(how),
            nbytes=plan.nbytes,
            max_error=max(errors.max_error, changed_error),
            rms_error=errors.rms_error,
            relative_error=errors.relative_error,
        )


def _keeper(place: Destination, stage: Path) -> carried.BlockKeeper | None:
    return carried.BlockKeeper(stage / BLOCKS_NAME) if place.keeps_blocks else None


def _releasing(tensor: Tensor) -> Tensor:
    """The tensor; the memory of mapped files is given back before its data is made."""

    def data() -> Any:
        release_pages()
        return tensor.data

    return tensor.changed(data=data)


# -- where it goes -------------------------------------------------------------------------------------


class Stage:
    """The place beside the target that is written to."""

    def __init__(self, path: Path, output: Path, is_file: bool) -> None:
        self.path = path
        self.is_file = is_file
        self._output = output

    def finish(self, manifest: bytes) -> None:
        """Writes the manifest. Beside a file it gets its name first: a manifest alone looks like no model."""
        if not self.is_file:
            (self.path / FOLDER_NAME).write_bytes(manifest)
            return
        self._output.unlink(missing_ok=True)
        beside = self._output.with_name(self._output.name + FILE_SUFFIX)
        with staged_file(beside, overwrite=True) as partial:
            partial.write_bytes(manifest)


@contextmanager
def staged_output(output: Path, *, overwrite: bool, folder: bool) -> Iterator[Stage]:
    """The place where an output is written; it gets its name when the block ends without an error."""
    if folder:
        with staged_folder(output, overwrite=overwrite) as path:
            yield Stage(path, output, False)
    else:
        with staged_file(output, overwrite=overwrite) as path:
            yield Stage(path, output, True)


def _with_folder_tokenizer(read: Checkpoint) -> Checkpoint:
    """The tokenizer as its folder has it, without what a runtime's config adds to it."""
    folder = getattr(read.tokenizer, "folder", None)
    return replace(read, tokenizer=FolderTokenizerSource(folder)) if isinstance(folder, Path) else read


def check_target(output: Path, source: Path | None, *, folder: bool) -> None:
    """Refuses to replace what is read, and what nybble did not write."""
    if not output.exists():
        return
    if source is not None:
        source, target = source.resolve(), output.resolve()
        if source == target or target in source.parents:
            raise OutputError(f"{output}: is the model that would be read; name another output")
    if output.is_dir() != folder:
        raise OutputError(f"{output}: is a {'folder' if output.is_dir() else 'file'}; name another output")
    if folder and any(output.iterdir()):
        place = manifest_path(output)
        strange = (
            extra_files(output, read_manifest(place)) if place.is_file() else ("no manifest of nybble's",)
        )
        if strange:
            raise OutputError(
                f"{output}: has {', '.join(strange[:3])}: such a folder is not replaced; name another output"
                " or delete it"
            )


# -- manifest ------------------------------------------------------------------------------------------


def _recipe(
    to: str, choice: Choice, method: str | None, quantization: str | None, split_bytes: int | None
) -> dict[str, Any]:
    values = {
        "encoding": choice.encoding,
        "encodings": dict(choice.encodings) or None,
        "allow_lossy": choice.allow_lossy or None,
        "method": method,
        "quantization": quantization,
        "split_bytes": split_bytes,
    }
    return {"to": to, **{key: value for key, value in values.items() if value is not None}}


def _earlier_manifest(path: Path) -> Manifest | None:
    """The manifest of the source, where it has one."""
    place = manifest_path(path)
    if place.is_file():
        return read_manifest(place)
    # A part of a split model, or one file of a folder.
    place = path.parent / FOLDER_NAME
    found = read_manifest(place) if path.is_file() and place.is_file() else None
    return found if found and any(item.name == path.name for item in found.outputs) else None


def _hash_inputs(read: Checkpoint, path: Path, progress: ProgressCallback | None) -> tuple[FileHash, ...]:
    paths = input_files(path, read.metadata)
    total = sum(file.stat().st_size for file in paths)
    meter = _meter(progress, path.name, total, "checking")
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        meter(done, total)

    return tuple(hash_file(file, done=count) for file in paths)


def _hash_outputs(
    files: list[Path], stage: Stage, output: Path, progress: ProgressCallback | None
) -> tuple[FileHash, ...]:
    total = sum(file.stat().st_size for file in files)
    meter = _meter(progress, output.name, total, "checking")
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        meter(done, total)

    if stage.is_file:
        return (hash_file(stage.path, output.name, count),)
    return tuple(
        hash_file(file, file.relative_to(stage.path).as_posix(), count) for file in sorted(set(files))
    )


def _meter(progress: ProgressCallback | None, name: str, total: int, action: Any = "converting") -> Any:
    """A function of (done, total) that turns byte counts into reports with the time that is left."""
    from nybble.hub.progress import Meter

    meter = Meter(progress, name, action=action, total=total)

    def report(done: int, all_bytes: int) -> None:
        meter.total = all_bytes
        meter.update(done)
        if done >= all_bytes:
            meter.finish()

    return report
