"""The three conventions that checkpoints follow, and the way from each to each.

=====================  ====================  =====================  =====================
what                   huggingface           gguf                   onnx
=====================  ====================  =====================  =====================
rows of q and k        halves of a head      neighbours, in some    halves of a head
                                             architectures
Gemma's norm weights   w, and 1 + w is used  1 + w                  1 + w
Llama 3's scaling      parameters            divisors               either
Mistral                ``mistral``           ``llama``              either
=====================  ====================  =====================  =====================

Rows are moved as encoded blocks, so nothing is rounded. Norm weights are moved in float32; what is
kept exactly is the weight that the model multiplies with, and where float32 cannot hold it the
change says so. Nothing is computed until a tensor's data is asked for, norms (which are small)
excepted.

Sources: llama.cpp's ``convert_hf_to_gguf.py`` (``LlamaModel.permute``, ``Gemma2Model.modify_tensors``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.config import ModelConfig, RopeConfig
from nybble.checkpoint.encodings import encoding
from nybble.checkpoint.llama3_factors import llama3_divisors, matches, with_llama3_parameters
from nybble.checkpoint.tensor import Bytes, Tensor
from nybble.errors import UnsupportedError

FormName = Literal["huggingface", "gguf", "onnx"]

NORM_OFFSETS: Mapping[str, float] = {"gemma2": 1.0, "gemma3": 1.0}
"""What transformers adds to a stored norm weight, by architecture."""
INTERLEAVED_IN_GGUF = frozenset({"llama", "mistral", "smollm3"})
"""Architectures whose GGUF files have neighbouring features rotated together."""
ROPE_FREQS = "huggingface.rope_freqs"
"""Metadata: the divisors of ``rope_freqs.weight`` bit for bit, kept while parameters stand for them."""

_ROTATED = re.compile(r"model\.layers\.\d+\.self_attn\.([qk])_(proj|norm)\.(weight|bias)")
_NORM = re.compile(r"(.*norm)\.weight")


@dataclass(frozen=True)
class Change:
    """What a form did to one tensor."""

    name: str
    what: str
    """For people: ``rows permuted``, ``1 subtracted``."""
    exact: bool = True
    """Whether the model computes with the same values as before."""
    max_error: float = 0.0
    """Largest difference of a value that the model computes with."""


def to_huggingface_form(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint as transformers has it.

    Raises:
        UnsupportedError: its rotary divisors are not those of Llama 3's scaling, which are the only
            ones that a config.json can describe, or a window that its architecture cannot have there.
    """
    return in_form(checkpoint, "huggingface")[0]


