"""Runs written ONNX folders in ONNX Runtime, step by step, as a generator does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.config import ModelConfig
from nybble.checkpoint.encodings import encoding
from nybble.formats.onnx.targets import TARGETS
from nybble.graph.onnx.weights import written_encoding
from support.random_checkpoints import FAMILIES, rope, with_tensors

Floats = npt.NDArray[np.float32]

NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def onnx_families() -> dict[str, ModelConfig]:
    """The families in ONNX form, with heads of sizes that GroupQueryAttention takes."""
    result = {}
    for name, config in FAMILIES.items():
        if config.rope.interleaved:
            continue
        config = replace(config, rms_norm_offset=0.0)
        if config.head_dim % 16:
            rotated = 16 if name == "phi4-mini" else 32
            config = replace(config, head_dim=32, rope=replace(config.rope, rotary_dim=rotated))
            if config.rope_local is not None:
                config = replace(config, rope_local=rope(32))
        result[name] = config
    return result


def session(folder: Path) -> onnxruntime.InferenceSession:
    """The folder's model on the CPU provider."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(
        str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )


def run_steps(
    model: Any, config: ModelConfig, ids: Sequence[int], sizes: Sequence[int] = (), batch: int = 1
) -> Floats:
    """Logits of every token, run in chunks of these sizes and then the rest, caches passed on.

    ``batch`` repeats the sequence; the rows of all must be equal, and one is returned.
    """
    inputs = {item.name: item.type for item in model.get_inputs()}
    outputs = [item.name for item in model.get_outputs()]
    past = {
        name: np.zeros((batch, config.num_key_value_heads, 0, config.head_dim), NUMPY[kind])
        for name, kind in inputs.items()
        if name.startswith("past")
    }
    rows, begin = [], 0
    for size in (*sizes, len(ids)):
        chunk = ids[begin : begin + size]
        if not chunk:
            continue
        end = begin + len(chunk)
        feed = {
            "input_ids": np.repeat(np.array([chunk], np.int64), batch, axis=0),
            "attention_mask": np.ones((batch, end), np.int64),
            "position_ids": np.repeat(np.arange(begin, end)[None], batch, axis=0),
            **past,
        }
        found = dict(
            zip(outputs, model.run(None, {k: v for k, v in feed.items() if k in inputs}), strict=True)
        )
        assert all(np.array_equal(row, found["logits"][0]) for row in found["logits"])
        rows.append(found["logits"][0].astype(np.float32))
        past = {name: found[name.replace("past_key_values", "present")] for name in past}
        begin = end
    return np.concatenate(rows)


def as_written(checkpoint: Checkpoint, target: str) -> Checkpoint:
    """The checkpoint with the values that the written model's weights have."""
    chosen, tensors = TARGETS[target], dict(checkpoint.tensors)
    for name, tensor in checkpoint.tensors.items():
        outer = name in ("model.embed_tokens.weight", "lm_head.weight")
        if len(tensor.shape) != 2:
            continue
        if name == "model.embed_tokens.weight" and not checkpoint.config.tie_word_embeddings:
            continue
        kind = written_encoding(tensor, chosen, "rtn", output=outer)
        if kind.name == tensor.encoding.name:
            continue
        assert kind.quantize is not None
        tensors[name] = tensor.changed(encoding=kind, data=kind.quantize(tensor.dequantize()))
    return replace(checkpoint, tensors=tensors)


def quantized(checkpoint: Checkpoint, kind: str, *, layers_only: bool = False) -> Checkpoint:
    """The checkpoint with its matrices in another encoding."""
    row = encoding(kind)
    assert row.quantize is not None
    return with_tensors(
        checkpoint,
        {
            name: tensor.changed(encoding=row, data=row.quantize(tensor.dequantize()))
            for name, tensor in checkpoint.tensors.items()
            if len(tensor.shape) == 2 and (not layers_only or ".layers." in name)
        },
    )
