"""KL divergence from the original of every GGUF type, made by nybble's quantizer and by llama.cpp's.

    python bench/compare_types.py --library LIBGGML_BASE --text wikitext-2/valid.txt MODEL [TYPE ...]

``LIBGGML_BASE`` is ``libggml-base.so`` in the ``lib`` folder of an installed ``llama_cpp``. MODEL is
anything that nybble reads, dequantized to float32: that is the original. One that lies on a coarse grid is
moved off it by ``--off-grid 0.3``, or once and for all by ``make_off_grid.py``.

A few weights are multiplied with activations a thousand times larger than all others, and how well they
happen to be rounded decides much of a divergence. Therefore ``--off-grid 0.3 --seeds 0 1 2 3 4`` moves the
model several times, in other ways, calibrates and compares each, and gives the means over all of them.

For one type at a time both quantize the same matrices, all linears of the layers whose rows are whole
blocks of it, and everything else stays as it is; which ones, stands below the table. Both get the same
importance: an importance matrix of the original (``--importance``, from ``nybble calibrate``), or one that
is made here from nybble's own text, and none. Types for which llama.cpp insists on one are compared only
with it.

KL(original || quantized), nats: the first ``--tokens`` tokens of the text in windows that know nothing of
each other, on the CPU device in float32 (``--precision fast``: with its fast kernels, whose rounding of
activations adds a divergence of its own, shown as the type "none"). Errors are standard errors: those of
the mean over tokens, taken as independent, and with several seeds those of the mean over seeds, too, added
as squares. One model moved in one way has an error bar for its tokens alone.

"difference" is ours minus llama.cpp's on the same tokens, and its own error, which decides; below 0 nybble
is better. "weighted error" is what both minimise, the squared error weighed by importance, as a share of
llama.cpp's: the geometric mean over the matrices, and the largest. With importance both mean it; without,
llama.cpp weighs with a guess of its own, and it is the plain error here.

Times are of quantizing all matrices, with the same threads; llama.cpp's rows are dealt out to threads as
its tool does. ``--clock cpu`` counts processor time instead of the wall's.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from divergences import Divergences, divergences_of
from harness import add_common_arguments, facts, note, show, table
from quantize_methods import off_grid, plain, windows_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.encodings import ENCODINGS, encoding
from nybble.checkpoint.encodings.base import Bytes
from nybble.devices.base import BatchItem
from nybble.devices.cpu import compile_session
from nybble.evaluate.estimates import Estimate, mean, quantile
from nybble.loading import read_checkpoint
from nybble.models import build_graph
from nybble.quantize.blocks import BLOCK_TYPES, quantize_blocks
from nybble.quantize.calibrate import Calibration, calibration_windows
from nybble.quantize.folding import plan_folding
from nybble.quantize.importance import read_importance
from support.ggml_quantizer import NEEDS_IMPORTANCE, GgmlQuantizer

Floats = npt.NDArray[np.float32]
Weights = Mapping[str, Floats]
Quantize = Callable[[str, Floats, Floats | None], Bytes]

NONE = "none"
"""The type of the row that shows what the arithmetic alone costs."""


@dataclass
class Subject:
    """A model that is quantized, and what is needed for it."""

    checkpoint: Checkpoint
    """The original, float32."""
    matrices: Weights
    """The linears of the layers."""
    importance: Weights
    windows: list[list[int]]
    logits: list[Path]
    """The original's, one file a window: float32 (tokens, vocab_size)."""


def importance_of(arguments: argparse.Namespace, checkpoint: Checkpoint) -> Weights:
    """The mean squares of what each column is multiplied with, from a file or calibrated here."""
    if arguments.importance is not None:
        matrix = read_importance(arguments.importance, checkpoint.config.architecture)
        matrix.check(checkpoint)
        return {name: entry.mean_squares for name, entry in matrix.entries.items()}
    assert checkpoint.tokenizer is not None
    windows = calibration_windows(
        checkpoint, checkpoint.tokenizer.build(), windows=arguments.calibration_windows
    )
    note(f"calibrating on {sum(map(len, windows))} tokens")
    calibration = Calibration(checkpoint, windows, threads=arguments.threads)
    for _ in calibration.run():
        pass
    return {
        name: (seen.sum_squares / max(1, seen.tokens)).astype(np.float32)
        for name, seen in calibration.statistics.items()
    }


