"""Mean KL divergence of next-token distributions from the f32 reference, for nybble and llama.cpp.

    python bench/compare_quality.py --llama-python PATH --text wikitext-2/valid.txt MODEL.gguf ...

Reference: nybble with ``precision="f32"`` and an f32 KV cache, which computes in float32 on the
dequantized weights (``greedy_parity.py`` compares it with transformers). The first ``--tokens`` tokens
of the text are cut into windows of ``--window`` tokens that know nothing of each other; a model that
wants a begin token gets it in place of each window's first. Every position counts:
KL(reference || engine) in nats, computed in float64.

Measured: nybble's fast path by prefill (a window at once) and token by token (``--decode-tokens``: how
many, as it is slow; other kernels run then), llama.cpp with batches of 512 and, on the same tokens,
one by one. Both use an f16 KV cache and, llama.cpp, flash attention (``--flash-attention off``: not).
"same best" is the share of positions whose most probable token is the reference's.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from harness import Worker, add_common_arguments, facts, note, show, table

Logits = npt.NDArray[np.float32]


def windows_of(model: Path, text: Path, count: int, window: int) -> list[list[int]]:
    """Token ids of each window."""
    from nybble.loading import read_checkpoint

    source = read_checkpoint(model).tokenizer
    if source is None:
        raise SystemExit(f"{model} has no tokenizer")
    tokenizer = source.build()
    # Fewer characters than tokens is impossible in natural text; the whole file would take long.
    start = text.read_text(encoding="utf-8")[: count * 16]
    ids = tokenizer.encode(start, add_special=False, parse_special=False)[:count]
    if len(ids) < count:
        raise SystemExit(f"{text} has {len(ids)} tokens; {count} are wanted")
    begin = list(tokenizer.prefix)
    windows = [ids[i : i + window] for i in range(0, count, window)]
    return [begin + part[len(begin) :] for part in windows]


def log_softmax(logits: Logits) -> npt.NDArray[np.float64]:
    values = logits.astype(np.float64)
    values -= values.max(axis=-1, keepdims=True)
    values -= np.log(np.exp(values).sum(axis=-1, keepdims=True))
    return values


def divergence(reference: Logits, other: Logits) -> npt.NDArray[np.float64]:
    """KL(reference || other) of each row, nats."""
    result = np.empty(len(reference))
    for i in range(0, len(reference), 32):  # float64 of all rows would take gigabytes
        p, q = log_softmax(reference[i : i + 32]), log_softmax(other[i : i + 32])
        result[i : i + 32] = (np.exp(p) * (p - q)).sum(axis=-1)
    return result


class Tally:
    """Divergences of one engine in one phase."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.same = 0

    def add(self, reference: Logits, other: Logits) -> None:
        self.values += divergence(reference, other).tolist()
        self.same += int((reference.argmax(axis=-1) == other.argmax(axis=-1)).sum())

    def summary(self) -> dict[str, float]:
        values = np.asarray(self.values)
        return {
            "tokens": len(values),
            "mean": float(values.mean()),
            "standard_error": float(values.std() / np.sqrt(len(values))),
            "median": float(np.median(values)),
            "p99": float(np.quantile(values, 0.99)),
            "max": float(values.max()),
            "same_best": self.same / len(values),
        }


def compare(arguments: argparse.Namespace, model: Path, folder: Path) -> dict[str, Any]:
    """The tallies of one file."""
    windows = windows_of(model, arguments.text, arguments.tokens, arguments.window)
    ours = ("nybble_worker.py", model, "--threads", arguments.threads)
    reference = Worker(sys.executable, *ours, "--precision", "f32", "--kv-cache", "f32")
    engines = {"nybble": Worker(sys.executable, *ours)}
    if not arguments.no_llama:
        engines["llama.cpp"] = Worker(
            arguments.llama_python, "llama_worker.py", model, "--threads", arguments.threads, "--context",
            max(512, arguments.window), "--flash-attention", arguments.flash_attention,
        )  # fmt: skip
    tallies = {(name, phase): Tally() for phase in ("prefill", "decode") for name in engines}
    left = arguments.decode_tokens
    path = folder / "logits.npy"

    def logits(worker: Worker, tokens: list[int], phase: str) -> Logits:
        worker.ask(do="logits", tokens=tokens, phase=phase, path=str(path))
        result: Logits = np.load(path)
        return result

    for number, tokens in enumerate(windows, 1):
        expected = logits(reference, tokens, "prefill")
        for name, worker in engines.items():
            tallies[name, "prefill"].add(expected, logits(worker, tokens, "prefill"))
        part = tokens[:left]
        left -= len(part)
        for name, worker in engines.items():
            if part:
                tallies[name, "decode"].add(expected[: len(part)], logits(worker, part, "decode"))
        note(f"{model.name}: window {number} of {len(windows)}")
    for worker in (reference, *engines.values()):
        worker.close()
    return {
        "model": model.name,
        "results": [
            {"engine": name, "phase": phase, **tally.summary()}
            for (name, phase), tally in tallies.items()
            if tally.values
        ],
    }


def text_of(results: list[dict[str, Any]]) -> str:
    rows = [
        (
            result["model"], row["phase"], row["engine"], row["tokens"],
            f"{row['mean']:.6f} ± {row['standard_error']:.6f}", f"{row['median']:.6f}", f"{row['p99']:.5f}",
            f"{row['same_best']:.2%}",
        )
        for result in results
        for row in result["results"]
    ]  # fmt: skip
    return table(("model", "phase", "engine", "tokens", "mean KL, nats", "median", "p99", "same best"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="KL divergence from the f32 reference: nybble and llama.cpp."
    )
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="WikiText-2's valid.txt, or any text")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--decode-tokens", type=int, default=512, metavar="N", help="default 512; 0: none")
    parser.add_argument("--flash-attention", choices=("on", "off"), default="on")
    parser.add_argument("--no-llama", action="store_true", help="nybble alone")
    add_common_arguments(parser, llama=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = [compare(arguments, model, Path(folder)) for model in arguments.models]
    about = {**facts(), "tokens": arguments.tokens, "window": arguments.window}
    show(arguments, {**about, "results": results}, text_of(results))


if __name__ == "__main__":
    main()
