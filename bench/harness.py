"""What the scripts in this folder share: worker processes, memory of a process, tables, facts of a run.

Workers are long-lived processes of any Python interpreter that read one JSON request a line and write
one JSON answer a line; between requests they only wait. See ``nybble_worker.py``, ``llama_worker.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MB = 1e6  # megabytes are decimal everywhere in this folder


class Worker:
    """A process that answers requests; ``start`` is its first message: what it is."""

    def __init__(self, python: str, script: str, *arguments: object) -> None:
        # What a peer loads must not be found through this process's search path.
        environment = {**os.environ}
        if python != sys.executable:
            environment.pop("PYTHONPATH", None)
        self._process = subprocess.Popen(
            [python, str(HERE / script), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.start = self._read()

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to one request."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended early, exit code {self._process.wait()}: {self._process.args}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def process_memory(pid: int | str = "self") -> dict[str, int]:
    """Bytes of ``VmHWM`` (peak), ``VmRSS``, ``RssAnon`` and ``RssFile`` of a process (Linux).

    Not ru_maxrss: that one starts with the size of the process that started this one.
    """
    found = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in ("VmHWM", "VmRSS", "RssAnon", "RssFile"):
            found[name] = int(rest.split()[0]) * 1024
    return found


def cpu_seconds(pid: int) -> float:
    """User and system time that a process has used so far (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def facts() -> dict[str, Any]:
    """Where and when: processor, load of the machine, versions."""
    processor = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = (
            x.partition(":")[2].strip() for x in information.read_text().splitlines() if "model name" in x
        )
        processor = next(names, processor)
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def add_common_arguments(parser: argparse.ArgumentParser, *, llama: bool = False) -> None:
    """``--json`` and ``--threads``, and for comparisons ``--llama-python``."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--threads", type=int, default=2)
    if llama:
        parser.add_argument(
            "--llama-python",
            default=os.environ.get("LLAMA_PYTHON", sys.executable),
            metavar="PATH",
            help="interpreter that has llama_cpp (default: $LLAMA_PYTHON, else this one)",
        )


def show(arguments: argparse.Namespace, result: dict[str, Any], text: str) -> None:
    """Print the result as asked for."""
    print(json.dumps(result, indent=2) if arguments.json else text)


def note(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


def remove_converted(path: Path) -> None:
    """Delete what ``nybble.convert`` wrote: a folder, or a file with its manifest; nothing is fine too."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
        path.with_name(path.name + ".nybble.json").unlink(missing_ok=True)