def subject_of(arguments: argparse.Namespace, folder: Path, seed: int) -> Subject:
    """Reads the model, moves it, calibrates, and writes the original's logits into the folder."""
    checkpoint = plain(read_checkpoint(arguments.model))
    plan = plan_folding(build_graph(checkpoint))
    if arguments.off_grid:
        checkpoint = off_grid(checkpoint, plan, arguments.off_grid, seed)
    names = [name for group in plan.groups for name in group.linears] + list(plan.unscaled)
    matrices = {
        name: checkpoint.tensors[name].dequantize()
        for name in checkpoint.tensors
        if name in names and name.startswith("model.layers.")
    }
    importance = importance_of(arguments, checkpoint)
    if unknown := sorted(set(matrices) - set(importance)):
        raise SystemExit(f"the importance matrix knows nothing of {', '.join(unknown)}")
    text = arguments.text.read_text(encoding="utf-8")
    windows = windows_of(checkpoint, text, arguments.tokens, arguments.window)
    files = []
    for number, found in enumerate(logits_of(checkpoint, windows, arguments.threads, "f32")):
        files.append(folder / f"{number}.npy")
        np.save(files[-1], found)
    return Subject(checkpoint, matrices, importance, windows, files)


def logits_of(
    checkpoint: Checkpoint, windows: Sequence[Sequence[int]], threads: int, precision: str
) -> Iterator[Floats]:
    """The logits of each window."""
    session = compile_session(
        checkpoint,
        context_length=max(map(len, windows)),
        threads=threads,
        precision=precision,
        kv_cache="f32" if precision == "f32" else "f16",
    )
    for tokens in windows:
        sequence = session.new_sequence()
        yield session.forward([BatchItem(sequence, list(tokens), "all")])
        sequence.close()
    session.close()


def measured(subject: Subject, checkpoint: Checkpoint, arguments: argparse.Namespace) -> Divergences:
    """KL divergences of a model from the original."""
    found = logits_of(checkpoint, subject.windows, arguments.threads, arguments.precision)
    return divergences_of(subject.logits, found, arguments.threads)


@dataclass
class Made:
    """All matrices in one type."""

    data: dict[str, Bytes]
    seconds: float


def make(
    subject: Subject, eligible: Sequence[str], importance: Weights | None, quantize: Quantize, clock: str
) -> Made:
    """Quantizes, and takes the time of that alone."""
    now = time.perf_counter if clock == "wall" else time.process_time
    data: dict[str, Bytes] = {}
    started = now()
    for name in eligible:
        weights = None if importance is None else importance[name]
        data[name] = quantize(name, subject.matrices[name], weights)
    return Made(data, now() - started)


def weighted_error(values: Floats, type_name: str, data: Bytes, importance: Floats | None) -> float:
    """The sum of squared errors, each column's weighed by its importance."""
    difference = values - ENCODINGS[type_name].dequantize(data).reshape(values.shape)
    columns = np.einsum("ij,ij->j", difference, difference, dtype=np.float64)
    return float(columns.sum() if importance is None else columns @ importance.astype(np.float64))


def with_blocks(checkpoint: Checkpoint, type_name: str, data: Mapping[str, Bytes]) -> Checkpoint:
    """The checkpoint with some of its matrices in a block type."""
    form = encoding(type_name)
    tensors = dict(checkpoint.tensors)
    for name, blocks in data.items():
        tensors[name] = tensors[name].changed(encoding=form, data=blocks)
    return replace(checkpoint, tensors=tensors)


@dataclass
class Outcome:
    """One type, with or without importance, in one subject; by who made it: "nybble", "llama.cpp"."""

    eligible: list[str]
    left: list[str]
    """Linears that stay float32."""
    divergences: dict[str, Divergences]
    errors: dict[str, list[float]]
    """Weighted errors, one entry a matrix."""
    seconds: dict[str, float]


