"""Runs in an interpreter that has llama_cpp: logits and greedy tokens of a GGUF file.

Usage: python llama_cpp_logits.py MODEL CONTEXT COUNT ID,ID,... [ADAPTER WEIGHT]; prints one JSON object.
"""

from __future__ import annotations

import json
import sys

import llama_cpp


def main() -> None:
    path, context, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    ids = [int(text) for text in sys.argv[4].split(",")]
    model = llama_cpp.Llama(
        path,
        n_ctx=context,
        n_batch=512,
        n_threads=2,
        n_threads_batch=2,
        logits_all=True,
        flash_attn=False,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        lora_path=sys.argv[5] if len(sys.argv) > 5 else None,
        lora_scale=float(sys.argv[6]) if len(sys.argv) > 6 else 1.0,
        verbose=False,
    )
    model.eval(ids)
    logits = model.scores[: len(ids)].tolist() if count == 0 else []
    tokens = []
    for _ in range(count):
        tokens.append(int(model.scores[model.n_tokens - 1].argmax()))
        model.eval(tokens[-1:])
    text = model.detokenize(tokens).decode(errors="replace") if tokens else ""
    json.dump({"logits": logits, "tokens": tokens, "text": text, "metadata": model.metadata}, sys.stdout)


main()
