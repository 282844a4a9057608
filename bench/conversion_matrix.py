"""Every format to every format: what the relation is, and whether all engines still say the same.

    LLAMA_PYTHON=... python bench/conversion_matrix.py SCRATCH MODEL.gguf ...

Each GGUF file becomes a safetensors folder and an ONNX folder (float32), and each of the three all
three again. A row says what became of the tensors, by encodings, and compares greedy tokens with those
of the original file on nybble's float32 path: nybble on what was written, and the format's own engine:
llama.cpp for GGUF (in the environment of ``LLAMA_PYTHON``; its activations are int8, so what is written is
also compared with its answer for the original file), transformers for safetensors, onnxruntime-genai
for ONNX; each where it is installed. Where tokens differ, the first such one is given, and how far
nybble's two best logits are apart there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from harness import remove_converted

HERE = Path(__file__).resolve().parent
NAMES = {"gguf": "model.gguf", "safetensors": "folder", "onnx": "onnx"}

OURS = """
import json, sys
import nybble
model = nybble.load(sys.argv[1], precision="f32")
given = json.loads(sys.argv[2])
ids = model.tokenizer.encode(given) if isinstance(given, str) else given
count = int(sys.argv[3])
for _ in range(count):
    ids.append(int(model.logits(ids)[-1].argmax()))
print(json.dumps(ids))
"""
TRANSFORMERS = """
import json, sys
import torch, transformers
torch.set_num_threads(2)
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
ids = torch.tensor([json.loads(sys.argv[2])])
options = {"max_new_tokens": int(sys.argv[3]), "do_sample": False, "repetition_penalty": 1.0}
out = model.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=None, **options)
print(json.dumps(out[0].tolist()))
"""
GENAI = """
import json, sys
import onnxruntime_genai as og
model = og.Model(sys.argv[1])
ids = json.loads(sys.argv[2])
parameters = og.GeneratorParams(model)
length = len(ids) + int(sys.argv[3])
parameters.set_search_options(max_length=length, min_length=length, do_sample=False, repetition_penalty=1.0)
generator = og.Generator(model, parameters)
generator.append_tokens(ids)
while not generator.is_done():
    generator.generate_next_token()
print(json.dumps([int(i) for i in generator.get_sequence(0)]))
"""


def answer(python: str, code: str, path: Path, prompt: Sequence[int] | str, count: int) -> list[int]:
    given = prompt if isinstance(prompt, str) else list(prompt)
    command = [python, "-c", code, str(path), json.dumps(given), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "failed")
    found: list[int] = json.loads(done.stdout.splitlines()[-1])
    return found


def llama_cpp(path: Path, ids: Sequence[int], count: int) -> list[int]:
    script = HERE.parent / "tests" / "support" / "llama_cpp_logits.py"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [os.environ["LLAMA_PYTHON"], str(script), str(path), "256", str(count), ",".join(map(str, ids))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found = json.loads(done.stdout.splitlines()[-1])
    return [*ids, *found["tokens"]]


def peers(format_: str) -> tuple[str, Callable[[Path, Sequence[int], int], list[int]]]:
    if format_ == "gguf":
        return "llama.cpp", llama_cpp
    if format_ == "safetensors":
        return "transformers", lambda *given: answer(sys.executable, TRANSFORMERS, *given)
    return "onnxruntime-genai", lambda *given: answer(sys.executable, GENAI, *given)


def compared(got: Sequence[int], wanted: Sequence[int], gap: Callable[[int], float]) -> str:
    for place, (a, b) in enumerate(zip(got, wanted, strict=False)):
        if a != b:
            return f"token {place} differs (gap {gap(place):.3f})"
    return "equal"


def logit_gap(path: Path, ids: Sequence[int], place: int) -> float:
    import numpy as np

    import nybble

    best = np.sort(nybble.load(path, precision="f32").logits(list(ids[:place]))[-1])
    return float(best[-1] - best[-2])


def relations(report: Any) -> str:
    kinds: Counter[str] = Counter()
    for tensor in report.tensors:
        way = tensor.source if tensor.source == tensor.target else f"{tensor.source} → {tensor.target}"
        kinds[f"{tensor.relation} {way}"] += 1
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items(), key=lambda item: -item[1]))


def convert(source: Path, target: Path, to: str) -> Any:
    import nybble
    from nybble.errors import ConversionError

    try:
        return nybble.convert(source, target, to=to, overwrite=True)
    except ConversionError:
        return nybble.convert(source, target, to=to, overwrite=True, encoding="f32")


def llama_cpp_of_original(model: Path, ids: Sequence[int], count: int) -> list[int] | None:
    try:
        return llama_cpp(model, ids, count)
    except (KeyError, OSError, subprocess.CalledProcessError):
        return None


def matrix(model: Path, scratch: Path, count: int, prompt: str) -> None:
    wanted = answer(sys.executable, OURS, model, prompt, count)
    ids = wanted[: len(wanted) - count]
    original = llama_cpp_of_original(model, ids, count)
    sources = {"gguf": model}
    for to in ("safetensors", "onnx"):
        sources[to] = scratch / f"source-{NAMES[to]}"
        convert(model, sources[to], to)
    for source, path in sources.items():
        for to, name in NAMES.items():
            output = scratch / f"output-{name}"
            report = convert(path, output, to)
            ours = compared(
                answer(sys.executable, OURS, output, ids, count),
                wanted,
                lambda at: logit_gap(model, wanted, at),
            )
            peer, run = peers(to)
            try:
                found = run(output, ids, count)
                theirs = compared(found, wanted, lambda at: logit_gap(model, wanted, at))
                if to == "gguf" and theirs != "equal" and found == original:
                    theirs += "; as for the original file"
            except (RuntimeError, KeyError, OSError, subprocess.CalledProcessError) as error:
                theirs = f"not run: {error}"
            print(
                f"| {model.stem} | {source} → {to} | {report.relation} | {relations(report)} | {ours} |"
                f" {peer}: {theirs} |",
                flush=True,
            )
            remove_converted(output)
    for path in list(sources.values())[1:]:
        remove_converted(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Every format to every format.")
    parser.add_argument("scratch", type=Path, help="a folder for what is written; it is deleted again")
    parser.add_argument("models", type=Path, nargs="+", help="GGUF files")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prompt", default="The capital of France is")
    arguments = parser.parse_args()
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    print(f"| model | from → to | relation | tensors | nybble, {arguments.tokens} greedy tokens | peer |")
    print("|---|---|---|---|---|---|")
    for model in arguments.models:
        matrix(model, arguments.scratch, arguments.tokens, arguments.prompt)


if __name__ == "__main__":
    main()
