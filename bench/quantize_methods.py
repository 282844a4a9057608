"""KL divergence from the original of every quantization method, at some widths and block sizes.

    python bench/quantize_methods.py --text wikitext-2/valid.txt MODEL.gguf ...

The model is dequantized to float32; that is the original. ``--off-grid 0.3`` moves weights that lie on a
coarse grid already off it, without changing the function: input features are scaled by log-normal
factors, and the inverse is folded into what comes before (``nybble.quantize.folding``).

The linears of the layers are quantized, with zero points and float16 scales; the embedding, the output
matrix and the norms stay. Layers are calibrated one after another on tokens from the second half of the
text, each on what the quantized ones before it give. KL(original || quantized), in nats, is measured on
the first tokens of the text, in windows, on the CPU device in float32. A row that a block does not divide
gets the largest group below that does.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from compare_quality import divergence
from harness import add_common_arguments, facts, note, show, table

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.encodings import encoding
from nybble.checkpoint.encodings.affine import AffineFormat
from nybble.checkpoint.tensor import Tensor
from nybble.devices.base import BatchItem
from nybble.devices.cpu import compile_session
from nybble.loading import read_checkpoint
from nybble.models import build_graph
from nybble.quantize.awq import scaled, search_clipping, search_scales
from nybble.quantize.folding import FoldingPlan, ScaleGroup, fold, plan_folding
from nybble.quantize.gptq import GptqFactor, factorize, quantize_gptq
from nybble.quantize.layer_runner import LayerRunner
from nybble.quantize.rtn import round_rtn
from nybble.quantize.statistics import InputStatistics

Floats = npt.NDArray[np.float32]
Statistics = Mapping[str, InputStatistics]


def plain(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with float32 weights at hand."""
    f32 = encoding("f32")
    tensors = {
        name: tensor.changed(encoding=f32, data=tensor.dequantize().reshape(-1).view(np.uint8))
        for name, tensor in checkpoint.tensors.items()
    }
    return replace(checkpoint, tensors=tensors)


def off_grid(checkpoint: Checkpoint, plan: FoldingPlan, deviation: float, seed: int = 0) -> Checkpoint:
    """The same function with random scales of the input features."""
    random = np.random.default_rng(seed)
    tensors = dict(checkpoint.tensors)
    for group in plan.groups:
        scales = np.exp(random.normal(size=group.scales) * deviation).astype(np.float32)
        tensors |= fold(group, scales, tensors)
    return replace(checkpoint, tensors=tensors)


def windows_of(checkpoint: Checkpoint, text: str, count: int, window: int) -> list[list[int]]:
    """Windows of the text's first tokens, each with the model's begin token if it wants one."""
    assert checkpoint.tokenizer is not None
    tokenizer = checkpoint.tokenizer.build()
    begin = list(tokenizer.prefix)
    ids = tokenizer.encode(text[: count * 8], add_special=False, parse_special=False)
    if len(ids) < count:
        raise SystemExit(f"the text has {len(ids)} tokens; {count} are wanted")
    return [begin + ids[at : at + window - len(begin)] for at in range(0, count, window)]


# -- methods ----------------------------------------------------------------------------------------------


class Layer:
    """What a method knows of the layer that it quantizes."""

    def __init__(self, statistics: Statistics, threads: int) -> None:
        self.statistics = dict(statistics)
        self.threads = threads
        self._factors: dict[tuple[int, bool], GptqFactor] = {}

    def factor(self, name: str, *, act_order: bool) -> GptqFactor:
        own = self.statistics[name]
        key = (id(own), act_order)
        if key not in self._factors:
            assert own.hessian is not None
            self._factors[key] = factorize(own.hessian, act_order=act_order)
        return self._factors[key]


Make = Callable[[Layer, str, Floats, AffineFormat], Floats]


def rtn(layer: Layer, name: str, weight: Floats, form: AffineFormat) -> Floats:
    return round_rtn(weight, form, clipping=False, threads=layer.threads)


