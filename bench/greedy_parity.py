"""Greedy tokens of nybble against transformers in float32 on the dequantized weights.

    python bench/greedy_parity.py MODEL.gguf ... [--oracle-python PATH] [--cache FOLDER]

The oracle is ``AutoModelForCausalLM.from_pretrained(gguf_file=...)`` with its own tokenizer, run by
an interpreter with torch and transformers; what it says is kept in the cache folder, by file, prompts
and version. Four prompts, 64 tokens each. Every position is judged by running the oracle's own tokens
through nybble (teacher-forced), once a token at a time and once all at once; "free" lets nybble
continue by itself and counts the tokens before the first that differs. The margin of a position is the
oracle's best logit minus its second; "wide" are the positions whose margin is above ``--margin``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from harness import add_common_arguments, facts, note, show, table

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village near the sea, there lived",
    'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n',
    "The three laws of thermodynamics can be summarised as follows. First,",
)
KEPT = 16
"""Best logits of each position that are stored."""


def ask_oracle(model: Path, output: Path, steps: int) -> None:
    """In the oracle's interpreter: greedy tokens and best logits of every prompt, as an .npz file."""
    import torch
    import transformers

    folder, name = str(model.parent), model.name
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    network = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    network.eval()
    found: dict[str, Any] = {"network": type(network).__name__, "transformers": transformers.__version__}
    for number, prompt in enumerate(PROMPTS):
        prompt_ids = tokenizer(prompt)["input_ids"]
        tokens, best_ids, best_logits = [], [], []
        given, past = torch.tensor([prompt_ids]), None
        with torch.no_grad():
            for _ in range(steps):
                output_ = network(given, past_key_values=past, use_cache=True)
                past = output_.past_key_values
                best = output_.logits[0, -1].topk(KEPT)
                tokens.append(int(output_.logits[0, -1].argmax()))
                best_ids.append(best.indices.numpy())
                best_logits.append(best.values.numpy())
                given = torch.tensor([[tokens[-1]]])
        found[f"prompt{number}"] = np.array(prompt_ids)
        found[f"tokens{number}"] = np.array(tokens)
        found[f"best_ids{number}"] = np.stack(best_ids)
        found[f"best_logits{number}"] = np.stack(best_logits)
    np.savez(output, **found)


def oracle(arguments: argparse.Namespace, model: Path) -> dict[str, np.ndarray]:
    """The oracle's answers, from the cache if they are there."""
    stat = model.stat()
    version = subprocess.check_output(
        [
            arguments.oracle_python,
            "-c",
            "from importlib.metadata import version as v; print(v('transformers'))",
        ],
        text=True,
    )
    key = json.dumps(
        [str(model.resolve()), stat.st_size, stat.st_mtime_ns, PROMPTS, arguments.tokens, version]
    )
    path = arguments.cache / f"{model.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    if not path.exists():
        note(f"{model.name}: asking transformers {version.strip()}")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npz")
        command = [arguments.oracle_python, __file__, "--ask-oracle", partial, "--tokens", arguments.tokens]
        # What the oracle prints (progress of loading) does not belong into the table.
        subprocess.run([*map(str, command), str(model)], check=True, stdout=sys.stderr)
        partial.rename(path)
    with np.load(path) as stored:
        return dict(stored)


def judge(arguments: argparse.Namespace, model: Path) -> dict[str, Any]:
    """Both precisions of one file, prompt by prompt."""
    from nybble.devices.cpu import compile_session
    from nybble.loading import read_checkpoint

    expected = oracle(arguments, model)
    checkpoint = read_checkpoint(model)
    if checkpoint.tokenizer is None:
        raise SystemExit(f"{model} has no tokenizer")
    tokenizer = checkpoint.tokenizer.build()
    rows = []
    for precision in ("f32", "fast"):
        session = compile_session(checkpoint, precision=precision, threads=arguments.threads)
        for number, prompt in enumerate(PROMPTS):
            prompt_ids = expected[f"prompt{number}"].tolist()
            rows.append(
                {
                    "precision": precision,
                    "prompt": number,
                    "same_prompt_ids": tokenizer.encode(prompt) == prompt_ids,
                    **judge_prompt(session, prompt_ids, expected, number, arguments.margin),
                }
            )
        session.close()
        note(f"{model.name}: {precision} done")
    return {"model": model.name, "oracle": str(expected["network"]), "rows": rows}


