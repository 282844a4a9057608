"""A language model trained here in full precision: weights that lie on no grid, to judge quantization on.

    python bench/train_model.py smollm2 --text wikitext-2/valid.txt --output FOLDER
    python bench/train_model.py --from-scratch --text tinyshakespeare/input.txt --output FOLDER --steps 3000

Small models that can be had as files are quantized already. Dequantized, their weights lie on the grid that
they were rounded to, and rounding them to it again costs nothing: that says nothing about a quantizer. So
matrices that lie on a Q4_1 grid are first moved off it: each weight to somewhere in its cell, at random,
evenly (``--dither 0``: not), which costs the model about what rounding it once more would. Then AdamW trains
all weights in float32, and makes good for that.

The second half of the text is trained on, in windows side by side, shuffled anew in each epoch; the first
half is held out (``quantize_methods.py`` measures there). ``--from-scratch`` trains a small Llama with a
byte-pair vocabulary of its own, made from the same half. The output is a Hugging Face folder in float32.

Printed: perplexity on the first ``--held-out-tokens`` of the held-out half, in windows of 512 tokens of
which the second halves count (as ``nybble evaluate`` does): of the model as it came, dithered, and trained.
And, of the layers' matrices: the RMS distance of the weights from where they were in steps of a Q4_1 grid (a
15th of a block's range), that by training alone, and the relative error ||w - q|| / ||w|| that rounding to
Q4_1 makes, before and after, beside that of normally distributed numbers.

The same seed, threads, machine and version of torch give the same weights.
"""

from __future__ import annotations

import argparse
import math
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
import torch
import transformers
from harness import add_common_arguments, facts, note, show, table

import nybble
from nybble.checkpoint.encodings import encoding
from nybble.evaluate.windows import Windows
from nybble.formats.output import staged_folder
from nybble.quantize.blocks import quantize_blocks

Floats = npt.NDArray[np.float32]
GRID, BLOCK, STEPS = "q4_1", 32, 15
END = "<|endoftext|>"
KEPT = ("special_tokens_map.json", "chat_template.jinja")


# -- the model and its text ---------------------------------------------------------------------------------


def existing_model(name: str, folder: Path) -> torch.nn.Module:
    """Any model that nybble reads, as float32 in transformers; ``folder`` gets its files."""
    nybble.convert(name, folder, to="safetensors", encoding="f32")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def new_model(arguments: argparse.Namespace, text: str, folder: Path) -> torch.nn.Module:
    """A Llama with random weights and a tokenizer made from the text; ``folder`` gets the tokenizer."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=arguments.vocabulary,
        special_tokens=[END],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    end = tokenizer.token_to_id(END)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END)
    fast.save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.hidden_size * 8 // 3 // 64 * 64,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden_size // 64,
        num_key_value_heads=max(1, arguments.hidden_size // 128),
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
    )
    return transformers.LlamaForCausalLM(config).float()


def tokens_of(folder: Path, text: str) -> npt.NDArray[np.int32]:
    """All of a text; names of special tokens in it have no meaning."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    return np.array(ids, np.int32)


