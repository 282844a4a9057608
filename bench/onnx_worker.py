"""An ONNX folder behind the pipe of ``harness.Worker``: nybble's device onnxruntime, nybble's own CPU
kernels, or onnxruntime-genai.

    python bench/onnx_worker.py nybble|nybble-cpu|genai FOLDER --threads 2

Requests: ``{"do": "time", "prompt": [...], "decode": N}`` answers with seconds of both phases and the
greedy tokens; ``{"do": "logits", "tokens": [...], "path": "x.npy"}`` (nybble only) writes the logits
after each token; ``{"do": "memory"}``. Both engines compute the prompt in one call, then decode greedily;
onnxruntime-genai's loop finds the best token in C++, nybble's here in NumPy.
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


class Nybble:
    def __init__(self, folder: str, threads: int, provider: str, context: int) -> None:
        import onnxruntime

        from nybble.devices.onnxruntime import compile_session
        from nybble.formats.onnx.folder import open_onnx_folder

        self.version = onnxruntime.__version__
        self.session: Any = compile_session(
            open_onnx_folder(folder), provider=provider, threads=threads, context_length=context
        )

    def logits(self, tokens: list[int]) -> np.ndarray:
        """Logits after each token, (len(tokens), vocab_size) float32."""
        from nybble.devices.base import BatchItem

        sequence = self.session.new_sequence()
        result = self.session.forward([BatchItem(sequence, tokens, "all")])
        sequence.close()
        return np.asarray(result)

    def time(self, prompt: list[int], count: int) -> dict[str, Any]:
        from nybble.devices.base import BatchItem

        sequence = self.session.new_sequence()
        started = time.perf_counter()
        logits = self.session.forward([BatchItem(sequence, prompt, "last")])
        tokens = [int(np.argmax(logits[-1]))]
        prefill = time.perf_counter() - started
        started = time.perf_counter()
        for _ in range(count):
            logits = self.session.forward([BatchItem(sequence, tokens[-1:], "last")])
            tokens.append(int(np.argmax(logits[-1])))
        decode = time.perf_counter() - started
        sequence.close()
        return {"prefill": prefill, "decode": decode, "tokens": tokens}


class NybbleCpu(Nybble):
    def __init__(self, folder: str, threads: int, provider: str, context: int) -> None:
        from nybble import __version__
        from nybble.devices.cpu import compile_session
        from nybble.loading import read_checkpoint

        self.version = __version__
        self.session = compile_session(read_checkpoint(Path(folder)), threads=threads, context_length=context)


class Genai:
    def __init__(self, folder: str, threads: int, provider: str, context: int) -> None:
        import onnxruntime_genai as genai

        self.genai = genai
        self.version = genai.__version__
        self.context = context
        config = genai.Config(folder)
        config.clear_providers()
        if provider != "cpu":
            config.append_provider(provider)
        options = {"intra_op_num_threads": threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self.model = genai.Model(config)

    def time(self, prompt: list[int], count: int) -> dict[str, Any]:
        parameters = self.genai.GeneratorParams(self.model)
        # Nothing may end the answer early.
        parameters.set_search_options(do_sample=False, max_length=self.context, min_length=self.context)
        generator = self.genai.Generator(self.model, parameters)
        started = time.perf_counter()
        generator.append_tokens(np.array(prompt, np.int32))
        generator.generate_next_token()
        prefill = time.perf_counter() - started
        started = time.perf_counter()
        for _ in range(count):
            generator.generate_next_token()
        decode = time.perf_counter() - started
        tokens = [int(token) for token in generator.get_sequence(0)][len(prompt) :]
        return {"prefill": prefill, "decode": decode, "tokens": tokens}


ENGINES: dict[str, Any] = {"nybble": Nybble, "nybble-cpu": NybbleCpu, "genai": Genai}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("engine", choices=sorted(ENGINES))
    parser.add_argument("folder")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--provider", default="cpu")
    parser.add_argument("--context", type=int, default=2048)
    arguments = parser.parse_args()
    started = time.perf_counter()
    engine = ENGINES[arguments.engine](
        arguments.folder, arguments.threads, arguments.provider, arguments.context
    )
    about = {"load_seconds": time.perf_counter() - started, "version": engine.version}
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "time":
            answer = engine.time(request["prompt"], request["decode"])
        elif request["do"] == "logits":
            np.save(request["path"], engine.logits(request["tokens"]))
            answer = {}
        else:
            answer = process_memory()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
