"""nybble behind the pipe of ``harness.Worker``: times forwards, writes logits, tells its memory.

    python bench/nybble_worker.py MODEL --threads 2

Requests: ``{"do": "time", "tokens": [...], "depth": [...], "phase": "prefill" | "decode"}``,
``{"do": "logits", "tokens": [...], "phase": ..., "path": "x.npy"}``, ``{"do": "memory"}``. Nothing is
sampled and no best token is sought: the times are those of the forward pass and its logits.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from harness import process_memory

from nybble.devices.base import BatchItem
from nybble.devices.cpu import compile_session
from nybble.loading import read_checkpoint


class Engine:
    def __init__(self, model: Path, threads: int, precision: str, kv_cache: str | None) -> None:
        self.session = compile_session(
            read_checkpoint(model), threads=threads, precision=precision, kv_cache=kv_cache
        )
        self.kv_bytes = 0
        self._base: tuple[list[int], Any] | None = None

    def time(self, tokens: list[int], depth: list[int], phase: str) -> float:
        """Seconds of computing ``tokens`` after ``depth``, at once or one a call."""
        if self._base is None or self._base[0] != depth:
            if self._base is not None:
                self._base[1].close()
            base = self.session.new_sequence()
            if depth:
                self.session.forward([BatchItem(base, depth, "none")])
            self._base = (depth, base)
        sequence = self._base[1].fork()
        started = time.perf_counter()
        if phase == "prefill":
            self.session.forward([BatchItem(sequence, tokens, "last")])
        else:
            for token in tokens:
                self.session.forward([BatchItem(sequence, [token], "last")])
        elapsed = time.perf_counter() - started
        self._note_cache()
        sequence.close()
        return elapsed

    def logits(self, tokens: list[int], phase: str) -> np.ndarray:
        """Logits after each token, (len(tokens), vocab_size) float32."""
        sequence = self.session.new_sequence()
        if phase == "prefill":
            result = self.session.forward([BatchItem(sequence, tokens, "all")])
        else:
            rows = [self.session.forward([BatchItem(sequence, [token], "last")]) for token in tokens]
            result = np.concatenate(rows)
        self._note_cache()
        sequence.close()
        return result

    def _note_cache(self) -> None:
        self.kv_bytes = max(self.kv_bytes, self.session.native.cache_bytes_in_use)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", default="fast")
    parser.add_argument("--kv-cache")
    arguments = parser.parse_args()
    started = time.perf_counter()
    engine = Engine(arguments.model, arguments.threads, arguments.precision, arguments.kv_cache)
    print(json.dumps({"load_seconds": time.perf_counter() - started}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        if request["do"] == "time":
            answer["seconds"] = engine.time(request["tokens"], request["depth"], request["phase"])
        elif request["do"] == "logits":
            np.save(request["path"], engine.logits(request["tokens"], request["phase"]))
        elif request["do"] == "memory":
            answer = {**process_memory(), "kv_bytes": engine.kv_bytes}
        else:
            raise ValueError(f"unknown request {request['do']!r}")
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
