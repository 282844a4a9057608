"""Peak memory and time of conversions of Phi-3-mini-shaped models with random bf16 weights.

    python bench/convert_memory.py FOLDER --layers 8 32

Each conversion runs in a process of its own; the peak is the largest resident set that the kernel
saw, pages of mapped files included. FOLDER needs room for a model of each size (2.2 GB with 8 layers,
7.6 GB with 32) and its outputs; all of it is deleted again. ``--builder`` runs onnxruntime-genai's
model builder beside the ONNX conversion (needs torch and transformers; its peak with 32 layers is
above 16 GB). ``--llama-python`` lets llama.cpp quantize nybble's bf16 GGUF file to Q8_0 and measures
nybble doing the same (that interpreter needs llama-cpp-python).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from harness import remove_converted

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.config import ModelConfig, RopeConfig
from nybble.checkpoint.encodings import encoding
from nybble.checkpoint.tensor import Tensor
from nybble.text.tokenizer import TokenizerSource

HIDDEN, INTERMEDIATE, VOCABULARY, HEADS = 3072, 8192, 32064, 32
CONVERSIONS = {
    "GGUF Q8_0": ("x.gguf", {"to": "gguf", "encoding": "q8_0"}),
    "ONNX int4": ("onnx", {"to": "onnx-cpu-int4"}),
    "GGUF as it is": ("y.gguf", {"to": "gguf"}),
}
RUN = """
import json, resource, sys, time
import nybble
source, target, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
started = time.perf_counter()
report = nybble.convert(source, target, **options)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": time.perf_counter() - started, "peak": peak, "relation": report.relation,
                  "largest": max(tensor.nbytes for tensor in report.tensors), "nbytes": report.nbytes}))
"""


def make_folder(folder: Path, layers: int, tokenizer: TokenizerSource | None = None) -> None:
    """A Hugging Face folder of the shapes; one tensor at a time is in memory."""
    from nybble.formats.huggingface.writer import write_huggingface_folder

    config = ModelConfig(
        architecture="phi3",
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HIDDEN // HEADS,
        max_position_embeddings=4096,
        rope=RopeConfig(theta=10000.0, rotary_dim=HIDDEN // HEADS),
        rms_norm_eps=1e-5,
        sliding_window=2047,
        layer_types=("sliding_attention",) * layers,
    )
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}input_layernorm.weight": (HIDDEN,),
            f"{prefix}self_attn.qkv_proj.weight": (3 * HIDDEN, HIDDEN),
            f"{prefix}self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{prefix}post_attention_layernorm.weight": (HIDDEN,),
            f"{prefix}mlp.gate_up_proj.weight": (2 * INTERMEDIATE, HIDDEN),
            f"{prefix}mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
        }
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    random = np.random.default_rng(0)
    bf16 = encoding("bf16")
    assert bf16.quantize is not None
    pool = bf16.quantize((random.standard_normal(1 << 22) * 0.02).astype(np.float32)).view("<u2")
    ones = bf16.quantize(np.ones(HIDDEN, np.float32))

    def tensor(name: str, shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            return Tensor(name, shape, bf16, ones)
        shift = int(random.integers(pool.size))

        def data() -> np.ndarray:
            return np.resize(np.roll(pool, shift), shape).reshape(-1).view(np.uint8)

        return Tensor(name, shape, bf16, data)

    folder.mkdir(parents=True)
    tensors = {name: tensor(name, shape) for name, shape in shapes.items()}
    write_huggingface_folder(Checkpoint(config, tensors, tokenizer, name="random"), folder)


def measure(source: Path, target: Path, options: dict[str, object]) -> dict[str, float]:
    command = [sys.executable, "-c", RUN, str(source), str(target), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def add_tokenizer(folder: Path) -> None:
    """Any tokenizer: the builder does not go on without one."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    Tokenizer(WordLevel({"a": 0}, unk_token="a")).save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "a",
        "eos_token": "a",
        "pad_token": "a",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def builder(source: Path, target: Path) -> dict[str, float]:
    """The builder's time and peak memory; it gets a tokenizer, which stays in the folder."""
    add_tokenizer(source)
    code = (
        "import resource, subprocess, sys;"
        "subprocess.run([sys.executable, '-m', 'onnxruntime_genai.models.builder', '-i', sys.argv[1],"
        " '-o', sys.argv[2], '-p', 'int4', '-e', 'cpu'], check=True, stdout=subprocess.DEVNULL);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, source, target], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the builder failed: {done.stderr[-2000:]}")
    return {"seconds": time.perf_counter() - started, "peak": float(done.stdout.splitlines()[-1])}


