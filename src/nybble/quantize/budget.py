"""The best mix of encodings for a number of bits a weight, from measured sensitivities.

Every matrix may have any of the encodings that the target holds. What each would cost is predicted from its
error and the matrix's sensitivity (``sensitivity.py``); costs are added up. Beginning with the smallest
encoding everywhere, the step that saves most divergence for its bits is taken again and again, along the
lower convex hull of each matrix, until the budget is used up: the optimum of the relaxed problem, up to one
step. (Same problem, by integer programming: arXiv:2011.10680, HAWQ-V3.)
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy.typing as npt

import nybble
from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.encodings import encoding
from nybble.checkpoint.encodings.affine import AffineFormat
from nybble.checkpoint.tensor import Tensor
from nybble.convert.rules import EMBEDDING, OUTPUT, is_matrix
from nybble.errors import UnsupportedError
from nybble.formats.onnx.targets import TARGETS
from nybble.quantize.calibrate import Calibration, LayerProgress, calibration_windows, importance_of
from nybble.quantize.fingerprint import file_stamps, windows_digest
from nybble.quantize.importance import ImportanceMatrix, read_importance, write_importance
from nybble.quantize.options import CalibrationOptions, windows_of
from nybble.quantize.sensitivity import WINDOW, measure_sensitivities, relative_error, tokens_for

GGUF_TYPES = (
    "iq2_xxs", "iq2_xs", "iq2_s", "q2_k", "iq3_xxs", "iq3_s", "q3_k", "iq4_xs", "q4_k", "q5_k", "q6_k",
    "q4_0", "iq4_nl", "q4_1", "q5_0", "q5_1", "q8_0",
)  # fmt: skip
"""What a matrix may become in GGUF; of 256 columns each but for the last six."""
WIDTHS = (4, 8)
"""Bits of affine encodings that every runtime of ONNX and compressed-tensors knows."""
GROUPS = (128, 64, 32, 16)


@dataclass(frozen=True)
class Mix:
    """The result."""

    encodings: Mapping[str, str]
    """By name, of every matrix that changes."""
    importance: ImportanceMatrix
    """What errors were weighed with, and are to be when rounding."""
    predicted: float
    """The sum of the predicted KL divergences, nats."""


@dataclass(frozen=True)
class Option:
    """One encoding of one matrix."""

    name: str
    bits: int
    """Of the whole matrix."""
    cost: float


def mix_for_budget(
    checkpoint: Checkpoint,
    bits_per_weight: float,
    *,
    to: str,
    quantization: str | None,
    options: CalibrationOptions,
    fixed: Mapping[str, str],
    importance: ImportanceMatrix | None,
    state: Path,
    threads: int | None = None,
    progress: Callable[[LayerProgress], None] | None = None,
) -> Mix:
    """The encodings that lose least, of all that make the model's tensors at most so large.

    Args:
        checkpoint: the model.
        bits_per_weight: of all tensors together, norms and embeddings included.
        to, quantization: where it goes: what it can hold.
        options: the text.
        fixed: encodings that are given, by name; ``keep``: the tensor's own.
        importance: None: it is calibrated.
        state: a file that keeps what is measured, and one beside it; ``remove_state`` when all is done.
        threads: at most; None: the cores that this process may use.
        progress: called while it works.

    Raises:
        UnsupportedError: the budget is below what is possible, or the target has one encoding only.
    """
    if quantization in ("awq", "gptq"):
        raise UnsupportedError(
            f"{quantization} packs all matrices with the same bits: there is nothing to mix"
        )
    if not (math.isfinite(bits_per_weight) and bits_per_weight > 0):
        raise UnsupportedError(f"{bits_per_weight} bits a weight: a number above 0 is needed")
    tied = checkpoint.config.tie_word_embeddings
    matrices = [
        tensor
        for tensor in checkpoint.tensors.values()
        if is_matrix(tensor) and tensor.name not in fixed and candidates(tensor, to, tied=tied)
    ]
    budget = bits_per_weight * sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
    free = {tensor.name for tensor in matrices}
    rest = sum(
        8 * _bytes_of(tensor, fixed.get(tensor.name))
        for tensor in checkpoint.tensors.values()
        if tensor.name not in free
    )
    least = rest + sum(
        min(
            8 * encoding(name).stored_bytes(math.prod(tensor.shape))
            for name in candidates(tensor, to, tied=tied)
        )
        for tensor in matrices
    )
    if least > budget:
        weights = budget / bits_per_weight
        raise UnsupportedError(
            f"{bits_per_weight:g} bits a weight: the smallest that {to} can hold of this model is"
            f" {least / weights:.3g}"
        )
    if importance is None:
        importance = calibrated(checkpoint, options, threads, state, progress)
    windows = _probe_windows(checkpoint, options)
    found = measure_sensitivities(
        checkpoint,
        windows,
        [tensor.name for tensor in matrices],
        importance,
        threads=threads,
        state=state,
        fingerprint=_fingerprint(checkpoint, windows, importance.digest()),
        progress=None if progress is None else _told(progress, checkpoint, matrices),
    )
    choices = {
        tensor.name: [
            Option(
                name,
                8 * _bytes_of(tensor, name),
                found[tensor.name].predicted(relative_error(tensor, name, importance)),
            )
            for name in candidates(tensor, to, tied=tied)
        ]
        for tensor in matrices
    }
    chosen = best_mix(choices, budget - rest)
    return Mix(
        {**{name: kind for name, kind in fixed.items() if kind != "keep"},
         **{name: option.name for name, option in chosen.items()}},
        importance,
        sum(option.cost for option in chosen.values()),
    )  # fmt: skip


def candidates(tensor: Tensor, to: str, *, tied: bool) -> list[str]:
    """Encodings that a matrix may have in a target; none: it stays as it is.

    ``tied``: whether the embedding is the output matrix too.
    """
    columns = tensor.shape[1]
    if to == "gguf":
        return [name for name in GGUF_TYPES if columns % encoding(name).block_size == 0]
    if to == "safetensors":
        outer = tensor.name in (EMBEDDING, OUTPUT)
        scale, zeros = "f16", (False, True)
    else:
        outer = tensor.name == EMBEDDING and not tied  # what is only looked up in stays float
        scale, zeros = (TARGETS[to].element_type if to in TARGETS else "f32"), (False, True)
    if outer:
        return []
    return [
        AffineFormat(bits, group, scale, zero).name
        for bits in WIDTHS
        for group in GROUPS
        for zero in zeros
        if columns % group == 0
    ]


def best_mix(choices: Mapping[str, Sequence[Option]], budget: float) -> dict[str, Option]:
    """Of each matrix one option, together at most ``budget`` bits, with a sum of costs as small as it gets.

    Raises:
        ValueError: even the smallest are too large.
    """
    hulls = {name: _hull(options) for name, options in choices.items()}
    chosen = {name: 0 for name in hulls}
    used = sum(hull[0].bits for hull in hulls.values())
    if used > budget:
        raise ValueError(f"{used} bits are the least, and {budget:.0f} are allowed")
    queue: list[tuple[float, str]] = []

    def offer(name: str) -> None:
        hull, at = hulls[name], chosen[name]
        if at + 1 < len(hull):
            gain = (hull[at].cost - hull[at + 1].cost) / (hull[at + 1].bits - hull[at].bits)
            heapq.heappush(queue, (-gain, name))

    for name in hulls:
        offer(name)
    while queue:
        _, name = heapq.heappop(queue)
        hull, at = hulls[name], chosen[name]
        more = hull[at + 1].bits - hull[at].bits
        if used + more > budget:
            continue  # a smaller step of another matrix may still fit
        used += more
        chosen[name] = at + 1
        offer(name)
    return {name: hulls[name][at] for name, at in chosen.items()}


def calibrated(
    checkpoint: Checkpoint,
    options: CalibrationOptions,
    threads: int | None,
    state: Path,
    progress: Callable[[LayerProgress], None] | None,
) -> ImportanceMatrix:
    """An importance matrix made for this."""
    windows = windows_of(checkpoint, options)
    mark, kept = _fingerprint(checkpoint, windows, options.precision), _importance_file(state)
    if kept.is_file():
        found = read_importance(kept, checkpoint.config.architecture)
        if found.datasets == (mark,):
            return found
    calibration = Calibration(
        checkpoint,
        windows,
        state=state.with_name(state.name + ".calibration"),
        threads=threads,
        precision=options.precision,
        progress=progress,
    )
    for _ in calibration.run():
        pass
    matrix = ImportanceMatrix(importance_of(checkpoint, calibration.statistics), (mark,))
    write_importance(matrix, kept, checkpoint.config.architecture, overwrite=True)
    calibration.remove_state()
    return read_importance(kept, checkpoint.config.architecture)  # the same numbers as in a run that goes on


def remove_state(state: Path) -> None:
    """What a mix measured is needed no more."""
    state.unlink(missing_ok=True)
    _importance_file(state).unlink(missing_ok=True)


def _importance_file(state: Path) -> Path:
    return state.with_name(state.name + ".gguf")


def _hull(options: Sequence[Option]) -> list[Option]:
    """The lower convex hull: sizes rise, costs fall, by less and less for a bit."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda option: (option.bits, option.cost)):
        if hull and option.cost >= hull[-1].cost:
            continue
        if hull and option.bits == hull[-1].bits:
            continue
        while len(hull) > 1 and _slope(hull[-2], option) >= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(option)
    return hull


