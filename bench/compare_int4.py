"""int4 ONNX folders beside those of onnxruntime-genai's builder: size and KL divergence, by algorithm.

    python bench/compare_int4.py SOURCE SCRATCH --text wikitext-2/valid.txt \\
        [--algorithms default k_quant k_quant_mixed] [--ours AWQ=FOLDER ...]

SOURCE is a Hugging Face folder in float32, the original (``make_off_grid.py`` makes one of a model that was
quantized before). The builder makes an int4 folder for the CPU with each algorithm (blocks of 32):

- ``default`` and ``rtn``: rounding to nearest, symmetric; ``rtn_last``: the output matrix in 8 bits;
- ``k_quant``: scales and zero points searched as llama.cpp's K types do, weighed by the weights' size;
  ``k_quant_last``: the output matrix in 8 bits; ``k_quant_mixed``: also the first and the last eighth of the
  layers, and v and down of every third one.

nybble makes its ``onnx-cpu-int4`` ("nybble RTN"), and any others are named by ``--ours NAME=FOLDER``. Folders
that SCRATCH has from an earlier run are taken as they are.

KL(original || folder), nats, of the first ``--tokens`` tokens in windows that know nothing of each other.
``by onnxruntime``: as the folder runs there, on the CPU, which rounds activations to int8 (its
``accuracy_level`` 4, unless the folder says otherwise). ``by f32``: by nybble's reference path, in float32 on
the same weights: what rounding the weights alone cost. "minus NAME" is the difference from another
folder's divergence on the same tokens, with its own standard error, which decides; below 0 is better than
NAME. MB is of the whole folder, model MB of its ONNX files alone. Errors are standard errors, tokens taken
as independent.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from compare_builder import build, folder_bytes
from compare_quality import windows_of
from divergences import Divergences, divergences_of
from harness import MB, Worker, add_common_arguments, facts, note, show, table

from nybble.evaluate.estimates import Estimate, mean

ALGORITHMS = ("default", "rtn", "rtn_last", "k_quant", "k_quant_last", "k_quant_mixed")
ENGINES = ("onnxruntime", "f32")


def make(arguments: argparse.Namespace) -> dict[str, Path]:
    """All folders, by the names that the table gives them."""
    import nybble

    found: dict[str, Path] = {}
    for algorithm in arguments.algorithms:
        folder = arguments.scratch / algorithm
        if not folder.exists():
            seconds = build(
                arguments, arguments.source, folder, "int4", "cpu", arguments.scratch / "cache",
                f"algo_config={algorithm}", "block_size=32",
            )  # fmt: skip
            note(f"{algorithm}: built by onnxruntime-genai in {seconds:.1f} s")
        found[f"builder {algorithm}"] = folder
    if not arguments.no_rtn:
        folder = arguments.scratch / "nybble-rtn"
        if not folder.exists():
            nybble.convert(arguments.source, folder, to="onnx-cpu-int4")
        found["nybble RTN"] = folder
    for item in arguments.ours:
        name, _, folder = item.partition("=")
        if not name or not Path(folder).is_dir():
            raise SystemExit(f"--ours {item}: NAME=FOLDER is wanted, and a folder that exists")
        found[name] = Path(folder)
    return found


def logits_into(folder: Path, worker: Worker, windows: Sequence[list[int]]) -> list[Path]:
    """Has a worker write the logits of each window."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{number}.npy" for number in range(len(windows))]
    for path, tokens in zip(paths, windows, strict=True):
        worker.ask(do="logits", tokens=tokens, phase="prefill", path=str(path))
    worker.close()
    return paths


def worker_of(engine: str, folder: Path, arguments: argparse.Namespace) -> Worker:
    if engine == "onnxruntime":
        return Worker(
            sys.executable, "onnx_worker.py", "nybble", folder, "--threads", arguments.threads, "--context",
            max(512, arguments.window),
        )  # fmt: skip
    return Worker(
        sys.executable, "nybble_worker.py", folder, "--threads", arguments.threads, "--precision", "f32",
        "--kv-cache", "f32",
    )  # fmt: skip


