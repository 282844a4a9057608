"""A recognised decoder as ModelConfig and tensors with canonical names."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

import numpy as np

from nybble.checkpoint.config import LayerType, ModelConfig, RopeConfig
from nybble.checkpoint.encodings import encoding
from nybble.checkpoint.tensor import Tensor
from nybble.errors import UnsupportedError
from nybble.formats.onnx.recognise.masks import window_of
from nybble.formats.onnx.recognise.probe import RUN_INSTEAD
from nybble.formats.onnx.recognise.rotation import Rotation, Runs, recovered, rotation_of
from nybble.formats.onnx.recognise.structure import Block, Decoder, Norm, Projection
from nybble.formats.onnx.recognise.values import Stored, Term, Weight
from nybble.formats.onnx.recognise.weights import join_rows, same_numbers, to_tensor


@dataclass(frozen=True)
class Hints:
    """What files beside the model say; used only where the graph leaves it open."""

    family: str = ""
    """``model_type`` or genai_config's ``type``."""
    context_length: int | None = None
    ropes: tuple[RopeConfig, ...] = ()
    stated: ModelConfig | None = None
    """A config in the file; taken as a whole where the graph computes just that."""


@dataclass(frozen=True)
class Recognised:
    """The result."""

    config: ModelConfig
    tensors: Mapping[str, Tensor]
    accuracy_levels: tuple[int, ...]
    """Those of MatMulNBits that occur; 4 means that ONNX Runtime rounds activations to int8."""


def build(decoder: Decoder, runs: Runs, past: int, hints: Hints) -> Recognised:
    """Config and tensors of a decoder that was read with ``past`` cached tokens.

    Raises:
        UnsupportedError: layers that differ where no family's do, or tables and masks of no known kind.
    """
    blocks = decoder.blocks
    rotations = [rotation_of(block, layer, past) for layer, block in enumerate(blocks)]
    longest = max(
        (len(item.cos) for item in rotations if item is not None and item.tables is not None), default=0
    )
    maximum = hints.context_length or longest or 2048
    # Lengths to look for windows at: masks may be computed as squares, which only fit when short.
    pasts = sorted({min(maximum, 1 << 17), min(maximum, 8192), min(maximum, 2048)}, reverse=True)
    windows = _windows(blocks, runs, pasts)
    config = _config(decoder, windows, maximum)
    config = _with_rope(config, rotations, runs, hints)
    config = replace(config, architecture=_family(config, blocks, hints.family))
    try:
        tensors = _tensors(decoder, config)
    except UnsupportedError:
        if config.architecture != "phi3":
            raise
        # Parts of a fused matrix that are stored in different ways: the same model with separate ones.
        config = replace(config, architecture="llama")
        tensors = _tensors(decoder, config)
    tied = same_numbers(decoder.embedding, decoder.head.weight)
    config = replace(config, tie_word_embeddings=tied)
    if not tied:
        tensors["lm_head.weight"] = to_tensor("lm_head.weight", decoder.head.weight)
        tensors.update(_input_order("lm_head", [decoder.head]))
    if hints.stated is not None and agrees(config, hints.stated):
        config = hints.stated
    levels = {int(term.values["accuracy_level"]) for term in decoder.linears}
    return Recognised(config, tensors, tuple(sorted(levels)))


def agrees(found: ModelConfig, stated: ModelConfig) -> bool:
    """Whether a stated config means the mathematics that was found."""
    for item in fields(ModelConfig):
        a, b = getattr(found, item.name), getattr(stated, item.name)
        if item.name == "attention_scale":
            a, b = (found.head_dim**-0.5 if scale is None else scale for scale in (a, b))
        if item.name == "extra" or a == b:
            continue
        number = isinstance(a, float) and isinstance(b, float)
        if not number or not math.isclose(a, b, rel_tol=1e-3):
            return False
    return True


def _windows(blocks: Sequence[Block], runs: Runs, pasts: Sequence[int]) -> list[int | None]:
    found: dict[tuple[object, ...], int | None] = {}
    windows = []
    for block in blocks:
        values = block.attention.values
        key = (tuple(values["masks"]), values["causal"], values["window"])
        if key not in found:
            found[key] = window_of(block.attention, runs, pasts)
        windows.append(found[key])
    return windows


def _same(blocks: Sequence[Block], what: str, get: Callable[[Block], object]) -> object:
    """The one value that all layers have.

    Raises:
        UnsupportedError: they differ.
    """
    first = get(blocks[0])
    for index, block in enumerate(blocks):
        if get(block) != first:
            raise UnsupportedError(
                f"layer {index} (node {block.attention.node}) has {what} {get(block)}, layer 0 has {first};"
                f" {RUN_INSTEAD}"
            )
    return first


