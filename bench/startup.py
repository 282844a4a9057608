"""Process start to first token of ``nybble run MODEL "Hi" --max-tokens 1``, and where the time goes.

    python bench/startup.py [MODEL] [--repetitions 9] [--command nybble]

"to first text" is from just before the process starts until the first byte of the answer arrives here;
"to exit" until the process is gone. Run once before, uncounted, so that the file is in the system's
cache. The breakdown comes from other runs with ``traced_run.py``, which imports everything first and
then runs the command: medians of each part; they do not add up exactly, since parts contain others.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import HERE, MB, add_common_arguments, facts, show, spread, table


def time_once(command: list[str]) -> tuple[float, float]:
    """Seconds to the first byte on standard output, and to the end."""
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        to_first = time.perf_counter() - started
        process.stdout.read()
        code = process.wait()
    if code != 0 or not first:
        raise SystemExit(f"exit code {code}: {' '.join(command)}")
    return to_first, time.perf_counter() - started


def trace_once(arguments: list[str], folder: Path) -> list[dict[str, Any]]:
    output = folder / "marks.json"
    command = [sys.executable, str(HERE / "traced_run.py"), str(output), repr(time.time()), *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    marks: list[dict[str, Any]] = json.loads(output.read_text())
    return marks


def main() -> None:
    parser = argparse.ArgumentParser(description="Process start to first token.")
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--command", help="the nybble command (default: this interpreter's -m nybble)")
    add_common_arguments(parser)
    arguments = parser.parse_args()
    command = [arguments.command] if arguments.command else [sys.executable, "-m", "nybble"]
    line = ["run", arguments.model, "Hi", "--max-tokens", "1", "--threads", str(arguments.threads)]
    os.environ["PYTHONUNBUFFERED"] = "1"
    time_once([*command, *line])
    times = [time_once([*command, *line]) for _ in range(arguments.repetitions)]
    parts: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(arguments.repetitions):
            for mark in trace_once(line, Path(folder)):
                parts.setdefault(mark["part"], []).append(mark)
    breakdown = [
        {
            "part": name,
            **{
                key: statistics.median(mark[key] for mark in marks)
                for key in ("began", "seconds", "resident")
            },
        }
        for name, marks in parts.items()
    ]
    breakdown.sort(key=lambda part: part["began"])
    to_first, to_exit = (spread(values) for values in zip(*times, strict=True))
    result = {
        **facts(),
        "command": line,
        "to_first_text": to_first,
        "to_exit": to_exit,
        "breakdown": breakdown,
    }
    text = table(
        ("", "median, s", "min .. max"),
        [
            (name, f"{found['median']:.3f}", f"{found['min']:.3f} .. {found['max']:.3f}")
            for name, found in (("to first text", to_first), ("to exit", to_exit))
        ],
    )
    text += "\n\n" + table(
        ("part", "began, ms", "took, ms", "resident after, MB"),
        [
            (p["part"], f"{p['began'] * 1e3:.0f}", f"{p['seconds'] * 1e3:.1f}", f"{p['resident'] / MB:.0f}")
            for p in breakdown
        ],
    )
    show(arguments, result, text)


if __name__ == "__main__":
    main()