def judge_prompt(
    session: Any, prompt_ids: list[int], expected: dict[str, np.ndarray], number: int, wide: float
) -> dict[str, Any]:
    from nybble.devices.base import BatchItem

    tokens = expected[f"tokens{number}"].tolist()
    best_ids, best_logits = expected[f"best_ids{number}"], expected[f"best_logits{number}"]
    margins = best_logits[:, 0] - best_logits[:, 1]

    def run(sequence: Any, ids: list[int], logits: str = "last") -> np.ndarray:
        rows: np.ndarray = session.forward([BatchItem(sequence, ids, logits)])
        return rows

    sequence = session.new_sequence()
    stepped = [run(sequence, prompt_ids), *(run(sequence, [token]) for token in tokens[:-1])]
    sequence.close()
    sequence = session.new_sequence()
    at_once = run(sequence, prompt_ids + tokens[:-1], "all")[len(prompt_ids) - 1 :]
    sequence.close()
    sequence = session.new_sequence()
    free = [int(run(sequence, prompt_ids)[0].argmax())]
    while len(free) < len(tokens):
        free.append(int(run(sequence, free[-1:])[0].argmax()))
    sequence.close()
    result: dict[str, Any] = {"positions": len(tokens), "wide": int((margins > wide).sum())}
    for name, logits in (("decode", np.concatenate(stepped)), ("prefill", at_once)):
        wrong = np.flatnonzero(logits.argmax(axis=-1) != tokens)
        result[name] = {
            "equal": len(tokens) - len(wrong),
            "wide_equal": int(((margins > wide) & (logits.argmax(axis=-1) == tokens)).sum()),
            "wrong": [{"position": int(i), "margin": float(margins[i])} for i in wrong],
            # Over the oracle's best tokens only: the others are not stored.
            "largest_difference": float(abs(np.take_along_axis(logits, best_ids, 1) - best_logits).max()),
        }
    first = next((i for i, (a, b) in enumerate(zip(free, tokens, strict=True)) if a != b), None)
    result["free"] = {
        "equal_until": len(tokens) if first is None else first,
        "margin": None if first is None else float(margins[first]),
    }
    return result


def text_of(results: list[dict[str, Any]]) -> str:
    rows = []
    for result in results:
        for row in result["rows"]:
            free, wrong = row["free"], row["decode"]["wrong"] + row["prefill"]["wrong"]
            margin = "" if free["margin"] is None else f" (margin {free['margin']:.3f})"
            rows.append(
                (
                    result["model"], row["precision"], row["prompt"],
                    *(f"{row[p]['equal']}/{row['positions']}" for p in ("decode", "prefill")),
                    *(f"{row[p]['wide_equal']}/{row['wide']}" for p in ("decode", "prefill")),
                    f"{max((w['margin'] for w in wrong), default=0):.3f}",
                    str(free["equal_until"]) + margin,
                    f"{max(row[p]['largest_difference'] for p in ('decode', 'prefill')):.4f}",
                    "yes" if row["same_prompt_ids"] else "NO",
                )
            )  # fmt: skip
    header = (
        "model", "precision", "prompt", "equal, decode", "equal, prefill", "wide, decode", "wide, prefill",
        "widest margin missed", "free until", "largest logit difference", "prompt ids equal",
    )  # fmt: skip
    return table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Greedy tokens: nybble against transformers.")
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--margin", type=float, default=0.05, help="logits (default 0.05)")
    parser.add_argument("--oracle-python", default=sys.executable, metavar="PATH")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "nybble-bench")
    parser.add_argument("--ask-oracle", type=Path, help=argparse.SUPPRESS)
    add_common_arguments(parser)
    arguments = parser.parse_args()
    if arguments.ask_oracle is not None:
        ask_oracle(arguments.models[0], arguments.ask_oracle, arguments.tokens)
        return
    results = [judge(arguments, model) for model in arguments.models]
    show(arguments, {**facts(), "margin": arguments.margin, "results": results}, text_of(results))


if __name__ == "__main__":
    main()
