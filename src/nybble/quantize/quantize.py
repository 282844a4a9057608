"""``nybble.quantize``: a model with fewer bits, by a recipe.

A recipe (or a budget of bits) says what every matrix becomes; matrices are rounded layer by layer into a
spool beside the output, with or without a calibration; the converter takes them from there into whatever
format is wanted. A run that was killed goes on after the last layer that it had finished.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

import nybble
from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.encodings import encoding
from nybble.checkpoint.tensor import Bytes
from nybble.convert.act_order import PERMUTATION, columns_in_order
from nybble.convert.choice import Choice
from nybble.convert.errors import ValueErrors
from nybble.convert.made import Made, MadeTensor
from nybble.convert.manifest import FileHash, hash_file, input_files
from nybble.convert.rules import EMBEDDING, OUTPUT, is_matrix
from nybble.convert.targets import Destination, destination
from nybble.convert.tied import tied_again
from nybble.devices.cpu import longest_context
from nybble.errors import ConversionError, UnsupportedError
from nybble.formats.mapping import release_pages
from nybble.formats.output import OutputError
from nybble.quantize.budget import mix_for_budget, remove_state
from nybble.quantize.calibrate import WINDOW, WINDOWS, LayerProgress, calibration_windows
from nybble.quantize.calibration_text import Tokens
from nybble.quantize.importance import ImportanceMatrix, read_importance
from nybble.quantize.layer_quantizer import LayerQuantizer, Method
from nybble.quantize.layer_runner import LayerRunner
from nybble.quantize.matrices import check_encoding, round_plainly
from nybble.quantize.recipe import METHODS, Recipe, read_recipe
from nybble.quantize.spool import SUFFIX, Spool

if TYPE_CHECKING:
    from nybble.convert.report import Report
    from nybble.hub.progress import ProgressCallback

SINGLES = 512
"""Calibration windows of one token besides the text, for GPTQ: see ``gptq.py``."""
HIDDEN_SECONDS = 20.0
"""How often the hidden states are kept, at most: what a kill costs besides a layer."""
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class CalibrationOptions:
    """What a method that calibrates looks at.

    ``text``: files, folders or JSON lines of chats; none: nybble's own text. ``windows`` of ``window``
    tokens, drawn by ``seed``; ``precision`` of the model: ``fast`` or ``f32``.
    """

    text: Sequence[str | os.PathLike[str]] = ()
    windows: int = WINDOWS
    window: int = WINDOW
    seed: int = 0
    precision: str = "fast"


@dataclass(frozen=True)
class Job:
    """What is to be done: the results depend on this, and on nybble's version."""

    checkpoint: Checkpoint
    encodings: Mapping[str, str]
    """Of every matrix that is rounded, by name."""
    method: Method
    importance: ImportanceMatrix | None
    windows: Sequence[Tokens]
    """Of the calibration; none: the method needs none."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What else decides, as JSON: for the fingerprint and the manifest."""

    def fingerprint(self) -> str:
        """Of everything that the results depend on; of the model's files names, sizes and times."""
        source = self.checkpoint.source
        files = [] if source is None else input_files(source, self.checkpoint.metadata)
        digest = hashlib.sha256()
        for window in self.windows:
            digest.update(len(window).to_bytes(8, "little") + np.asarray(window, "<i4").tobytes())
        content = {
            "nybble": nybble.__version__,
            "files": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files],
            "encodings": dict(self.encodings),
            "method": vars(self.method),
            "windows": digest.hexdigest(),
            "settings": dict(self.settings),
        }
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def quantize(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    recipe: str | Recipe = "q4_k_m",
    *,
    to: str | None = None,
    method: str | None = None,
    importance: str | os.PathLike[str] | None = None,
    calibration: CalibrationOptions | None = None,
    encodings: Mapping[str, str] | None = None,
    bits_per_weight: float | None = None,
    quantization: str | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    split_bytes: int | None = None,
    progress: Callable[[LayerProgress], None] | None = None,
    file_progress: ProgressCallback | None = None,
    offline: bool | None = None,
) -> Report:
    """Writes a model with the encodings of a recipe.

    Args:
        source: a model as for ``nybble.load``.
        target: the file (GGUF) or folder to write.
        recipe: a name (``recipe_names()``), a file (``NAME.toml``), or a Recipe.
        to: the format or ONNX target; None: what the recipe is made for, or GGUF for a target ``*.gguf``.
        method: ``rtn``, ``awq``, ``gptq`` or ``awq+gptq``; None: the recipe's.
        importance: an importance matrix (``nybble calibrate``, llama.cpp's) for rounding to nearest: errors
            of columns count as their inputs are large.
        calibration: for methods that look at the inputs, and for ``bits_per_weight``.
        encodings: encodings by pattern of canonical names (``{"*.v_proj.weight": "q6_k"}``), before the
            recipe's; ``keep`` leaves a tensor as it is.
        bits_per_weight: the best mix of encodings of that size, from measured sensitivities, in place of the
            recipe's choice.
        quantization: for safetensors: ``awq``, ``gptq`` or ``compressed-tensors``; None: the recipe's.
        threads: at most; None: the cores that this process may use.
        overwrite, split_bytes, offline: as for ``nybble.convert``.
        progress: called while layers are rounded.
        file_progress: called while files are read, written or downloaded.

    Returns:
        What was done to each tensor, and what it cost.

    Raises:
        NotFoundError, FormatError: there is no such recipe, or it is wrong.
        UnsupportedError: no encoding fits a tensor, or the target cannot hold one.
        ConversionError, OutputError and others: as ``nybble.convert``.
    """
    from nybble.convert.convert import check_target, convert
    from nybble.hub import resolve
    from nybble.loading import read_checkpoint

    started = perf_counter()
    chosen = read_recipe(recipe) if isinstance(recipe, str) else recipe
    named = method or chosen.method
    if named not in METHODS:
        raise UnsupportedError(f"unknown method {named!r}; known: {', '.join(METHODS)}")
    to = to or ("gguf" if os.fspath(target).endswith(".gguf") else chosen.to)
    packing = quantization or (chosen.quantization if to == "safetensors" else None)
    place = destination(to, quantization=packing, split_bytes=split_bytes)
    output = Path(target)
    if output.exists() and not overwrite:
        raise OutputError(f"{output} exists; name another output or allow it to be overwritten")
    path = resolve(os.fspath(source), progress=file_progress, offline=offline)
    read = tied_again(read_checkpoint(path))
    if overwrite:
        check_target(output, read.source, folder=place.is_folder)
    # GPTQ's act-order of the source ends here: what is rounded anew has the inputs' order.
    ordered, notes = columns_in_order(read, "gguf", Choice("f32"))
    matrix = None if importance is None else read_importance(importance, read.config.architecture)
    if matrix is not None:
        matrix.check(read)
    options = calibration or CalibrationOptions()
    budget: dict[str, Any] = {}
    state = output.absolute().with_name(output.name + ".sensitivity")
    if bits_per_weight is not None:
        mix = mix_for_budget(
            ordered,
            bits_per_weight,
            to=to,
            quantization=packing,
            options=options,
            fixed=_named(ordered, encodings or {}),
            importance=matrix,
            threads=threads,
            state=state,
            progress=progress,
        )
        wanted: Mapping[str, str] = mix.encodings
        matrix = mix.importance
        budget = {"bits_per_weight": bits_per_weight}
        notes = [*notes, *mix.notes]
    else:
        wanted = chosen.encodings_for(
            ordered,
            to=to,
            packing=packing,
            importance=matrix is not None,
            named=_named(ordered, encodings or {}),
        )
    rounded, plain = _parted(ordered, wanted, place)
    if packing is not None and rounded:
        _check_packing(ordered, rounded, packing)
    settings = {
        "recipe": None if budget else chosen.name,
        **budget,
        "method": named,
        "calibration": None,
        "importance": None if importance is None else hash_file(Path(importance)).sha256,
    }
    windows: list[Tokens] = []
    inputs: list[FileHash] = [] if importance is None else [hash_file(Path(importance))]
    if named != "rtn":
        windows = windows_of(ordered, options, singles=SINGLES if "gptq" in named else 0)
        settings["calibration"] = {
            "text": [Path(item).name for item in options.text] or ["nybble"],
            **{key: getattr(options, key) for key in ("windows", "window", "seed", "precision")},
        }
    job = Job(ordered, rounded, Method.named(named), matrix, windows, settings)
    spool = Spool(output.absolute().with_name(output.name + SUFFIX), job.fingerprint())
    made = run(job, spool, options, threads=threads, progress=progress)
    removed = frozenset(read.tensors) - frozenset(ordered.tensors)
    for gone in removed:
        name = gone.removesuffix(PERMUTATION) + ".weight"
        if name not in made:
            made[name] = MadeTensor(
                ordered.tensors[name], "columns in the order of the inputs", ValueErrors()
            )
    again = sum(read.tensors[name].encoding.block_size > 1 for name in rounded if name in read.tensors)
    if again:
        notes.append(f"{again} matrices of the source were quantized already: they are rounded a second time")
    report = convert(
        source,
        target,
        to=to,
        made=Made(
            made,
            {key: value for key, value in settings.items() if value is not None},
            tuple(inputs),
            tuple(notes),
            removed,
        ),
        encodings=plain,
        overwrite=overwrite,
        quantization=packing,
        split_bytes=split_bytes,
        progress=file_progress,
        offline=offline,
    )
    spool.remove()
    if budget:
        remove_state(state)
    return replace(report, seconds=perf_counter() - started)