def batches(tokens: npt.NDArray[np.int32], window: int, batch: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless (batch, window) ids, int64; the windows of each epoch begin somewhere else."""
    random = np.random.default_rng(seed)
    if len(tokens) < (batch + 1) * window:
        raise SystemExit(f"the half to train on has {len(tokens)} tokens, fewer than {batch + 1} windows")
    while True:
        count = len(tokens) // window - 1
        first = int(random.integers(window))
        starts = first + window * random.permutation(count)
        for at in range(0, count - batch + 1, batch):
            rows = [tokens[start : start + window] for start in starts[at : at + batch]]
            yield torch.from_numpy(np.stack(rows).astype(np.int64))


# -- training -----------------------------------------------------------------------------------------------


def learning_rate(step: int, arguments: argparse.Namespace) -> float:
    """Linear from 0 in the first 5 %, then half a cosine down to 0."""
    warm_up = max(1, arguments.steps // 20)
    if step < warm_up:
        return float(arguments.learning_rate * (step + 1) / warm_up)
    return float(arguments.learning_rate * 0.5 * (1 + math.cos(math.pi * step / arguments.steps)))


def train(model: torch.nn.Module, tokens: npt.NDArray[np.int32], arguments: argparse.Namespace) -> None:
    # No weight decay: with it weights that no gradient reaches would move too, all in one direction.
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    model.train()
    source = batches(tokens, arguments.window, arguments.batch, arguments.seed)
    started, losses = time.perf_counter(), []
    for step in range(arguments.steps):
        ids = next(source)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, arguments)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # memory that is there already costs less
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise SystemExit(f"the loss is not finite in step {step}: take a lower --learning-rate")
        if (step + 1) % max(1, arguments.steps // 20) == 0:
            seconds = (time.perf_counter() - started) / (step + 1)
            recent = float(np.mean(losses[-max(1, arguments.steps // 20) :]))
            note(f"step {step + 1} of {arguments.steps}: loss {recent:.3f}, {seconds:.2f} s a step")
    model.eval()


@torch.no_grad()
def dither(model: torch.nn.Module, fraction: float, arguments: argparse.Namespace) -> None:
    """Moves weights that lie on a grid evenly by up to half of ``fraction`` of its step."""
    random = np.random.default_rng(arguments.seed)
    parameters = dict(model.named_parameters())
    for name, weight in matrices(model).items():
        error, norm = rounding_error(weight, arguments.threads)
        if error > 1e-6 * norm:
            continue  # on no such grid
        noise = random.uniform(-0.5, 0.5, (weight.size // BLOCK, BLOCK)).astype(np.float32)
        noise *= np.float32(fraction) * steps_of(weight)
        parameters[name] += torch.from_numpy(noise.reshape(weight.shape))


# -- measuring ----------------------------------------------------------------------------------------------


@torch.no_grad()
def perplexity(model: torch.nn.Module, tokens: npt.NDArray[np.int32]) -> float:
    """Of the second halves of windows of 512 tokens."""
    model.eval()
    losses = []
    for window in Windows(tokens):
        logits = model(input_ids=torch.tensor([window.tokens]), use_cache=False).logits[0]
        rows = logits[window.first_target - 1 : -1]
        losses.append(float(torch.nn.functional.cross_entropy(rows, torch.tensor(window.targets))))
    return math.exp(float(np.mean(losses)))


def matrices(model: torch.nn.Module) -> dict[str, Floats]:
    """A copy of each matrix of the layers whose rows are whole blocks."""
    return {
        name: value.detach().numpy().copy()
        for name, value in model.named_parameters()
        if ".layers." in name and value.ndim == 2 and value.shape[1] % BLOCK == 0
    }


def steps_of(weight: Floats) -> Floats:
    """The step of a Q4_1 grid for each block of a matrix, float32 (blocks, 1)."""
    blocks = weight.reshape(-1, BLOCK)
    return (blocks.max(axis=1, keepdims=True) - blocks.min(axis=1, keepdims=True)) / np.float32(STEPS)


def rounding_error(weight: Floats, threads: int) -> tuple[float, float]:
    """Squared error of rounding to the grid, and squared norm."""
    data = quantize_blocks(weight, GRID, threads=threads)
    error = encoding(GRID).dequantize(data).reshape(weight.shape) - weight
    return float(np.vdot(error, error)), float(np.vdot(weight, weight))


def distance(old: Mapping[str, Floats], new: Mapping[str, Floats], grid: Mapping[str, Floats]) -> float:
    """RMS of the change, in steps of the grid of ``grid``."""
    squares = count = 0.0
    for name, weight in old.items():
        step = steps_of(grid[name])
        used = step[:, 0] > 0
        change = (new[name] - weight).reshape(-1, BLOCK)[used] / step[used]
        squares += float(np.vdot(change, change))
        count += change.size
    return math.sqrt(squares / count)


def relative_error(weights: Mapping[str, Floats], threads: int) -> float:
    """Of rounding all of them to the grid."""
    error, norm = np.sum([rounding_error(weight, threads) for weight in weights.values()], axis=0)
    return math.sqrt(error / norm)


# -- the program --------------------------------------------------------------------------------------------


def save(model: Any, files: Path, output: Path, *, overwrite: bool) -> None:
    """The model in float32, with what else is in ``files`` (tokenizer, template)."""
    with staged_folder(output, overwrite=overwrite) as stage:
        for path in sorted(files.iterdir()):
            if "tokenizer" in path.name or path.name in KEPT:
                shutil.copyfile(path, stage / path.name)
        model.save_pretrained(stage)


def run(arguments: argparse.Namespace, files: Path) -> dict[str, Any]:
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    text = arguments.text.read_text(encoding="utf-8")
    middle = text.index("\n", len(text) // 2) + 1
    if arguments.from_scratch:
        model = new_model(arguments, text[middle:], files)
    else:
        model = existing_model(arguments.model, files)
    held_out = tokens_of(files, text[:middle])[: arguments.held_out_tokens]
    training = tokens_of(files, text[middle:])
    result: dict[str, Any] = {
        "parameters": sum(value.numel() for value in model.parameters()),
        "tokens": arguments.steps * arguments.batch * arguments.window,
        "epochs": arguments.steps * arguments.batch * arguments.window / len(training),
    }
    original = matrices(model)
    result["perplexity_original"] = perplexity(model, held_out)
    if arguments.dither:
        dither(model, arguments.dither, arguments)
    dithered = matrices(model)
    result["perplexity_dithered"] = perplexity(model, held_out)
    note(f"{result}")
    started = time.perf_counter()
    train(model, training, arguments)
    result["seconds"] = time.perf_counter() - started
    result["perplexity_trained"] = perplexity(model, held_out)
    trained = matrices(model)
    random = np.random.default_rng(arguments.seed)
    normal = {"": random.normal(size=(1024, 1024)).astype(np.float32)}
    result["distance"] = distance(original, trained, original)
    result["distance_by_training"] = distance(dithered, trained, original)
    for name, weights in (("original", original), ("trained", trained), ("normal", normal)):
        result[f"error_{name}"] = relative_error(weights, arguments.threads)
    save(model, files, arguments.output, overwrite=arguments.overwrite)
    return result


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train a small language model in float32.")
    parser.add_argument("model", nargs="?", help="what to fine-tune: a known name, GGUF file or folder")
    parser.add_argument("--from-scratch", action="store_true", help="a new small Llama instead")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--learning-rate", type=float, help="largest (default: 2e-4; from scratch 2e-3)")
    parser.add_argument("--dither", type=float, default=1.0, help="steps of the grid (default: 1)")
    parser.add_argument("--window", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--batch", type=int, default=2, help="sequences of a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out-tokens", type=int, default=16384)
    parser.add_argument("--layers", type=int, default=6, help="from scratch")
    parser.add_argument("--hidden-size", type=int, default=256, help="from scratch; a multiple of 128")
    parser.add_argument("--vocabulary", type=int, default=2048, help="from scratch")
    add_common_arguments(parser)
    arguments = parser.parse_args(given)
    if (arguments.model is None) != arguments.from_scratch:
        parser.error("give a model, or --from-scratch")
    if arguments.from_scratch and (arguments.hidden_size % 128 or arguments.hidden_size <= 0):
        parser.error("--hidden-size is a multiple of 128")
    if arguments.output.exists() and not arguments.overwrite:
        parser.error(f"{arguments.output} exists; --overwrite replaces it")
    if arguments.learning_rate is None:
        arguments.learning_rate = 2e-3 if arguments.from_scratch else 2e-4
    with tempfile.TemporaryDirectory(dir=arguments.output.parent) as folder:
        result = run(arguments, Path(folder) / "source")
    rows = [
        ("parameters", f"{result['parameters'] / 1e6:.1f} M"),
        ("tokens trained on", f"{result['tokens']} ({result['epochs']:.2f} epochs)"),
        ("seconds", f"{result['seconds']:.0f}"),
        ("held-out perplexity, original", f"{result['perplexity_original']:.2f}"),
        ("held-out perplexity, dithered", f"{result['perplexity_dithered']:.2f}"),
        ("held-out perplexity, trained", f"{result['perplexity_trained']:.2f}"),
        ("distance, steps of the grid (RMS)", f"{result['distance']:.3f}"),
        ("the same, by training alone", f"{result['distance_by_training']:.3f}"),
        (f"relative error of {GRID}, original", f"{result['error_original']:.2%}"),
        (f"relative error of {GRID}, trained", f"{result['error_trained']:.2%}"),
        (f"relative error of {GRID}, normally distributed numbers", f"{result['error_normal']:.2%}"),
    ]
    show(arguments, {"facts": facts(), "result": result}, table(("what", "figure"), rows))


if __name__ == "__main__":
    main()