def compare(
    subject: Subject, theirs: GgmlQuantizer, type_name: str, weighed: bool, arguments: argparse.Namespace
) -> Outcome:
    """Quantizes and measures."""
    threads = arguments.threads
    block = ENCODINGS[type_name].block_size
    eligible = [name for name, values in subject.matrices.items() if values.shape[1] % block == 0]
    importance = subject.importance if weighed else None

    def ours(name: str, values: Floats, weights: Floats | None) -> Bytes:
        return quantize_blocks(values, type_name, importance=weights, threads=threads)

    def peer(name: str, values: Floats, weights: Floats | None) -> Bytes:
        return theirs.quantize(values, type_name, weights, threads)

    outcome = Outcome(eligible, sorted(set(subject.matrices) - set(eligible)), {}, {}, {})
    if not eligible:
        return outcome
    makers: dict[str, Quantize] = {"nybble": ours}
    if weighed or type_name not in NEEDS_IMPORTANCE:
        makers["llama.cpp"] = peer
        theirs.prepare(type_name)  # its tables, made once a process, do not count
    for maker, quantize in makers.items():
        made = make(subject, eligible, importance, quantize, arguments.clock)
        outcome.seconds[maker] = made.seconds
        outcome.errors[maker] = [
            weighted_error(
                subject.matrices[name],
                type_name,
                made.data[name],
                None if importance is None else importance[name],
            )
            for name in eligible
        ]
        quantized = with_blocks(subject.checkpoint, type_name, made.data)
        outcome.divergences[maker] = measured(subject, quantized, arguments)
    return outcome


def overall(values: npt.NDArray[np.float64]) -> Estimate:
    """The mean of (seeds, tokens); see the top of this file."""
    over_tokens = mean(values.mean(axis=0))
    over_seeds = mean(values.mean(axis=1))
    return Estimate(over_tokens.value, float(np.hypot(over_tokens.error, over_seeds.error)))