def _config(decoder: Decoder, windows: Sequence[int | None], maximum: int) -> ModelConfig:
    blocks = decoder.blocks
    first = blocks[0].attention.values
    for key in ("heads", "key_heads", "head_dim", "scale", "softcap"):
        _same(blocks, key, lambda block: block.attention.values[key])  # noqa: B023
    _same(blocks, "the activation", lambda block: block.activation)
    _same(blocks, "an MLP of size", lambda block: block.down.input.width)
    _same(
        blocks,
        "norms",
        lambda block: (block.q_norm is None, block.after_attention is None, block.after_mlp is None),
    )
    biases = _same(
        blocks,
        "biases",
        lambda block: tuple(
            p.bias is not None
            for p in (block.q, block.k, block.v, block.output, block.gate, block.up, block.down)
        ),
    )
    assert isinstance(biases, tuple)
    if len(set(biases[:3])) > 1 or len(set(biases[4:])) > 1 or decoder.head.bias is not None:
        raise UnsupportedError(f"biases on some projections only: no known family; {RUN_INSTEAD}")
    hidden = decoder.embedding.shape[1]
    head_dim = first["head_dim"]
    scale = first["scale"]
    seen = {window for window in windows if window is not None}
    if len(seen) > 1:
        raise UnsupportedError(f"sliding windows of different sizes {sorted(seen)}; {RUN_INSTEAD}")
    residual = _same(blocks, "a residual scale", lambda block: block.scales)
    assert isinstance(residual, tuple)
    if residual[0] != residual[1]:
        raise UnsupportedError(f"residual scales {residual}; {RUN_INSTEAD}")
    kinds: tuple[LayerType, ...] = tuple(
        "full_attention" if window is None else "sliding_attention" for window in windows
    )
    usual = scale is None or math.isclose(scale, head_dim**-0.5, rel_tol=1e-3)
    return ModelConfig(
        architecture="llama",
        vocab_size=decoder.head.weight.shape[0],
        hidden_size=hidden,
        intermediate_size=blocks[0].down.input.width,
        num_hidden_layers=len(blocks),
        num_attention_heads=first["heads"],
        num_key_value_heads=first["key_heads"],
        head_dim=head_dim,
        max_position_embeddings=maximum,
        rope=RopeConfig(theta=10000.0, rotary_dim=head_dim),
        rms_norm_eps=_eps(decoder),
        hidden_act=blocks[0].activation,
        attention_bias=biases[0],
        attention_output_bias=biases[3],
        mlp_bias=biases[4],
        query_key_norm=blocks[0].q_norm is not None,
        sliding_window=next(iter(seen), None),
        layer_types=kinds if seen else (),
        attention_scale=None if usual else scale,
        attention_softcap=first["softcap"],
        logit_softcap=decoder.logit_softcap,
        embedding_scale=_root(decoder.embedding_scale, hidden),
        logit_scale=decoder.logit_scale,
        residual_scale=residual[0],
    )


def _eps(decoder: Decoder) -> float:
    norms: list[Norm | None] = [decoder.final_norm]
    for block in decoder.blocks:
        norms += [
            block.input_norm,
            block.mlp_norm,
            block.q_norm,
            block.k_norm,
            block.after_attention,
            block.after_mlp,
        ]
    found = {norm.eps for norm in norms if norm is not None}
    if max(found) - min(found) > 1e-3 * max(found):
        raise UnsupportedError(f"norms with different eps {sorted(found)}; {RUN_INSTEAD}")
    return decoder.final_norm.eps


def _root(scale: float, hidden_size: int) -> float:
    """Gemma's sqrt(hidden_size), which files round to their type."""
    root = math.sqrt(hidden_size)
    return root if math.isclose(scale, root, rel_tol=2**-8) else scale


def _with_rope(
    config: ModelConfig, rotations: Sequence[Rotation | None], runs: Runs, hints: Hints
) -> ModelConfig:
    kinds: dict[str, list[Rotation]] = {"full_attention": [], "sliding_attention": []}
    for layer, rotation in enumerate(rotations):
        found = kinds[config.layer_type(layer)]
        if rotation is not None and not any(rotation.same(other) for other in found):
            found.append(rotation)
    full, sliding = kinds["full_attention"], kinds["sliding_attention"]
    if len(full) > 1 or len(sliding) > 1:
        raise UnsupportedError(f"layers of one kind rotate differently; {RUN_INSTEAD}")
    if not full and not sliding:
        raise UnsupportedError(f"no layer has a rotary embedding: no known family; {RUN_INSTEAD}")
    main = full[0] if full else sliding[0]
    limit = config.max_position_embeddings
    config = replace(config, rope=recovered(main, runs, limit, hints.ropes))
    if full and sliding and not full[0].same(sliding[0]):
        config = replace(config, rope_local=recovered(sliding[0], runs, limit, hints.ropes))
    if any(rotation is None for rotation in rotations):
        config = replace(config, rope_layers=tuple(rotation is not None for rotation in rotations))
    return config