def rtn_clipped(layer: Layer, name: str, weight: Floats, form: AffineFormat) -> Floats:
    return round_rtn(weight, form, threads=layer.threads)


def rtn_weighted(layer: Layer, name: str, weight: Floats, form: AffineFormat) -> Floats:
    importance = layer.statistics[name].sum_squares
    return round_rtn(weight, form, importance=importance, threads=layer.threads)


def clipped(layer: Layer, name: str, weight: Floats, form: AffineFormat) -> Floats:
    if not name.endswith(("q_proj.weight", "k_proj.weight", "qkv_proj.weight")):
        weight = search_clipping(weight, layer.statistics[name], form, threads=layer.threads)
    return round_rtn(weight, form, clipping=False, threads=layer.threads)


def gptq(*, act_order: bool, static_groups: bool = False, clipping: bool = True) -> Make:
    def make(layer: Layer, name: str, weight: Floats, form: AffineFormat) -> Floats:
        result = quantize_gptq(
            weight,
            layer.factor(name, act_order=act_order),
            form,
            static_groups=static_groups,
            clipping=clipping,
            threads=layer.threads,
        )
        values = encoding(form.name).dequantize(result.data).reshape(weight.shape)
        if result.permutation is not None:
            back = np.empty_like(values)
            back[:, result.permutation] = values
            return back
        return values

    return make


METHODS: dict[str, tuple[Make | None, Make]] = {
    "RTN": (None, rtn),
    "RTN, clipping": (None, rtn_clipped),
    "RTN, weighted clipping": (None, rtn_weighted),
    "AWQ scales": (rtn, rtn),
    "AWQ scales and clipping": (rtn, clipped),
    "AWQ scales, weighted clipping": (rtn, rtn_weighted),
    "GPTQ, no clipping": (None, gptq(act_order=False, clipping=False)),
    "GPTQ": (None, gptq(act_order=False)),
    "GPTQ, act-order, static groups": (None, gptq(act_order=True, static_groups=True)),
    "GPTQ, act-order": (None, gptq(act_order=True)),
    "AWQ scales and GPTQ": (rtn, gptq(act_order=False)),
    "AWQ scales and GPTQ, act-order, static groups": (rtn, gptq(act_order=True, static_groups=True)),
}
"""What AWQ's scales are searched for, and what rounds in the end."""


def quantized(
    checkpoint: Checkpoint,
    windows: Sequence[Sequence[int]],
    plan: FoldingPlan,
    search: Make | None,
    make: Make,
    form: Callable[[int], AffineFormat],
    threads: int,
) -> Checkpoint:
    """The checkpoint with the layers' linears rounded; ``form`` of the number of columns."""
    tensors = dict(checkpoint.tensors)
    with LayerRunner(checkpoint, windows, threads=threads) as runner:
        for number in range(runner.num_layers):
            layer = Layer(runner.collect(number, hessian=True), threads)
            changed: dict[str, Tensor] = {}
            if search is not None:
                for group in plan.groups:
                    if group.linears[0] in layer.statistics:
                        changed |= scaled_group(layer, group, {**tensors, **changed}, search, form)
            for name in layer.statistics:
                tensor = changed.get(name, tensors[name])
                weight = tensor.dequantize()
                values = np.ascontiguousarray(make(layer, name, weight, form(weight.shape[1])))
                changed[name] = tensor.changed(data=values.reshape(-1).view(np.uint8))
            tensors |= changed
            runner.replace(changed)
            runner.advance(number)
    return replace(checkpoint, tensors=tensors)


def scaled_group(
    layer: Layer,
    group: ScaleGroup,
    tensors: Mapping[str, Tensor],
    search: Make,
    form: Callable[[int], AffineFormat],
) -> dict[str, Tensor]:
    """The tensors that AWQ's scales of a group change; its statistics become those of the divided inputs."""
    name = group.linears[0]
    statistics = layer.statistics[name]
    weights = [tensors[linear].dequantize() for linear in group.linears]
    own = form(weights[0].shape[1])
    found = search_scales(
        weights, statistics, lambda values: search(layer, name, values, own), source=group.source
    )
    divided = scaled(statistics, found.scales[group.source])
    layer.statistics.update(dict.fromkeys(group.linears, divided))
    return fold(group, found.scales, tensors)