def run(
    job: Job,
    spool: Spool,
    options: CalibrationOptions,
    *,
    threads: int | None = None,
    progress: Callable[[LayerProgress], None] | None = None,
) -> dict[str, MadeTensor]:
    """The tensors of a job, by name, on the disk; what the spool has already is not made again."""
    layers = job.checkpoint.config.num_hidden_layers
    if all(spool.unit(number) is not None for number in range(layers + 1)):
        return spool.tensors()
    meter = _Meter(layers, progress)
    if job.windows:
        _run_calibrated(job, spool, options, meter, threads)
    for number, names in enumerate(_units(job.checkpoint, job.encodings)):
        if spool.unit(number) is None:
            spool.write(number, dict(_plainly(job, names, meter.within(number))))
            release_pages()
    return spool.tensors()


def windows_of(checkpoint: Checkpoint, options: CalibrationOptions, *, singles: int = 0) -> list[Tokens]:
    """The windows of a calibration, and windows of ``singles`` different tokens of them, alone."""
    if checkpoint.tokenizer is None:
        raise UnsupportedError("the model has no tokenizer, which a calibration needs")
    most = longest_context(checkpoint.config)
    if not 2 <= options.window <= most:
        raise UnsupportedError(f"windows of {options.window} tokens: the model takes 2 to {most} at a time")
    windows = calibration_windows(
        checkpoint,
        checkpoint.tokenizer.build(),
        text=options.text,
        windows=options.windows,
        window=options.window,
        seed=options.seed,
    )
    tokens = np.unique(np.concatenate([np.asarray(window) for window in windows]))
    chosen = np.random.default_rng(options.seed).permutation(tokens)[:singles]
    return [*windows, *(np.array([token], windows[0].dtype) for token in chosen)]


