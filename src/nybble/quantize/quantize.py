"""``nybble.quantize``: a model with fewer bits, by a recipe.

A recipe says what every matrix becomes; this resolves it for one model, chooses what rounds (with an
importance matrix where one is given), and lets the converter stream, report and write.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nybble.checkpoint.encodings import Encoding
from nybble.checkpoint.encodings.affine import affine_format
from nybble.checkpoint.encodings.base import Bytes, Floats
from nybble.checkpoint.tensor import Tensor
from nybble.convert.relation import Quantize
from nybble.convert.rounding import Rounding
from nybble.errors import UnsupportedError
from nybble.quantize.recipe import Recipe, read_recipe, rounded_matrices

if TYPE_CHECKING:
    from nybble.convert.report import Report
    from nybble.hub.progress import ProgressCallback
    from nybble.quantize.importance import ImportanceMatrix


def quantize(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    recipe: str | Recipe = "q4_k_m",
    *,
    to: str | None = None,
    importance: str | os.PathLike[str] | None = None,
    encodings: Mapping[str, str] | None = None,
    overwrite: bool = False,
    split_bytes: int | None = None,
    progress: ProgressCallback | None = None,
    offline: bool | None = None,
) -> Report:
    """Writes a model with the encodings of a recipe.

    Args:
        source: a model as for ``nybble.load``.
        target: the file (GGUF) or folder to write.
        recipe: a name (``nybble quantize --list``), a file (``NAME.toml``), or a Recipe.
        to: the format or ONNX target; None: what the recipe is made for.
        importance: an importance matrix (``nybble calibrate``, llama.cpp's): columns weigh in the error as
            their inputs are large.
        encodings: encodings by pattern of canonical names, before the recipe's.
        overwrite, split_bytes, progress, offline: as for ``nybble.convert``.

    Returns:
        What was done to each tensor, and what it cost.

    Raises:
        NotFoundError, FormatError: there is no such recipe, or it is wrong.
        UnsupportedError: the recipe's method needs more than this, or no encoding fits a tensor.
        others: as ``nybble.convert``.
    """
    from nybble.convert.convert import convert
    from nybble.hub import resolve
    from nybble.loading import read_checkpoint
    from nybble.quantize.importance import read_importance

    chosen = read_recipe(recipe) if isinstance(recipe, str) else recipe
    if chosen.method != "rtn":
        raise UnsupportedError(f"recipe {chosen.name}: the method {chosen.method} is not driven by recipes")
    path = resolve(os.fspath(source), progress=progress, offline=offline)
    checkpoint = read_checkpoint(path)
    matrix = None if importance is None else read_importance(importance, checkpoint.config.architecture)
    if matrix is not None:
        matrix.check(checkpoint)
    resolved = {
        tensor.name: chosen.encoding_of(tensor, checkpoint.config, importance=matrix is not None)
        for tensor in rounded_matrices(checkpoint.tensors)
    }
    return convert(
        source,
        target,
        to=to or chosen.to,
        encodings={**(encodings or {}), **resolved},
        overwrite=overwrite,
        split_bytes=split_bytes,
        progress=progress,
        offline=offline,
        rounding=weighted_rounding(chosen, matrix, None if importance is None else Path(importance)),
    )


def weighted_rounding(recipe: Recipe, matrix: ImportanceMatrix | None, file: Path | None) -> Rounding:
    """What rounds matrices: the searches of this package, weighed by an importance matrix."""
    from nybble.convert.manifest import hash_file
    from nybble.quantize.blocks import BLOCK_TYPES, quantize_blocks
    from nybble.quantize.rtn import quantize_rtn

    def of(tensor: Tensor, encoding: Encoding) -> Quantize | None:
        if len(tensor.shape) != 2:
            return None
        columns = tensor.shape[1]
        weights = None if matrix is None else matrix.weights(tensor.name)
        form = affine_format(encoding.name)
        if form is not None and not form.has_minimum:

            def affine(values: Floats) -> Bytes:
                return quantize_rtn(values.reshape(-1, columns), form, importance=weights, threads=1)

            return affine
        if encoding.name not in BLOCK_TYPES:
            return None

        def blocks(values: Floats) -> Bytes:
            rows = values.reshape(-1, columns)
            return quantize_blocks(rows, encoding.name, importance=weights, threads=1)

        return blocks

    settings: dict[str, Any] = {"recipe": recipe.name}
    inputs = () if file is None else (hash_file(file),)
    return Rounding(of, settings, inputs)