def measured(arguments: argparse.Namespace, folders: Mapping[str, Path]) -> dict[str, dict[str, Divergences]]:
    """By engine and name."""
    windows = windows_of(arguments.source, arguments.text, arguments.tokens, arguments.window)
    result: dict[str, dict[str, Divergences]] = {engine: {} for engine in arguments.engines}
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        originals = logits_into(
            Path(scratch) / "original", worker_of("f32", arguments.source, arguments), windows
        )
        for engine in arguments.engines:
            for name, folder in folders.items():
                # The files of one folder are replaced by the next one's.
                paths = logits_into(Path(scratch) / "folder", worker_of(engine, folder, arguments), windows)
                found = divergences_of(
                    originals, (np.load(path, mmap_mode="r") for path in paths), arguments.threads
                )
                result[engine][name] = found
                note(f"{name} by {engine}: {found.kld.mean():.5f}")
    return result


def shown(of: Estimate | None, *, sign: bool = False) -> str:
    if of is None:
        return ""
    return f"{of.value:+.4f} ± {of.error:.4f}" if sign else f"{of.value:.4f} ± {of.error:.4f}"


def rows_of(
    folders: Mapping[str, Path], found: Mapping[str, Mapping[str, Divergences]], against: Sequence[str]
) -> list[dict[str, Any]]:
    """One entry for each folder and engine."""
    rows = []
    for engine, by_name in found.items():
        for name, one in by_name.items():
            differences = {other: mean(one.kld - by_name[other].kld) for other in against if other != name}
            rows.append(
                {
                    "folder": name,
                    "engine": engine,
                    "bytes": folder_bytes(folders[name]),
                    "model_bytes": sum(path.stat().st_size for path in folders[name].glob("*.onnx*")),
                    **one.to_json(),
                    "minus": {
                        other: {"value": d.value, "error": d.error} for other, d in differences.items()
                    },
                }
            )
    return rows


def text_of(rows: Sequence[Mapping[str, Any]], against: Sequence[str]) -> str:
    lines = []
    for row in rows:
        minus = {other: Estimate(**found) for other, found in row["minus"].items()}
        lines.append(
            (
                row["folder"],
                row["engine"],
                f"{row['bytes'] / MB:.1f}",
                f"{row['model_bytes'] / MB:.1f}",
                shown(Estimate(row["mean"], row["standard_error"])),
                f"{row['p99']:.3f}",
                f"{row['same_best']:.2%}",
                *(shown(minus.get(other), sign=True) for other in against),
            )
        )
    header = ("folder", "by", "MB", "model MB", "mean KL, nats", "p99", "same best")
    return table([*header, *(f"minus {other}" for other in against)], lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="the original: a Hugging Face folder in float32")
    parser.add_argument("scratch", type=Path, help="folder for what is made; it is kept")
    parser.add_argument("--text", type=Path, required=True, help="WikiText-2's valid.txt, or any text")
    parser.add_argument(
        "--algorithms", nargs="*", choices=ALGORITHMS, default=["default", "k_quant", "k_quant_mixed"]
    )
    parser.add_argument("--ours", nargs="+", default=[], metavar="NAME=FOLDER", help="more ONNX folders")
    parser.add_argument("--no-rtn", action="store_true", help="without nybble's plain onnx-cpu-int4")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument(
        "--against", nargs="+", metavar="NAME", help="folders to subtract; default: the builder's"
    )
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument(
        "--genai-python",
        default=sys.executable,
        help="interpreter that has onnxruntime_genai, torch and transformers (default: this)",
    )
    add_common_arguments(parser)
    arguments = parser.parse_args()
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    folders = make(arguments)
    against = arguments.against or [name for name in folders if name.startswith("builder ")]
    if unknown := sorted(set(against) - set(folders)):
        parser.error(f"--against: no folder {', '.join(unknown)}; there are {', '.join(folders)}")
    rows = rows_of(folders, measured(arguments, folders), against)
    about = {**facts(), "source": str(arguments.source), "tokens": arguments.tokens}
    show(arguments, {**about, "window": arguments.window, "results": rows}, text_of(rows, against))


if __name__ == "__main__":
    main()
