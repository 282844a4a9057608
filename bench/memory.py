"""Peak resident memory of ``nybble run`` beyond the model's file and its KV cache (Linux).

    python bench/memory.py MODEL.gguf ... [--prompt 512] [--answer 64]

Each model answers in a process of its own, ``nybble run --raw --ignore-eos``, which is looked at every
few milliseconds from outside. Definition: beyond = VmHWM - size of the file - KV cache, in decimal
megabytes. VmHWM counts pages of the mapped file that were touched, so "beyond" is too small by what
was never touched of it; RssAnon (memory of the process itself) and RssFile (mapped files: the model
and the libraries) at the peak are shown beside it. "own" does not depend on what was touched:
RssAnon - KV cache + the libraries' mapped files. The KV cache is what the prompt and the answer fill,
in pages of 64 tokens, f16. "Python and libraries" is a process that has imported all that the command
needs and loaded nothing: that part is in "beyond" too.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from harness import MB, add_common_arguments, facts, process_memory, show, table

WORDS = "The quick brown fox jumps over the lazy dog, and nobody ever asked why it did so. "
PAGE = 64
IMPORTS = "nybble.cli.main nybble.cli.run nybble.loading nybble.model nybble.hub.resolve nybble.hub.progress "
IMPORTS += "nybble.formats.gguf.checkpoint nybble.text.gguf_tokenizer nybble.text.sandbox tokenizers "
IMPORTS += "tokenizers.models nybble.devices.cpu.lower nybble.devices.cpu.session nybble.generate.generation"


def watch(command: list[str]) -> dict[str, int]:
    """Peak memory of a process, and anonymous and file memory when most was resident."""
    peak: dict[str, int] = {"VmHWM": 0}
    top = 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            try:
                now = process_memory(process.pid)
            except (FileNotFoundError, ProcessLookupError):
                break
            if "VmRSS" in now:  # a process that has ended but was not waited for has none
                peak["VmHWM"] = max(peak["VmHWM"], now["VmHWM"])
                if now["VmRSS"] >= top:
                    top = now["VmRSS"]
                    peak.update(RssAnon=now["RssAnon"], RssFile=now["RssFile"])
            time.sleep(0.003)
        if process.wait() != 0:
            raise SystemExit(f"exit code {process.returncode}: {' '.join(command)[:200]}")
    return peak


def prompt_of(checkpoint: Any, count: int) -> str:
    """A text of exactly ``count`` tokens, begin token included."""
    tokenizer = checkpoint.tokenizer.build()
    text = ""
    for word in WORDS.split(" ") * count:
        longer = f"{text} {word}" if text else word
        if len(tokenizer.encode(longer)) > count:
            break
        text = longer
    while len(tokenizer.encode(text)) < count:
        text += "!" if text[-1] != "!" else "?"
    if len(tokenizer.encode(text)) != count:
        raise SystemExit(f"no text of {count} tokens was found")
    return text


def kv_bytes(config: Any, tokens: int) -> int:
    """Keys and values of ``tokens`` in f16, whole pages."""
    pages = -(-tokens // PAGE)
    return int(pages * PAGE * config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 2)


def measure(arguments: argparse.Namespace, model: Path) -> dict[str, Any]:
    from nybble.loading import read_checkpoint

    checkpoint = read_checkpoint(model)
    prompt = prompt_of(checkpoint, arguments.prompt)
    command = [sys.executable, "-m", "nybble", "run", "--raw", "--ignore-eos", "--temperature", "0"]
    command += [
        "--max-tokens",
        str(arguments.answer),
        "--threads",
        str(arguments.threads),
        str(model),
        prompt,
    ]
    peaks = [watch(command) for _ in range(arguments.repetitions)]
    peak = max(peaks, key=lambda found: found["VmHWM"])
    size = model.stat().st_size
    # The last token is never fed back.
    cache = kv_bytes(checkpoint.config, arguments.prompt + arguments.answer - 1)
    return {
        "model": model.name,
        **peak,
        "file_bytes": size,
        "kv_bytes": cache,
        "beyond_bytes": peak["VmHWM"] - size - cache,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory beyond the file and the KV cache.")
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--answer", type=int, default=64, help="tokens")
    parser.add_argument("--repetitions", type=int, default=3, help="the largest peak counts")
    add_common_arguments(parser)
    arguments = parser.parse_args()
    imports = f"import {', '.join(IMPORTS.split())}; import time; time.sleep(0.05)"
    libraries = watch([sys.executable, "-c", imports])
    results = [measure(arguments, model) for model in arguments.models]
    for result in results:
        result["own_bytes"] = result["RssAnon"] - result["kv_bytes"] + libraries["RssFile"]
    rows = [
        (result["model"], *(f"{result[key] / MB:.1f}" for key in
         ("VmHWM", "RssAnon", "RssFile", "file_bytes", "kv_bytes", "beyond_bytes", "own_bytes")))
        for result in results
    ]  # fmt: skip
    text = table(("model", "peak MB", "anonymous", "mapped", "file", "KV cache", "beyond", "own"), rows)
    text += f"\n\nPython and libraries alone: {libraries['VmHWM'] / MB:.1f} MB"
    show(arguments, {**facts(), "libraries_bytes": libraries["VmHWM"], "results": results}, text)


if __name__ == "__main__":
    main()
