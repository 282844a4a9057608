"""Speed and memory of nybble and llama.cpp on the same files, in one run.

    python bench/compare_llama.py --llama-python PATH MODEL.gguf ... [--prefill 512] [--decode 64]

Prefill computes a prompt in one call and gets the last row of logits; decode computes one token a call
after ``--depth`` tokens (0 as in llama-bench). Neither samples. Three processes hold the model: nybble,
llama.cpp with flash attention and llama.cpp without; they take turns, every repetition once each, after
a warm-up that is not counted, and wait ``--pause`` seconds before each turn, in which the threads of
the one before stop spinning (OpenMP's may spin for 0.2 s). "Idle CPU" is the most CPU time that the
waiting processes used during somebody's turn, as a share of it: it must be near 0.

llama.cpp's figure is the better of its two. Ratios are nybble's median rate to its, so above 1 nybble
is faster. Memory is VmHWM - file size - KV cache of each process, interpreter and libraries included.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path
from typing import Any

from harness import MB, Worker, add_common_arguments, cpu_seconds, facts, note, show, spread, table

NYBBLE = "nybble"
LLAMA = ("llama.cpp, flash attention", "llama.cpp")


def start_engines(arguments: argparse.Namespace, model: Path) -> dict[str, Worker]:
    context = arguments.depth + max(arguments.prefill, arguments.decode)
    context = -(-context // 256) * 256  # llama.cpp's own rounding
    engines = {NYBBLE: Worker(sys.executable, "nybble_worker.py", model, "--threads", arguments.threads)}
    for name, flash in zip(LLAMA, ("on", "off"), strict=True):
        engines[name] = Worker(
            arguments.llama_python, "llama_worker.py", model, "--threads", arguments.threads,
            "--context", context, "--flash-attention", flash,
        )  # fmt: skip
    return engines


def compare(arguments: argparse.Namespace, model: Path) -> dict[str, Any]:
    """All measurements of one file."""
    from nybble.loading import read_checkpoint

    vocab_size = read_checkpoint(model).config.vocab_size
    draw = random.Random(0)
    engines = start_engines(arguments, model)
    phases = {p: n for p, n in (("prefill", arguments.prefill), ("decode", arguments.decode)) if n}
    seconds: dict[str, dict[str, list[float]]] = {p: {name: [] for name in engines} for p in phases}
    idle = 0.0
    depth = [draw.randrange(vocab_size) for _ in range(arguments.depth)]
    for repetition in range(arguments.repetitions + 1):
        for phase, count in phases.items():
            tokens = [draw.randrange(vocab_size) for _ in range(count)]
            for name, engine in engines.items():
                time.sleep(arguments.pause)
                others = [other.pid for other in engines.values() if other is not engine]
                before = sum(map(cpu_seconds, others))
                taken = engine.ask(do="time", tokens=tokens, depth=depth, phase=phase)["seconds"]
                if repetition:
                    idle = max(idle, (sum(map(cpu_seconds, others)) - before) / max(taken, 0.1))
                    seconds[phase][name].append(taken)
        note(f"{model.name}: repetition {repetition} of {arguments.repetitions}")
    memory = {name: engine.ask(do="memory") for name, engine in engines.items()}
    starts = {name: engine.start for name, engine in engines.items()}
    for engine in engines.values():
        engine.close()
    size = model.stat().st_size
    result: dict[str, Any] = {
        "model": model.name,
        "file_bytes": size,
        "idle_cpu_share": idle,
        "start": starts,
        "memory": {
            name: {**found, "beyond_bytes": found["VmHWM"] - size - found["kv_bytes"]}
            for name, found in memory.items()
        },
        "phases": {},
    }
    for phase, count in phases.items():
        rates = {name: spread([count / s for s in times]) for name, times in seconds[phase].items()}
        best = max(LLAMA, key=lambda name: rates[name]["median"])
        result["phases"][phase] = {
            "tokens": count,
            "depth": arguments.depth,
            "tokens_per_second": rates,
            "seconds": seconds[phase],
            "best_llama": best,
            "ratio": rates[NYBBLE]["median"] / rates[best]["median"],
        }
    return result


def text_of(results: list[dict[str, Any]]) -> str:
    speed, memory = [], []
    for result in results:
        for phase, found in result["phases"].items():
            for name, rate in found["tokens_per_second"].items():
                ratio = f"{found['ratio']:.2f}" if name == found["best_llama"] else ""
                speed.append(
                    (result["model"], f"{phase} {found['tokens']} at {found['depth']}", name,
                     f"{rate['median']:.1f}", f"{rate['min']:.1f} .. {rate['max']:.1f}", ratio)
                )  # fmt: skip
        for name, found in result["memory"].items():
            memory.append(
                (
                    result["model"],
                    name,
                    *(f"{found[k] / MB:.1f}" for k in ("VmHWM", "kv_bytes", "beyond_bytes")),
                )
            )
    return "\n\n".join(
        (
            table(("model", "phase", "engine", "tokens/s", "min .. max", "nybble / best llama.cpp"), speed),
            table(("model", "engine", "peak MB", "KV cache MB", "beyond file and KV cache MB"), memory),
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare nybble with llama.cpp: speed and memory.")
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--prefill", type=int, default=512, help="tokens; 0: none")
    parser.add_argument("--decode", type=int, default=64, help="tokens; 0: none")
    parser.add_argument("--depth", type=int, default=0, help="tokens in the cache before")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--pause", type=float, default=0.5, help="seconds before each turn")
    add_common_arguments(parser, llama=True)
    arguments = parser.parse_args()
    about = facts()
    results = [compare(arguments, model) for model in arguments.models]
    system = results[0]["start"][LLAMA[0]]
    head = (
        f"{about['processor']}, {arguments.threads} threads, "
        f"load average before {about['load_average']:.2f}, "
        f"{arguments.repetitions} repetitions, idle CPU at most "
        f"{max(r['idle_cpu_share'] for r in results):.1%}\n"
        f"llama-cpp-python {system['version']}: {system['system'].strip()}"
    )
    show(
        arguments,
        {**about, "threads": arguments.threads, "results": results},
        head + "\n\n" + text_of(results),
    )


if __name__ == "__main__":
    main()
