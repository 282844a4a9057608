"""Speed and memory of nybble and of onnxruntime-genai on the same ONNX folders.

    python bench/compare_genai.py FOLDER ... [--device onnxruntime|cpu] [--genai-python PATH]

nybble runs the folder as it is in ONNX Runtime, or with ``--device cpu`` on its own kernels.

Two processes hold the model and take turns, every repetition once each and in turn first, after a
warm-up that is not counted; before each turn they wait ``--pause`` seconds, in which the threads of the
one before stop spinning. A turn computes a random prompt in one call and then decodes greedily. Both
get the same number of threads; the ratio is above 1 where nybble is faster. "Equal tokens" is how many
of the greedy tokens agree before the first difference; engines, and versions of ONNX Runtime, round
differently, so that is information and no test.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path
from typing import Any

from harness import MB, Worker, add_common_arguments, cpu_seconds, facts, note, show, spread, table

ENGINES = ("nybble", "onnxruntime-genai")


def compare(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All measurements of one folder."""
    from nybble.formats.onnx.folder import open_onnx_folder

    vocab_size = open_onnx_folder(folder).config.vocab_size
    context = -(-(arguments.prefill + arguments.decode + 2) // 256) * 256
    options = ("--threads", arguments.threads, "--provider", arguments.provider, "--context", context)
    workers = {
        "nybble": Worker(
            sys.executable,
            "onnx_worker.py",
            "nybble-cpu" if arguments.device == "cpu" else "nybble",
            folder,
            *options,
        ),
        "onnxruntime-genai": Worker(arguments.genai_python, "onnx_worker.py", "genai", folder, *options),
    }
    draw = random.Random(0)
    seconds: dict[str, dict[str, list[float]]] = {
        phase: {name: [] for name in ENGINES} for phase in ("prefill", "decode")
    }
    idle, equal = 0.0, []
    for repetition in range(arguments.repetitions + 1):
        prompt = [draw.randrange(vocab_size) for _ in range(arguments.prefill)]
        tokens = {}
        for name in ENGINES if repetition % 2 else reversed(ENGINES):
            time.sleep(arguments.pause)
            other = next(worker for key, worker in workers.items() if key != name)
            before = cpu_seconds(other.pid)
            answer = workers[name].ask(do="time", prompt=prompt, decode=arguments.decode)
            tokens[name] = answer["tokens"]
            if repetition:
                used = cpu_seconds(other.pid) - before
                idle = max(idle, used / max(answer["prefill"] + answer["decode"], 0.1))
                for phase, times in seconds.items():
                    times[name].append(answer[phase])
        pairs = list(zip(tokens["nybble"], tokens["onnxruntime-genai"], strict=False))
        equal.append(next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs)))
        note(f"{folder.name}: repetition {repetition} of {arguments.repetitions}")
    memory = {name: worker.ask(do="memory") for name, worker in workers.items()}
    starts = {name: worker.start for name, worker in workers.items()}
    for worker in workers.values():
        worker.close()
    counts = {"prefill": arguments.prefill, "decode": arguments.decode}
    rates = {
        phase: {name: spread([counts[phase] / s for s in times]) for name, times in by_engine.items()}
        for phase, by_engine in seconds.items()
    }
    return {
        "folder": folder.name,
        "start": starts,
        "memory": memory,
        "idle_cpu_share": idle,
        "equal_tokens": equal,
        "tokens_per_second": rates,
        "seconds": seconds,
        "ratio": {
            phase: found["nybble"]["median"] / found[ENGINES[1]]["median"] for phase, found in rates.items()
        },
    }


def text_of(results: list[dict[str, Any]], arguments: argparse.Namespace) -> str:
    rows = []
    for result in results:
        for phase, found in result["tokens_per_second"].items():
            for name, rate in found.items():
                rows.append(
                    (
                        result["folder"],
                        f"{phase} {getattr(arguments, phase)}",
                        f"{name} {result['start'][name]['version']}",
                        f"{rate['median']:.1f}",
                        f"{rate['min']:.1f} .. {rate['max']:.1f}",
                        f"{result['ratio'][phase]:.3f}" if name == "nybble" else "",
                        f"{result['memory'][name]['VmHWM'] / MB:.0f}",
                        f"{min(result['equal_tokens'])}",
                    )
                )
    header = ("folder", "phase", "engine", "tokens/s", "min .. max", "ratio", "peak MB", "equal tokens")
    return table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare nybble with onnxruntime-genai.")
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--decode", type=int, default=64, help="tokens of the answer")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--pause", type=float, default=0.5, help="seconds before each turn")
    parser.add_argument("--device", choices=["onnxruntime", "cpu"], default="onnxruntime", help="nybble's")
    parser.add_argument("--provider", default="cpu")
    parser.add_argument(
        "--genai-python",
        default=sys.executable,
        help="interpreter that has onnxruntime_genai (default: this)",
    )
    add_common_arguments(parser)
    arguments = parser.parse_args()
    about = facts()
    results = [compare(arguments, folder) for folder in arguments.folders]
    head = (
        f"{about['processor']}, {arguments.threads} threads, load average before "
        f"{about['load_average']:.2f}, {arguments.repetitions} repetitions, idle CPU at most "
        f"{max(result['idle_cpu_share'] for result in results):.1%}"
    )
    show(
        arguments,
        {**about, "threads": arguments.threads, "results": results},
        head + "\n\n" + text_of(results, arguments),
    )


if __name__ == "__main__":
    main()