# -- families ----------------------------------------------------------------------------------------

_NAMES = {"gemma3_text": "gemma3", "phi": "phi3", "phi4mm": "phi3", "ministral3": "mistral"}


def _family(config: ModelConfig, blocks: Sequence[Block], hint: str) -> str:
    """The family whose graph this is; the hint decides where several are the same mathematics."""
    hint = _NAMES.get(hint, hint)
    after = blocks[0].after_attention is not None, blocks[0].after_mlp is not None
    if after == (True, True):
        return "gemma3" if config.query_key_norm else "gemma2"
    if any(after):
        raise UnsupportedError(f"a norm after one half of a layer only: no known family; {RUN_INSTEAD}")
    if config.attention_softcap is not None:
        raise UnsupportedError(f"capped attention without Gemma's norms: no known family; {RUN_INSTEAD}")
    plain = not config.query_key_norm and config.residual_scale == 1.0 and not config.rope_layers
    fused = blocks[0].gate.linear is blocks[0].up.linear
    phi = plain and (fused or config.rope.kind == "longrope")
    if hint == "phi3" and plain:
        return "phi3"
    possible = {
        "llama": True,
        "mistral": plain and not config.attention_bias,
        "qwen2": plain and config.attention_bias and not config.attention_output_bias,
        "qwen3": config.query_key_norm,
        "smollm3": not config.query_key_norm and not config.attention_bias,
    }
    if possible.get(hint):
        return hint
    if phi:
        return "phi3"
    if config.query_key_norm:
        return "qwen3"
    if config.rope_layers:
        return "smollm3"
    if possible["qwen2"]:
        return "qwen2"
    return "mistral" if config.sliding_window is not None and possible["mistral"] else "llama"


# -- tensors -----------------------------------------------------------------------------------------


def _tensors(decoder: Decoder, config: ModelConfig) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}

    def add(name: str, weight: Stored) -> None:
        tensors[name] = to_tensor(name, weight)

    def project(name: str, *parts: Projection) -> None:
        add(f"{name}.weight", _joined([part.weight for part in parts], parts))
        tensors.update(_input_order(name, parts))
        biases = [part.bias for part in parts if part.bias is not None]
        if biases:
            add(f"{name}.bias", join_rows(biases))

    add("model.embed_tokens.weight", decoder.embedding)
    add("model.norm.weight", decoder.final_norm.weight)
    gemma = config.architecture in ("gemma2", "gemma3")
    for layer, block in enumerate(decoder.blocks):
        at = f"model.layers.{layer}"
        norms = {
            "input_layernorm": block.input_norm,
            "pre_feedforward_layernorm" if gemma else "post_attention_layernorm": block.mlp_norm,
            "self_attn.q_norm": block.q_norm,
            "self_attn.k_norm": block.k_norm,
        }
        if gemma:
            norms |= {
                "post_attention_layernorm": block.after_attention,
                "post_feedforward_layernorm": block.after_mlp,
            }
        for name, norm in norms.items():
            if norm is not None:
                add(f"{at}.{name}.weight", norm.weight)
        if config.architecture == "phi3":
            project(f"{at}.self_attn.qkv_proj", block.q, block.k, block.v)
            project(f"{at}.mlp.gate_up_proj", block.gate, block.up)
        else:
            for name, part in (("q", block.q), ("k", block.k), ("v", block.v)):
                project(f"{at}.self_attn.{name}_proj", part)
            project(f"{at}.mlp.gate_proj", block.gate)
            project(f"{at}.mlp.up_proj", block.up)
        project(f"{at}.self_attn.o_proj", block.output)
        project(f"{at}.mlp.down_proj", block.down)
    return tensors


def _input_order(name: str, parts: Sequence[Projection]) -> dict[str, Tensor]:
    """The order in which a linear takes its inputs (GPTQ's act-order), if it is not their own."""
    orders: list[Any] = [part.linear.values.get("order") for part in parts]
    if all(order is None for order in orders):
        return {}
    if any(order is None or not np.array_equal(order, orders[0]) for order in orders):
        raise UnsupportedError(f"{name}: its parts take their inputs in different orders")
    data = np.asarray(orders[0], "<i4").view(np.uint8)
    key = f"{name}.input_permutation"
    return {key: Tensor(key, (data.size // 4,), encoding("i32"), data)}


def _joined(weights: Sequence[Stored], parts: Sequence[Projection]) -> Stored:
    """Parts of one matrix that lie in it one after another are that matrix."""
    linear: Term = parts[0].linear
    whole = all(part.linear is linear for part in parts) and parts[0].begin == 0
    if whole and all(a.end == b.begin for a, b in pairwise(parts)) and parts[-1].end == linear.width:
        stored: Stored = linear.values["weight"]
        return stored
    return join_rows(weights)


__all__ = ["Hints", "Recognised", "Weight", "build"]