def to_gguf_form(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint as GGUF files have it."""
    return in_form(checkpoint, "gguf")[0]


def to_onnx_form(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with q and k in halves and no norm offset: what ONNX operators compute with."""
    return in_form(checkpoint, "onnx")[0]


def in_form(checkpoint: Checkpoint, form: FormName) -> tuple[Checkpoint, dict[str, Change]]:
    """The checkpoint in a form, and what was done to which tensor (by name).

    Raises:
        UnsupportedError: the form cannot hold it; the message says what.
    """
    config = checkpoint.config
    interleaved = form == "gguf" and config.architecture in INTERLEAVED_IN_GGUF
    offset = NORM_OFFSETS.get(config.architecture, 0.0) if form == "huggingface" else 0.0
    tensors: dict[str, Tensor] = {}
    changes: dict[str, Change] = {}
    for name, tensor in checkpoint.tensors.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            changes[name] = Change(name, "left out: the embedding is used in its place")
            continue
        changed, what = tensor, []
        order = _row_order(config, name, interleaved)
        if order is not None:
            changed = permuted(changed, order)
            what.append(Change(name, "rows permuted"))
        if _NORM.fullmatch(name) and offset != config.rms_norm_offset:
            changed, change = _with_offset(changed, config.rms_norm_offset, offset)
            what.append(change)
        tensors[name] = changed
        if what:
            changes[name] = replace(what[-1], what=", ".join(change.what for change in what))
    rope = _rope(config.rope, form, interleaved, checkpoint.metadata)
    # A mapping of GGUF knows more than its values, so that it is only changed where it has to be.
    metadata = checkpoint.metadata
    if config.rope.frequency_factors and not rope.frequency_factors:
        metadata = {**metadata, ROPE_FREQS: list(config.rope.frequency_factors)}
    local = None if config.rope_local is None else replace(config.rope_local, interleaved=interleaved)
    changed_config = replace(
        config,
        architecture=_architecture(config, form),
        rope=rope,
        rope_local=local,
        rms_norm_offset=offset,
    )
    return replace(checkpoint, config=changed_config, tensors=tensors, metadata=metadata), changes


# -- rows of q and k -----------------------------------------------------------------------------------


def row_order(rows: int, head_dim: int, rotary_dim: int, *, interleaved: bool) -> npt.NDArray[np.int64]:
    """Which old row stands at each place: int64 (rows,).

    ``interleaved`` True goes from halves (feature i is rotated with i + rotary_dim / 2) to
    neighbours (2 i with 2 i + 1), False back. Features of a head that are not rotated stay.
    """
    head = np.arange(head_dim)
    pairs = head[:rotary_dim].reshape((2, -1) if interleaved else (-1, 2))
    head[:rotary_dim] = pairs.T.reshape(-1)
    return (np.arange(0, rows, head_dim)[:, None] + head).reshape(-1)


def permuted(tensor: Tensor, order: npt.NDArray[np.int64]) -> Tensor:
    """The tensor with its rows (of a vector: its elements) in another order, in the same encoding."""
    rows = tensor.shape[0]
    if tensor.nbytes % rows or (len(tensor.shape) == 1 and tensor.encoding.block_size > 1):
        raise UnsupportedError(f"{tensor.name}: rows of {tensor.encoding.name} cannot be moved one by one")

    def data() -> Bytes:
        moved: Bytes = tensor.data.reshape(rows, -1)[order].reshape(-1)
        return moved

    return tensor.changed(data=data)


def _row_order(config: ModelConfig, name: str, interleaved: bool) -> npt.NDArray[np.int64] | None:
    """The order that brings a tensor of q or k into the form; None where nothing moves."""
    match = _ROTATED.fullmatch(name)
    if match is None or config.rope.interleaved == interleaved:
        return None
    heads = config.num_attention_heads if match[1] == "q" else config.num_key_value_heads
    rows = config.head_dim * (heads if match[2] == "proj" else 1)
    return row_order(rows, config.head_dim, config.rope.rotary_dim, interleaved=interleaved)


# -- norm weights --------------------------------------------------------------------------------------


def _with_offset(tensor: Tensor, before: float, after: float) -> tuple[Tensor, Change]:
    """A norm weight for another offset, in float32.

    The model multiplies with float32(weight + offset), whatever the form: that is what must not
    change.
    """
    values = tensor.dequantize()
    used = values + np.float32(before)
    stored = used - np.float32(after)
    error = float(np.abs((stored + np.float32(after)).astype(np.float64) - used).max(initial=0.0))
    data = np.ascontiguousarray(stored, "<f4").reshape(-1).view(np.uint8)
    amount = after - before
    what = f"{abs(amount):g} {'subtracted' if amount > 0 else 'added'}"
    changed = tensor.changed(encoding=encoding("f32"), data=data)
    return changed, Change(tensor.name, what, exact=error == 0.0, max_error=error)


# -- config --------------------------------------------------------------------------------------------


def _rope(rope: RopeConfig, form: FormName, interleaved: bool, metadata: Mapping[str, object]) -> RopeConfig:
    rope = replace(rope, interleaved=interleaved)
    if form == "huggingface" and rope.frequency_factors:
        if all(value == 1.0 for value in rope.frequency_factors):
            return replace(rope, frequency_factors=())
        found = with_llama3_parameters(rope) if rope.kind == "default" else None
        if found is None:
            raise UnsupportedError(
                "the rotary divisors (rope_freqs.weight) are not those of Llama 3's scaling, and"
                " config.json has no other way to describe divisors; GGUF and ONNX can hold them"
            )
        return found
    if form == "gguf" and rope.kind == "llama3":
        divisors = llama3_divisors(rope)
        kept = _kept_divisors(metadata)
        if kept is not None and matches(rope, kept):
            divisors = kept
        return RopeConfig(
            theta=rope.theta,
            rotary_dim=rope.rotary_dim,
            interleaved=interleaved,
            frequency_factors=divisors,
            attention_factor=rope.attention_factor,
        )
    return rope


def _kept_divisors(metadata: Mapping[str, object]) -> tuple[float, ...] | None:
    kept = metadata.get(ROPE_FREQS)
    if isinstance(kept, list) and all(isinstance(value, float) for value in kept):
        return tuple(kept)
    return None


def _architecture(config: ModelConfig, form: FormName) -> str:
    """Llama and Mistral differ by the window alone: GGUF calls both ``llama``."""
    name = config.architecture
    if form == "gguf":
        return "llama" if name == "mistral" else name
    if form == "huggingface" and name == "llama" and config.sliding_window is not None:
        if config.attention_bias or config.attention_output_bias or config.mlp_bias:
            raise UnsupportedError("transformers has no Llama with a sliding window and biases")
        return "mistral"
    return name
