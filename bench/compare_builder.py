"""nybble's ONNX folders beside those of onnxruntime-genai's own model builder: both in onnxruntime-genai.

    python bench/compare_builder.py SCRATCH MODEL ... [--targets onnx-cpu-int4 onnx-cpu-fp32] \\
        [--text wikitext-2/valid.txt]

A MODEL is anything that nybble reads. It becomes a float32 Hugging Face folder, from which the builder
makes its ONNX folder and nybble its own, with the same precision. Both are run by onnxruntime-genai in
one process each, taking turns (``compare_genai.py``); size is that of the whole folder, peak memory the
resident set after the turns. With ``--text``: mean KL divergence, nats, of each folder's next-token
distribution from the float32 model's, by ONNX Runtime on the CPU. Folders for CUDA and DirectML are
compared by size only where their providers are missing.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from compare_quality import Tally, windows_of
from harness import MB, Worker, add_common_arguments, facts, note, show, spread, table

BUILDER = {
    "onnx-cpu-int4": ("int4", "cpu"),
    "onnx-cpu-fp32": ("fp32", "cpu"),
    "onnx-cuda-fp16": ("fp16", "cuda"),
    "onnx-cuda-int4": ("int4", "cuda"),
    "onnx-dml-int4": ("int4", "dml"),
}
"""What the builder calls each target: precision and execution provider."""
RUNS_HERE = ("onnx-cpu-int4", "onnx-cpu-fp32")


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def build(
    arguments: argparse.Namespace,
    source: Path,
    folder: Path,
    precision: str,
    provider: str,
    cache: Path,
    *options: str,
) -> float:
    """Has the builder make a folder, with its own extra options (``key=value``); seconds."""
    command = [arguments.genai_python, Path(__file__).with_name("run_builder.py"), "-i", source]
    command += ["-o", folder, "-p", precision, "-e", provider, "-c", cache]
    if options:
        command += ["--extra_options", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    started = time.perf_counter()
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"the builder failed: {done.stderr[-2000:]}")
    return time.perf_counter() - started


def make(arguments: argparse.Namespace, model: str, scratch: Path) -> dict[str, dict[str, Path]]:
    """The folders of one model: by target, the builder's and nybble's; and the float32 source."""
    import nybble

    source = scratch / "source"
    if not source.exists():  # a run with --keep was there before
        nybble.convert(model, source, to="safetensors", encoding="f32")
        (source / "nybble.json").unlink()  # what GGUF carried must not help
    found: dict[str, dict[str, Path]] = {}
    for target in arguments.targets:
        precision, provider = BUILDER[target]
        ours, theirs = scratch / f"nybble-{target}", scratch / f"builder-{target}"
        if not theirs.exists():
            seconds = build(arguments, source, theirs, precision, provider, scratch / "cache")
            note(f"{target}: built by onnxruntime-genai in {seconds:.1f} s")
        options = {"method": "rtn"} if target == "onnx-dml-int4" else {}
        started = time.perf_counter()
        nybble.convert(source, ours, to=target, overwrite=True, **options)
        note(f"{target}: written by nybble in {time.perf_counter() - started:.1f} s")
        found[target] = {"builder": theirs, "nybble": ours}
    return found


def speed(arguments: argparse.Namespace, folders: dict[str, Path], vocab_size: int) -> dict[str, Any]:
    """Tokens a second of both folders in onnxruntime-genai, and its peak memory."""
    context = -(-(arguments.prefill + arguments.decode + 2) // 256) * 256
    workers = {
        name: Worker(
            arguments.genai_python, "onnx_worker.py", "genai", folder, "--threads", arguments.threads,
            "--context", context,
        )
        for name, folder in folders.items()
    }  # fmt: skip
    draw = random.Random(0)
    rates: dict[str, dict[str, list[float]]] = {n: {"prefill": [], "decode": []} for n in folders}
    for repetition in range(arguments.repetitions + 1):
        prompt = [draw.randrange(vocab_size) for _ in range(arguments.prefill)]
        for name in folders if repetition % 2 else reversed(folders):
            time.sleep(arguments.pause)
            answer = workers[name].ask(do="time", prompt=prompt, decode=arguments.decode)
            if repetition:
                for phase, rate in rates[name].items():
                    rate.append(getattr(arguments, phase) / answer[phase])
    memory = {name: worker.ask(do="memory")["VmHWM"] for name, worker in workers.items()}
    for worker in workers.values():
        worker.close()
    return {
        name: {**{phase: spread(values) for phase, values in rates[name].items()}, "peak": memory[name]}
        for name in folders
    }


def quality(
    arguments: argparse.Namespace, model: Path, folders: dict[str, Path], scratch: Path
) -> dict[str, Any]:
    """KL divergence of each folder from the float32 source on nybble's reference path."""
    windows = windows_of(model, arguments.text, arguments.tokens, arguments.window)
    reference = Worker(
        sys.executable, "nybble_worker.py", model, "--threads", arguments.threads,
        "--precision", "f32", "--kv-cache", "f32",
    )  # fmt: skip
    workers = {
        name: Worker(
            sys.executable, "onnx_worker.py", "nybble", folder, "--threads", arguments.threads,
            "--context", max(512, arguments.window),
        )
        for name, folder in folders.items()
    }  # fmt: skip
    tallies = {name: Tally() for name in folders}
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        path = Path(folder) / "logits.npy"
        for tokens in windows:
            reference.ask(do="logits", tokens=tokens, phase="prefill", path=str(path))
            expected = np.load(path)
            for name, worker in workers.items():
                worker.ask(do="logits", tokens=tokens, path=str(path))
                tallies[name].add(expected, np.load(path))
    for worker in (reference, *workers.values()):
        worker.close()
    return {name: tally.summary() for name, tally in tallies.items()}