# -- work ----------------------------------------------------------------------------------------------


def _run_calibrated(
    job: Job, spool: Spool, options: CalibrationOptions, meter: _Meter, threads: int | None
) -> None:
    """Layers, and an output matrix that calibration is about; the rest is left to plain rounding."""
    layers = job.checkpoint.config.num_hidden_layers
    saved = perf_counter()
    with LayerRunner(
        job.checkpoint,
        job.windows,
        threads=threads,
        precision=options.precision,
        folder=spool.folder,
        progress=lambda done, total: meter.running(done / total),
    ) as runner:
        found = spool.hidden()
        if found is not None:
            try:
                runner.restore(*found)
            except ValueError as error:
                raise spool.damaged("hidden.npz", error) from error
        meter.start(runner.layer)
        quantizer = LayerQuantizer(
            job.checkpoint, job.encodings, job.method, runner, threads=threads, progress=meter.rounding
        )
        while runner.layer < layers:
            layer = runner.layer
            made = spool.unit(layer)
            if made is None:
                made = spool.write(layer, quantizer.quantize(layer))
            quantizer.advance(layer, made)
            release_pages()
            meter.done(layer)
            if perf_counter() - saved > HIDDEN_SECONDS:
                spool.save_hidden(runner.layer, runner.hidden)
                saved = perf_counter()
        if spool.unit(layers) is None:
            outer = quantizer.quantize(layers)
            rest = [name for name in _units(job.checkpoint, job.encodings)[layers] if name not in outer]
            spool.write(layers, {**outer, **dict(_plainly(job, rest, meter.rounding))})
        meter.finished()


def _plainly(
    job: Job, names: Sequence[str], progress: Callable[[float], None]
) -> Iterator[tuple[str, MadeTensor]]:
    """Matrices rounded to nearest."""
    for number, name in enumerate(names):
        weights = None if job.importance is None else job.importance.weights(name)
        tensor = job.checkpoint.tensors[name]
        output = name == (EMBEDDING if job.checkpoint.config.tie_word_embeddings else OUTPUT)
        yield name, round_plainly(tensor, job.encodings[name], weights, output=output)
        progress((number + 1) / len(names))