def summary(type_name: str, weighed: bool | None, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """One row of the table, of what all seeds gave."""
    first = outcomes[0]
    result: dict[str, Any] = {
        "type": type_name,
        "importance": weighed,
        "matrices": len(first.eligible),
        "float32": first.left,
    }
    klds = {}
    for maker in first.divergences:
        klds[maker] = np.stack([outcome.divergences[maker].kld for outcome in outcomes])
        average = overall(klds[maker])
        result[maker] = {
            "mean": average.value,
            "standard_error": average.error,
            "p99": quantile(klds[maker].reshape(-1), 0.99).value,
            "same_best": float(np.mean([outcome.divergences[maker].same_best for outcome in outcomes])),
            "seconds": float(np.mean([outcome.seconds[maker] for outcome in outcomes])),
        }
    if len(klds) < 2:
        return result
    by_token = klds["nybble"] - klds["llama.cpp"]
    difference = overall(by_token)
    errors = {maker: np.array([outcome.errors[maker] for outcome in outcomes]) for maker in klds}
    ratios = np.maximum(errors["nybble"], 1e-30) / np.maximum(errors["llama.cpp"], 1e-30)
    return {
        **result,
        "difference": difference.value,
        "difference_error": difference.error,
        "difference_by_seed": by_token.mean(axis=1).tolist(),
        "error_ratio": float(np.exp(np.log(ratios).mean())),
        "error_ratio_max": float(ratios.max()),
        "worst_matrix": first.eligible[int(ratios.max(axis=0).argmax())],
        "times_as_fast": result["llama.cpp"]["seconds"] / result["nybble"]["seconds"],
    }


def digits(value: float) -> str:
    """A mean KL divergence: four digits that say something."""
    return f"{value:.4g}"


def line_of(result: Mapping[str, Any]) -> list[str]:
    """A row of the table."""
    ours, peer = result["nybble"], result.get("llama.cpp")
    importance = "" if result["importance"] is None else "yes" if result["importance"] else "no"
    line = [result["type"], importance, str(result["matrices"])]
    line += [
        "" if found is None else f"{digits(found['mean'])} ± {found['standard_error']:.2g}"
        for found in (ours, peer)
    ]
    if peer is None:
        return [*line, "", f"{ours['p99']:.3g}", f"{ours['same_best']:.2%}", "", f"{ours['seconds']:.1f}", ""]
    return [
        *line,
        f"{result['difference']:+.2g} ± {result['difference_error']:.2g}",
        f"{ours['p99']:.3g} / {peer['p99']:.3g}",
        f"{ours['same_best']:.2%} / {peer['same_best']:.2%}",
        f"{result['error_ratio']:.4f} ({result['error_ratio_max']:.4f})",
        f"{ours['seconds']:.1f} / {peer['seconds']:.1f}",
        f"{result['times_as_fast']:.1f}",
    ]


HEADER = (
    "type", "importance", "matrices", "mean KL, nybble", "mean KL, llama.cpp", "difference", "p99",
    "same best", "weighted error (largest)", "seconds", "times as fast",
)  # fmt: skip


def kinds(names: Sequence[str]) -> str:
    """Which linears those are, and how many of each."""
    counts: dict[str, int] = {}
    for name in names:
        kind = name.split(".", 3)[3].removesuffix(".weight")
        counts[kind] = counts.get(kind, 0) + 1
    return ", ".join(f"{kind} ({count})" for kind, count in sorted(counts.items()))


def left_out(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each set of matrices that stayed float32, with the types."""
    types: dict[str, list[str]] = {}
    for result in results:
        what = kinds(result["float32"])
        if what and result["type"] not in types.setdefault(what, []):
            types[what].append(result["type"])
    return [f"Left float32 for {', '.join(names)}: {what}." for what, names in types.items()]


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("types", nargs="*", metavar="TYPE", help="default: all that nybble makes")
    parser.add_argument("--library", type=Path, required=True, metavar="LIBGGML_BASE")
    parser.add_argument("--text", type=Path, required=True, help="WikiText-2's valid.txt, or any text")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--window", type=int, default=512)
    moved = parser.add_mutually_exclusive_group()
    moved.add_argument("--importance", type=Path, help="an importance matrix of this very model")
    moved.add_argument("--off-grid", type=float, default=0.0, metavar="DEVIATION")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of --off-grid; default: 0")
    parser.add_argument("--calibration-windows", type=int, default=64, help="of 512 tokens")
    parser.add_argument("--only", choices=("with", "without"), help="importance; default: both")
    parser.add_argument("--precision", choices=("f32", "fast"), default="f32")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    add_common_arguments(parser)
    arguments = parser.parse_args()
    if wrong := [name for name in arguments.types if name not in BLOCK_TYPES]:
        parser.error(f"no such type: {', '.join(wrong)}; there are {', '.join(BLOCK_TYPES)}")
    if len(arguments.seeds) > 1 and not arguments.off_grid:
        parser.error("--seeds are other ways of moving the model: they need --off-grid")
    theirs = GgmlQuantizer(arguments.library)
    types = arguments.types or BLOCK_TYPES
    weighed_or_not = {"with": (True,), "without": (False,), None: (False, True)}[arguments.only]
    rows: list[tuple[str, bool | None]] = [(NONE, None), *product(types, weighed_or_not)]
    outcomes: dict[tuple[str, bool | None], list[Outcome]] = {row: [] for row in rows}
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as folder:
            subject = subject_of(arguments, Path(folder), seed)
            for type_name, weighed in rows:
                if weighed is None:
                    alone = measured(subject, subject.checkpoint, arguments)
                    outcome = Outcome([], [], {"nybble": alone}, {}, {"nybble": 0.0})
                else:
                    outcome = compare(subject, theirs, type_name, weighed, arguments)
                outcomes[type_name, weighed].append(outcome)
                so_far = summary(type_name, weighed, outcomes[type_name, weighed])
                note(str({key: value for key, value in so_far.items() if key != "float32"}))
    results = [summary(*row, found) for row, found in outcomes.items()]
    lines = [line_of(result) for result in results if "nybble" in result]
    text = "\n".join([table(HEADER, lines), "", *left_out(results)])
    about = {
        **facts(),
        "model": str(arguments.model),
        "tokens": arguments.tokens,
        "threads": arguments.threads,
    }
    show(arguments, {**about, "precision": arguments.precision, "results": results}, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