def compare(arguments: argparse.Namespace, model: str) -> list[dict[str, Any]]:
    """One entry a target."""
    from nybble.loading import read_checkpoint

    scratch = arguments.scratch / Path(model).stem
    scratch.mkdir(parents=True, exist_ok=True)
    made = make(arguments, model, scratch)
    source = scratch / "source"
    vocab_size = read_checkpoint(source).config.vocab_size
    results = []
    for target, folders in made.items():
        result: dict[str, Any] = {"model": Path(model).stem, "target": target}
        result["bytes"] = {name: folder_bytes(folder) for name, folder in folders.items()}
        if target in RUNS_HERE:
            result["speed"] = speed(arguments, folders, vocab_size)
            if arguments.text:
                result["quality"] = quality(arguments, source, folders, scratch)
        results.append(result)
        note(f"{model}: {target} done")
    if not arguments.keep:
        shutil.rmtree(scratch)
    return results


def text_of(results: list[dict[str, Any]]) -> str:
    rows = []
    for result in results:
        for name in ("builder", "nybble"):
            rate = result.get("speed", {}).get(name)
            found = result.get("quality", {}).get(name)
            rows.append(
                (
                    result["model"],
                    result["target"],
                    name,
                    f"{result['bytes'][name] / MB:.1f}",
                    f"{rate['peak'] / MB:.0f}" if rate else "",
                    f"{rate['prefill']['median']:.0f}" if rate else "",
                    f"{rate['decode']['median']:.1f}" if rate else "",
                    f"{found['mean']:.5f} ± {found['standard_error']:.5f}" if found else "",
                    f"{found['same_best']:.2%}" if found else "",
                )
            )
    header = ("model", "target", "made by", "MB", "peak MB", "prefill", "decode", "mean KL", "same best")
    return table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare nybble's ONNX folders with the builder's.")
    parser.add_argument("scratch", type=Path, help="folder for what is made; deleted unless --keep")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--targets", nargs="+", choices=sorted(BUILDER), default=list(BUILDER))
    parser.add_argument("--text", type=Path, help="WikiText-2's valid.txt, or any text: compare quality too")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--pause", type=float, default=0.5, help="seconds before each turn")
    parser.add_argument("--keep", action="store_true", help="keep the folders")
    parser.add_argument(
        "--genai-python",
        default=sys.executable,
        help="interpreter that has onnxruntime_genai, torch and transformers (default: this)",
    )
    add_common_arguments(parser)
    arguments = parser.parse_args()
    results = [result for model in arguments.models for result in compare(arguments, model)]
    show(arguments, {**facts(), "results": results}, text_of(results))


if __name__ == "__main__":
    main()