def _units(checkpoint: Checkpoint, names: Mapping[str, str]) -> list[list[str]]:
    """Names by layer; the last ones belong to none."""
    layers = checkpoint.config.num_hidden_layers
    units: list[list[str]] = [[] for _ in range(layers + 1)]
    for name in names:
        found = _LAYER.match(name)
        units[int(found[1]) if found else layers].append(name)
    return units


def _named(checkpoint: Checkpoint, patterns: Mapping[str, str]) -> dict[str, str]:
    """Encodings that patterns give to tensors, by name.

    Raises:
        ConversionError: a pattern fits nothing.
    """
    choice = Choice(None, patterns)
    found: dict[str, str] = {}
    for name in checkpoint.tensors:
        wanted = choice.named(name)
        if wanted is not None:
            found[name] = wanted
    for pattern in patterns:
        if not any(Choice(None, {pattern: ""}).named(name) is not None for name in checkpoint.tensors):
            known = list(checkpoint.tensors)[-1]
            raise ConversionError(f"no tensor's name matches {pattern!r}; names are like {known}")
    return found


def _parted(
    checkpoint: Checkpoint, wanted: Mapping[str, str], place: Destination
) -> tuple[dict[str, str], dict[str, str]]:
    """What is rounded to blocks, and what becomes plain numbers; the others stay as they are.

    Raises:
        UnsupportedError: a matrix cannot be rounded to its encoding, or the target cannot hold that.
    """
    rounded: dict[str, str] = {}
    plain: dict[str, str] = {}
    for name, kind in wanted.items():
        tensor, row = checkpoint.tensors[name], encoding(kind)
        # Now, before hours of work. In ONNX there are encodings with the same values for most of GGUF's.
        if place.format != "onnx" and not place.rules.holds(tensor, row):
            raise UnsupportedError(f"{name}: {place.rules.name} cannot hold it as {kind}")
        if row.block_size == 1 or not is_matrix(tensor):
            plain[name] = kind
        elif kind != tensor.encoding.name:
            check_encoding(kind)
            columns = tensor.shape[-1]
            if columns % row.block_size:
                raise UnsupportedError(
                    f"{name}: rows of {columns} are no multiple of {kind}'s blocks of {row.block_size}"
                )
            rounded[name] = kind
    return rounded, plain


def _check_packing(checkpoint: Checkpoint, rounded: Mapping[str, str], packing: str) -> None:
    """Whether a packing of safetensors can hold them all together.

    Raises:
        UnsupportedError: it cannot; the message names a tensor and says why.
    """
    from nybble.formats.huggingface.quantized import pack_quantized

    def unread() -> Bytes:
        raise AssertionError("a packing is chosen by encodings alone")

    tensors = {
        name: tensor.changed(encoding=encoding(rounded[name]), data=unread) if name in rounded else tensor
        for name, tensor in checkpoint.tensors.items()
    }
    pack_quantized(replace(checkpoint, tensors=tensors), packing)


class _Meter:
    """Tells how far a job is."""

    def __init__(self, layers: int, progress: Callable[[LayerProgress], None] | None) -> None:
        self._layers = layers
        self._progress = progress
        self._layer = 0
        self._rounded = False
        self._from = 0.0
        self._started = perf_counter()

    def start(self, layer: int) -> None:
        """Layers before this one were done by an earlier run."""
        self._layer = layer
        self._from = layer / (self._layers + 1)
        self._started = perf_counter()

    def running(self, share: float) -> None:
        """The text runs through the layer, before and after its matrices are rounded: a third each."""
        self._tell((2 + share) / 3 if self._rounded else share / 3)

    def rounding(self, share: float) -> None:
        """Matrices of the layer are rounded."""
        self._rounded = True
        self._tell((1 + share) / 3)

    def within(self, layer: int) -> Callable[[float], None]:
        """For a layer in which nothing but rounding is done."""
        self._layer = layer
        return self._tell

    def done(self, layer: int) -> None:
        """The layer is done."""
        self._layer = layer + 1
        self._rounded = False
        self._tell(0.0)

    def finished(self) -> None:
        """Everything is done."""
        self._tell(1.0)

    def _tell(self, share: float) -> None:
        if self._progress is None:
            return
        fraction = min((self._layer + share) / (self._layers + 1), 1.0)
        elapsed, new = perf_counter() - self._started, fraction - self._from
        left = elapsed / new * (1 - fraction) if new > 0 and elapsed > 0 else None
        self._progress(LayerProgress(self._layer, self._layers, fraction, left))