def form_for(bits: int, block: int, columns: int) -> AffineFormat:
    size = next(size for size in range(min(block, columns), 0, -8) if columns % size == 0)
    return AffineFormat(bits, size, "f16", True)


# -- measuring --------------------------------------------------------------------------------------------


def logits(checkpoint: Checkpoint, windows: Sequence[Sequence[int]], threads: int) -> Iterator[Floats]:
    session = compile_session(
        checkpoint, context_length=max(map(len, windows)), threads=threads, precision="f32", kv_cache="f32"
    )
    for tokens in windows:
        sequence = session.new_sequence()
        yield session.forward([BatchItem(sequence, list(tokens), "all")])
        sequence.close()
    session.close()


def measure(arguments: argparse.Namespace, path: Path, folder: Path) -> list[dict[str, Any]]:
    """Rows of the table for one model."""
    checkpoint = plain(read_checkpoint(path))
    plan = plan_folding(build_graph(checkpoint))
    if arguments.off_grid:
        checkpoint = off_grid(checkpoint, plan, arguments.off_grid)
    text = arguments.text.read_text(encoding="utf-8")
    calibration = windows_of(
        checkpoint, text[len(text) // 2 :], arguments.calibration_tokens, arguments.window
    )
    # Every token attends to a window's first one, whose values are unlike all others ("attention sink"):
    # one token in 512 would weigh too little in what GPTQ learns.
    starts = sorted({token for window in calibration for token in window})
    chosen = np.random.default_rng(0).permutation(starts)[: arguments.sinks]
    calibration += [[int(token)] for token in chosen]
    windows = windows_of(checkpoint, text, arguments.tokens, arguments.window)
    threads = arguments.threads
    files = [folder / f"{path.stem}-{number}.npy" for number in range(len(windows))]
    for file, original in zip(files, logits(checkpoint, windows, threads), strict=True):
        np.save(file, original)
    rows = []
    for bits in arguments.bits:
        for block in arguments.block:
            for method, (search, make) in METHODS.items():
                if arguments.method and method not in arguments.method:
                    continue
                started = time.perf_counter()
                ours = quantized(
                    checkpoint, calibration, plan, search, make, partial(form_for, bits, block), threads
                )
                seconds = time.perf_counter() - started
                values: list[float] = []
                for file, found in zip(files, logits(ours, windows, threads), strict=True):
                    values += divergence(np.load(file, mmap_mode="r"), found).tolist()
                row = {
                    "model": path.stem,
                    "bits": bits,
                    "block": block,
                    "method": method,
                    "mean": float(np.mean(values)),
                    "standard_error": float(np.std(values) / np.sqrt(len(values))),
                    "p99": float(np.quantile(values, 0.99)),
                    "seconds": seconds,
                }
                note(str(row))
                rows.append(row)
    for file in files:
        file.unlink()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="KL divergence of quantization methods from the original.")
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--sinks", type=int, default=512, help="calibration windows of a single token")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--block", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--method", nargs="+", choices=list(METHODS), default=[])
    parser.add_argument("--off-grid", type=float, default=0.0, metavar="DEVIATION")
    add_common_arguments(parser)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        rows = [row for path in arguments.models for row in measure(arguments, path, Path(folder))]
    lines = [
        (
            row["model"],
            row["bits"],
            row["block"],
            row["method"],
            f"{row['mean']:.4f} ± {row['standard_error']:.4f}",
            f"{row['p99']:.3f}",
            f"{row['seconds']:.0f}",
        )
        for row in rows
    ]
    header = ("model", "bits", "block", "method", "mean KL, nats", "p99", "seconds")
    show(arguments, {"facts": facts(), "rows": rows}, table(header, lines))


if __name__ == "__main__":
    main()
