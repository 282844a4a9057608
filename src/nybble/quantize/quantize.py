"""``nybble.quantize``: a model with fewer bits, by a recipe.

A recipe (or a budget of bits) says what every matrix becomes; matrices are rounded layer by layer into a
spool beside the output, with or without a calibration (``job.py``); the converter takes them from there into
whatever format is wanted. A run that was killed goes on after the last layer that it had finished.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.encodings import encoding
from nybble.checkpoint.encodings.affine import affine_format
from nybble.checkpoint.encodings.base import Bytes
from nybble.checkpoint.tensor import Tensor
from nybble.convert.act_order import PERMUTATION, columns_in_order
from nybble.convert.choice import Choice
from nybble.convert.errors import ValueErrors
from nybble.convert.made import Made, MadeTensor
from nybble.convert.manifest import hash_file
from nybble.convert.rules import is_block, is_matrix
from nybble.convert.targets import Destination, destination
from nybble.convert.tied import tied_again
from nybble.errors import ConversionError, UnsupportedError
from nybble.formats.output import OutputError
from nybble.quantize.budget import mix_for_budget, remove_state
from nybble.quantize.calibrate import LayerProgress
from nybble.quantize.importance import read_importance
from nybble.quantize.job import Job, run
from nybble.quantize.layer_quantizer import Method
from nybble.quantize.matrices import check_encoding
from nybble.quantize.options import CalibrationOptions, windows_of
from nybble.quantize.recipe import METHODS, Recipe, read_recipe
from nybble.quantize.spool import SUFFIX, Spool

if TYPE_CHECKING:
    from nybble.convert.report import Report
    from nybble.hub.progress import ProgressCallback

__all__ = ["CalibrationOptions", "quantize"]

SINGLES = 512
"""Calibration windows of one token besides the text, for GPTQ: see ``gptq.py``."""
STATE_SUFFIX = ".sensitivity"


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
    output, state = Path(target), Path(os.path.abspath(target) + STATE_SUFFIX)
    if output.exists() and not overwrite:
        raise OutputError(f"{output} exists; name another output or allow it to be overwritten")
    path = resolve(os.fspath(source), progress=file_progress, offline=offline)
    read = tied_again(read_checkpoint(path))
    if overwrite:
        check_target(output, read.source, folder=place.is_folder)
    # GPTQ's act-order of the source ends here: what is rounded anew has the inputs' order.
    ordered, notes = columns_in_order(read, "gguf", Choice("f32"))
    options = calibration or CalibrationOptions()
    matrix = None if importance is None else read_importance(importance, read.config.architecture)
    if matrix is not None:
        matrix.check(read)
    patterns = _named(ordered, encodings or {})
    if bits_per_weight is None:
        weighted = matrix is not None
        wanted = chosen.encodings_for(ordered, to=to, packing=packing, importance=weighted, named=patterns)
    else:
        mix = mix_for_budget(
            ordered,
            bits_per_weight,
            to=to,
            quantization=packing,
            options=options,
            fixed=patterns,
            importance=matrix,
            threads=threads,
            state=state,
            progress=progress,
        )
        wanted, matrix = dict(mix.encodings), mix.importance
    rounded, plain = _parted(ordered, wanted, place)
    if to == "safetensors" and rounded:
        # What is rounded anew is not bound to how the source was packed.
        packing = packing or "compressed-tensors"
        _check_packing(ordered, rounded, packing)
    calibrates = named != "rtn" or bits_per_weight is not None
    inputs = () if importance is None else (hash_file(Path(importance)),)
    settings: dict[str, Any] = {
        "recipe": chosen.name if bits_per_weight is None else None,
        "bits_per_weight": bits_per_weight,
        "method": named,
        "calibration": options.to_json() if calibrates else None,
        "importance": inputs[0].sha256 if inputs else None,
    }
    singles = SINGLES if "gptq" in named else 0
    windows = [] if named == "rtn" else windows_of(ordered, options, singles=singles)
    job = Job(ordered, rounded, Method.named(named), matrix, windows, settings)
    spool = Spool(Path(os.path.abspath(target) + SUFFIX), job.fingerprint())
    made = run(job, spool, options, threads=threads, progress=progress)
    report = convert(
        source,
        target,
        to=to,
        made=Made(
            {**_moved(read, ordered), **made},
            {key: value for key, value in settings.items() if value is not None},
            inputs,
            (
                *notes,
                *_twice(read, rounded),
                *(_widened(ordered, rounded, plain) if to == "safetensors" else ()),
            ),
            frozenset(read.tensors) - frozenset(ordered.tensors),
        ),
        encodings=plain,
        overwrite=overwrite,
        quantization=packing,
        split_bytes=split_bytes,
        progress=file_progress,
        offline=offline,
    )
    spool.remove()
    remove_state(state)
    return replace(report, seconds=perf_counter() - started)


def _moved(read: Checkpoint, ordered: Checkpoint) -> dict[str, MadeTensor]:
    """The matrices whose columns are in the order of the inputs again."""
    found = {}
    for name in read.tensors:
        if name not in ordered.tensors:
            weight = name.removesuffix(PERMUTATION) + ".weight"
            how = "columns in the order of the inputs"
            found[weight] = MadeTensor(ordered.tensors[weight], how, ValueErrors())
    return found


def _twice(read: Checkpoint, rounded: Mapping[str, str]) -> list[str]:
    """What there is to say of matrices that had lost something before."""
    again = sum(read.tensors[name].encoding.block_size > 1 for name in rounded)
    if not again:
        return []
    return [f"{again} matrices of the source were quantized already: they are rounded a second time"]


def _widened(checkpoint: Checkpoint, rounded: Mapping[str, str], plain: Mapping[str, str]) -> list[str]:
    """What there is to say of GGUF's blocks that become floats."""
    return [
        f"{name} becomes a float that holds its {tensor.encoding.name} exactly;"
        f' --tensor-encoding "{name}=f16" takes 16 bits'
        for name, tensor in checkpoint.tensors.items()
        if _is_ggml_block(tensor) and name not in rounded and name not in plain
    ]


def _is_ggml_block(tensor: Tensor) -> bool:
    return is_block(tensor.encoding) and affine_format(tensor.encoding.name) is None


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

    tensors = dict(checkpoint.tensors)
    for name, tensor in checkpoint.tensors.items():
        kind = rounded.get(name)
        if kind is None and _is_ggml_block(tensor):
            kind = "f32"  # the converter finds a float that holds it
        if kind is not None:
            tensors[name] = tensor.changed(encoding=encoding(kind), data=unread)
    pack_quantized(replace(checkpoint, tensors=tensors), packing)
