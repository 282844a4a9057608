"""Runs one ``nybble`` command line in this process and notes when its parts begin and end.

    python bench/traced_run.py OUTPUT.json PARENTS_CLOCK run smollm2 Hi --max-tokens 1

Used by ``startup.py``. PARENTS_CLOCK is ``time.time()`` before the process was started. Parts may lie
inside others (importing NumPy inside importing the reader); memory is what is resident at their end.
"""

from __future__ import annotations

import time

_STARTED = time.time()  # before the other imports

import functools  # noqa: E402
import importlib  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

PARTS = (
    ("nybble.hub.resolve", "resolve", "find the file"),
    ("nybble.formats.gguf.checkpoint", "read_gguf_checkpoint", "read the GGUF header"),
    ("nybble.text.gguf_tokenizer", "build_gguf_tokenizer", "build the tokenizer"),
    ("nybble.devices.cpu", "compile_session", "compile the plan"),
    ("nybble.text.chat", "ChatTemplate.render", "render the chat template"),
    ("nybble.devices.cpu.session", "CpuSession.forward", "forward"),
)
IMPORTS = ("numpy", "numpy.random", "tokenizers", "jinja2", "nybble.model", "nybble.cli.main")


def resident() -> int:
    """Bytes resident now; 0 where the system does not tell."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * 4096 if path.exists() else 0


def main() -> int:
    output, parents_clock = Path(sys.argv[1]), float(sys.argv[2])
    marks: list[dict[str, Any]] = []

    def traced(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **options: Any) -> Any:
            began = time.time()
            try:
                return function(*args, **options)
            finally:
                ended = time.time()
                marks.append(
                    {
                        "part": name,
                        "began": began - parents_clock,
                        "seconds": ended - began,
                        "resident": resident(),
                    }
                )

        return run

    for name in IMPORTS:  # in the order in which the command would import them
        traced(importlib.import_module, f"import {name}")(name)
    for module_name, path, name in PARTS:
        owner: Any = importlib.import_module(module_name)
        *outer, attribute = path.split(".")
        for part in outer:
            owner = getattr(owner, part)
        original = getattr(owner, attribute)
        setattr(owner, attribute, traced(original, name))
        if not outer and getattr(sys.modules.get("nybble.hub"), attribute, None) is original:
            setattr(sys.modules["nybble.hub"], attribute, getattr(owner, attribute))
    import nybble.cli.main

    code = traced(nybble.cli.main.main, "the command")(sys.argv[3:])
    marks.append({"part": "start Python", "began": 0.0, "seconds": _STARTED - parents_clock, "resident": 0})
    output.write_text(json.dumps(marks))
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
