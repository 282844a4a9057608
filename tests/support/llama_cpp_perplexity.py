"""Runs in an interpreter that has llama_cpp: what llama-perplexity computes, with llama.cpp's logits.

Usage: python llama_cpp_perplexity.py TEXT WINDOW COUNT MODEL [OTHER]; prints one JSON object. Tokens,
chunks and sums follow ``perplexity`` and ``kl_divergence`` of llama.cpp's tools/perplexity, written anew.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import llama_cpp
import numpy as np


def load(path: str, window: int) -> llama_cpp.Llama:
    return llama_cpp.Llama(
        path, n_ctx=window, n_batch=window, n_threads=2, n_threads_batch=2, logits_all=True, verbose=False
    )


def main() -> None:
    text = Path(sys.argv[1]).read_text(encoding="utf-8")
    window, count = int(sys.argv[2]), int(sys.argv[3])
    models = [load(path, window) for path in sys.argv[4:]]
    vocabulary = llama_cpp.llama_model_get_vocab(models[0].model)
    tokens = models[0].tokenize(text.encode(), add_bos=True, special=False)
    first = window // 2
    nll: list[list[float]] = [[] for _ in models]
    kld: list[float] = []
    same = 0
    for start in range(0, count * window, window):
        ids = tokens[start : start + window]
        if llama_cpp.llama_vocab_get_add_bos(vocabulary):
            ids[0] = llama_cpp.llama_vocab_bos(vocabulary)
        rows = []
        for model, found in zip(models, nll, strict=True):
            model.reset()
            model.eval(ids)
            logits = model.scores[first : window - 1].astype(np.float64)
            logits -= logits.max(axis=1, keepdims=True)
            logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
            rows.append(logits)
            found += (-logits[np.arange(len(logits)), ids[first + 1 :]]).tolist()
        if len(rows) == 2:
            p, q = rows
            kld += (np.exp(p) * (p - q)).sum(axis=1).tolist()
            same += int((p.argmax(axis=1) == q.argmax(axis=1)).sum())
    result: dict[str, object] = {
        "tokens": tokens[: count * window],
        "perplexity": [math.exp(np.mean(found)) for found in nll],
        "error": [math.exp(np.mean(found)) * np.std(found) / math.sqrt(len(found) - 1) for found in nll],
    }
    if kld:
        result |= {
            "kld": float(np.mean(kld)),
            "kld_error": float(np.std(kld) / math.sqrt(len(kld) - 1)),
            "kld99": float(np.quantile(kld, 0.99)),
            "top1": same / len(kld),
        }
    json.dump(result, sys.stdout)


main()