LLAMA = """
import resource, sys, time
import llama_cpp
parameters = llama_cpp.llama_model_quantize_default_params()
parameters.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
parameters.nthread = int(sys.argv[3])
started = time.perf_counter()
failed = llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), parameters)
seconds = time.perf_counter() - started
print(failed, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def llama(python: str, source: Path, target: Path, threads: int) -> dict[str, float]:
    command = [python, "-c", LLAMA, str(source), str(target), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    failed, seconds, peak = done.stdout.splitlines()[-1].split()
    if failed != "0":
        raise SystemExit(f"llama.cpp could not quantize: {done.stderr[-2000:]}")
    return {"seconds": float(seconds), "peak": float(peak)}


def beside_llama(python: str, source: Path, folder: Path, threads: int) -> None:
    """Rows of both tools for the same file."""
    middle, target = folder / "bf16.gguf", folder / "q8_0.gguf"
    try:
        measure(source, middle, {"to": "gguf"})
        for name, run in (
            ("llama.cpp, GGUF bf16 to Q8_0", lambda: llama(python, middle, target, threads)),
            (
                "nybble, GGUF bf16 to Q8_0",
                lambda: measure(middle, target, {"to": "gguf", "encoding": "q8_0"}),
            ),
        ):
            try:
                found = run()
            finally:
                remove_converted(target)
            print(f"| | {name} | {found['peak'] / 1e6:.0f} MB | | | {found['seconds']:.0f} s |", flush=True)
    finally:
        remove_converted(middle)


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory and time of conversions.")
    parser.add_argument("folder", type=Path, help="scratch space; what is written there is deleted again")
    parser.add_argument("--layers", type=int, nargs="+", default=[8])
    parser.add_argument("--builder", action="store_true", help="onnxruntime-genai's builder too")
    parser.add_argument("--llama-python", help="interpreter with llama_cpp: compare with its quantizer")
    parser.add_argument("--threads", type=int, default=2, help="llama.cpp's")
    arguments = parser.parse_args()
    print("| layers | conversion | peak memory | of it largest tensor | output | time |")
    print("|---|---|---|---|---|---|")
    for layers in arguments.layers:
        source = arguments.folder / f"phi3-{layers}-layers"
        try:
            make_folder(source, layers)
            for name, (target, options) in CONVERSIONS.items():
                output = arguments.folder / target
                try:
                    found = measure(source, output, dict(options))
                finally:
                    remove_converted(output)
                print(
                    f"| {layers} | {name} | {found['peak'] / 1e6:.0f} MB | {found['largest'] / 1e6:.0f} MB"
                    f" | {found['nbytes'] / 1e9:.2f} GB | {found['seconds']:.0f} s |",
                    flush=True,
                )
            if arguments.llama_python:
                beside_llama(arguments.llama_python, source, arguments.folder, arguments.threads)
            if arguments.builder:
                try:
                    found = builder(source, arguments.folder / "builder")
                finally:
                    remove_converted(arguments.folder / "builder")
                print(
                    f"| {layers} | onnxruntime-genai's builder, int4 | {found['peak'] / 1e6:.0f} MB | | |"
                    f" {found['seconds']:.0f} s |",
                    flush=True,
                )
        finally:
            remove_converted(source)


if __name__ == "__main__":
    main()