def _slope(one: Option, other: Option) -> float:
    return (one.cost - other.cost) / (other.bits - one.bits)


def _bytes_of(tensor: Tensor, kind: str | None) -> int:
    if kind is None or kind == "keep":
        return tensor.stored_bytes
    return encoding(kind).stored_bytes(math.prod(tensor.shape))


def _probe_windows(checkpoint: Checkpoint, options: CalibrationOptions) -> list[list[int]]:
    assert checkpoint.tokenizer is not None
    windows = calibration_windows(
        checkpoint,
        checkpoint.tokenizer.build(),
        text=options.text,
        windows=tokens_for(checkpoint.config.vocab_size) // WINDOW,
        window=WINDOW,
        seed=options.seed + 1,
    )
    return [[int(token) for token in window] for window in windows]


def _fingerprint(checkpoint: Checkpoint, windows: Iterable[npt.ArrayLike], more: str) -> str:
    content = [nybble.__version__, file_stamps(checkpoint), windows_digest(windows), more]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _told(
    progress: Callable[[LayerProgress], None], checkpoint: Checkpoint, matrices: Sequence[Tensor]
) -> Callable[[int, int], None]:
    from time import perf_counter

    layers = checkpoint.config.num_hidden_layers
    started = perf_counter()
    first: list[int] = []

    def tell(done: int, total: int) -> None:
        first.append(done)
        new = done - first[0]
        left = (perf_counter() - started) / new * (total - done) if new else None
        progress(
            LayerProgress(min(done * layers // max(total, 1), layers), layers, done / max(total, 1), left)
        )

    return tell
