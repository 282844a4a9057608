"""llama.cpp behind the pipe of ``harness.Worker``; the requests are those of ``nybble_worker.py``.

    LLAMA_PYTHON bench/llama_worker.py MODEL --threads 2 --flash-attention on

Needs ``llama-cpp-python`` and NumPy, and not nybble. Calls ``llama_decode`` as llama-bench does, with
llama.cpp's defaults but for: batch and micro batch, threads, flash attention. KV cache: f16.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import sys
import time
from typing import Any

import llama_cpp
import numpy as np
from harness import process_memory

log: list[str] = []


@llama_cpp.llama_log_callback
def keep_log(level: int, text: bytes, user_data: object) -> None:
    log.append(text.decode("utf-8", "replace"))


class Engine:
    def __init__(self, model: str, threads: int, context: int, batch: int, flash_attention: bool) -> None:
        llama_cpp.llama_log_set(keep_log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            model.encode(), llama_cpp.llama_model_default_params()
        )
        if not self.model:
            raise SystemExit("".join(log))
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = context
        options.n_batch = options.n_ubatch = batch
        options.n_threads = options.n_threads_batch = threads
        options.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
            if flash_attention
            else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        if not self.context:
            raise SystemExit("".join(log))
        self.batch_size = batch
        self.batch = llama_cpp.llama_batch_init(batch, 0, 1)
        vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self._depth: list[int] | None = None

    @property
    def kv_bytes(self) -> int:
        """All KV buffers, as the log tells them."""
        sizes = re.findall(r"KV buffer size\s*=\s*([0-9.]+)\s*MiB", "".join(log))
        return round(sum(map(float, sizes)) * 2**20)

    def run(self, tokens: list[int], position: int, logits: str) -> None:
        """One ``llama_decode``: ``logits`` of the "last" token, of "all" or of "none"."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = position + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = logits == "all" or (logits == "last" and i == len(tokens) - 1)
        if llama_cpp.llama_decode(self.context, batch) != 0:
            raise SystemExit("llama_decode failed:\n" + "".join(log[-20:]))
        llama_cpp.llama_synchronize(self.context)

    def run_all(self, tokens: list[int], position: int, logits: str) -> None:
        for start in range(0, len(tokens), self.batch_size):
            part = tokens[start : start + self.batch_size]
            is_last = start + len(part) == len(tokens)
            self.run(part, position + start, logits if is_last else "none")

    def cut(self, length: int) -> None:
        memory = llama_cpp.llama_get_memory(self.context)
        if length == 0:
            llama_cpp.llama_memory_clear(memory, False)
        elif not llama_cpp.llama_memory_seq_rm(memory, 0, length, -1):
            raise SystemExit(f"llama.cpp cannot cut this model's cache to {length} tokens")

    def time(self, tokens: list[int], depth: list[int], phase: str) -> float:
        if self._depth != depth:
            self.cut(0)
            if depth:
                self.run_all(depth, 0, "none")
            self._depth = depth
        self.cut(len(depth))
        started = time.perf_counter()
        if phase == "prefill":
            self.run_all(tokens, len(depth), "last")
        else:
            for i, token in enumerate(tokens):
                self.run([token], len(depth) + i, "last")
        return time.perf_counter() - started

    def logits(self, tokens: list[int], phase: str) -> np.ndarray:
        """Logits after each token, (len(tokens), vocab_size) float32."""
        self.cut(0)
        self._depth = None
        result = np.empty((len(tokens), self.vocab_size), np.float32)
        step = self.batch_size if phase == "prefill" else 1
        for start in range(0, len(tokens), step):
            part = tokens[start : start + step]
            self.run(part, start, "all")
            for i in range(len(part)):
                row = llama_cpp.llama_get_logits_ith(self.context, i)
                result[start + i] = np.ctypeslib.as_array(row, (self.vocab_size,))
        return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--flash-attention", choices=("on", "off"), default="on")
    a = parser.parse_args()
    started = time.perf_counter()
    engine = Engine(a.model, a.threads, a.context, a.batch, a.flash_attention == "on")
    start = {
        "load_seconds": time.perf_counter() - started,
        "version": llama_cpp.__version__,
        "system": llama_cpp.llama_print_system_info().decode(),
        "kv_bytes": engine.kv_bytes,
    }
    print(json.dumps(start), flush=True)
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
