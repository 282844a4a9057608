"""Rules for operators that hold a whole step: norms, quantized linears, rotary embedding, attention.

Microsoft's: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md.
The standard's (opset 23 and 24): https://onnx.ai/onnx/operators/.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nybble.formats.onnx.recognise.arithmetic import by_heads, linear
from nybble.formats.onnx.recognise.layout import Heads, features_of, head_rows, heads_of, narrowed
from nybble.formats.onnx.recognise.movement import embedding
from nybble.formats.onnx.recognise.probe import Call, Outputs, Rule
from nybble.formats.onnx.recognise.values import Array, Known, Term, Value, View, Weight
from nybble.formats.onnx.recognise.weights import dequantize_linear, matmul_nbits

# -- norms ---------------------------------------------------------------------------------------------


def rms_norm(call: Call) -> Outputs:
    """SimplifiedLayerNormalization and RMSNormalization over the last axis."""
    call.allow("axis", "epsilon", "stash_type")
    view = call.view(0)
    if call.attribute("axis", -1) not in (-1, len(view.shape) - 1):
        raise call.unsupported("a norm over anything but the last axis")
    return [_normal(call, view, call.weight(1), call.attribute("epsilon", 1e-5))]


def _normal(call: Call, view: View, weight: Weight, eps: float) -> View:
    view = narrowed(view)
    group = head_rows(view)[1]
    if weight.size != group:
        raise call.unsupported(f"a norm over {group} features with {weight.size} weights")
    base = view.base.scaled(view.gain)
    values = {"weight": weight.reshaped((group,)), "eps": _eps(eps), "group": group}
    return view.on(call.term("rms_norm", (base,), base.shape, **values))


def _eps(value: float) -> float:
    """An attribute is a float32: the shortest number that rounds to it."""
    return float(str(np.float32(value)))


def skip_rms_norm(call: Call) -> Outputs:
    """Sum of input, skip and perhaps a bias; its norm; the sum is the fourth output."""
    call.allow("epsilon")
    first, second = features_of(call.view(0)), features_of(call.view(1))
    if first.shape != second.shape:
        raise call.unsupported("input and skip of different shapes")
    if call.optional(3) is not None:
        raise call.unsupported("a bias")
    total = View(call.term("add", (first, second), first.shape), call.view(0).shape)
    normal = _normal(call, total, call.weight(2), call.attribute("epsilon", 1e-12))
    return [normal, None, None, total]


# -- weights -------------------------------------------------------------------------------------------


def matmul_n_bits(call: Call) -> Outputs:
    call.allow("K", "N", "bits", "block_size", "accuracy_level", "weight_prepacked")
    if call.attribute("weight_prepacked", 0):
        raise call.unsupported("weights in the packing of one GPU")
    if call.optional(4) is not None:
        raise call.unsupported("a group index (act-order)")
    rows, columns = call.attribute("N", 0), call.attribute("K", 0)
    weight = matmul_nbits(
        call.weight(1), call.weight(2), call.optional_weight(3),
        rows=rows, columns=columns, bits=call.attribute("bits", 4), block=call.attribute("block_size", 32),
    )  # fmt: skip
    bias = None if call.optional(5) is None else call.weight(5).reshaped((rows,))
    return [linear(call, call.view(0), weight, bias)]


def gather_block_quantized(call: Call) -> Outputs:
    call.allow("bits", "block_size", "gather_axis", "quantize_axis")
    codes, ids = call.weight(0), call.view(1)
    bits, block = call.attribute("bits", 4), call.attribute("block_size", 128)
    if ids.base.operator != "input_ids" or len(codes.shape) != 2 or call.attribute("gather_axis", 0):
        raise call.unsupported("anything but rows by token id")
    if call.attribute("quantize_axis", 1) not in (1, -1):
        raise call.unsupported("blocks along the rows")
    if codes.element == "u8":
        rows, columns = codes.shape[0], codes.shape[1] * 8 // bits
        zero = call.optional_weight(3)
        weight = matmul_nbits(codes, call.weight(2), zero, rows=rows, columns=columns, bits=bits, block=block)
    else:
        weight = dequantize_linear(codes, call.weight(2), call.optional_weight(3), axis=1, block=block)
    return [embedding(call, weight, ids)]


def dequantize(call: Call) -> Outputs:
    call.allow("axis", "block_size", "output_dtype")
    if not isinstance(call.inputs[0], Weight):
        raise call.unsupported("activations that are quantized")
    axis, block = call.attribute("axis", 1), call.attribute("block_size", 0)
    found = dequantize_linear(call.weight(0), _scales(call), call.optional_weight(2), axis=axis, block=block)
    return [found]


def _scales(call: Call) -> Weight:
    """Scales; a single one is a known number by now."""
    return call.weight(1)


# -- rotary embedding ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Tables:
    """Stored cos and sin (positions, rotary_dim / 2): position p is row p + offset."""

    cos: Array
    sin: Array
    offset: int
    interleaved: bool
    names: tuple[str, str]
    positions: str = ""
    """Name of the positions, where the operator is given them."""
    per_token: bool = False
    """The rows are those of the run's tokens."""


def _tables(call: Call, cos: int, sin: int, at: int, interleaved: bool) -> Tables:
    """Tables in the inputs ``cos`` and ``sin``, with positions in the input ``at`` if it is there."""
    positions = None if call.optional(at) is None else call.known(at)
    names = call.node.inputs[cos], call.node.inputs[sin]
    found = call.known(cos), call.known(sin)
    if found[0].ndim == 3 and positions is None:  # one row for each token already
        return Tables(found[0][0], found[1][0], -call.probe.past, interleaved, names, "", True)
    if found[0].ndim != 2 or found[0].shape != found[1].shape:
        raise call.unsupported(f"rotary tables of shapes {found[0].shape} and {found[1].shape}")
    expected = np.arange(call.probe.past, call.probe.total)
    offset = 0
    if positions is not None:
        given = positions.reshape(-1)
        if given.size == 1 and call.probe.tokens > 1:  # the first token's position
            given = given + np.arange(call.probe.tokens)
        if given.size != expected.size or (given - expected != given[0] - expected[0]).any():
            raise call.unsupported("positions that do not ascend")
        offset = int(given[0] - expected[0])
    name = "" if positions is None else call.node.inputs[at]
    return Tables(found[0], found[1], offset, interleaved, names, name)


def _rotate(call: Call, view: View, tables: Tables, head_dim: int) -> View:
    if tables.cos.shape[1] * 2 > head_dim:
        raise call.unsupported(f"tables for {tables.cos.shape[1] * 2} features and heads of {head_dim}")
    base = view.base
    if not view.is_whole and len(view.shape) == 3:
        base = features_of(view)
        view = View(base, view.shape)
    elif len(view.shape) == 4:
        view = narrowed(view)
        head_rows(view)
        base = view.base
    base = base.scaled(view.gain)
    if base.width % head_dim:
        raise call.unsupported(f"{base.width} features are no heads of {head_dim}")
    return view.on(call.term("rotary", (base,), base.shape, tables=tables, head_dim=head_dim))


def microsoft_rotary(call: Call) -> Outputs:
    call.allow("interleaved", "num_heads", "rotary_embedding_dim", "is_packed_batching", "scale")
    if call.attribute("is_packed_batching", 0) or call.attribute("scale", 1.0) != 1.0:
        raise call.unsupported("packed batching or a scale")
    view = call.view(0)
    tables = _tables(call, 2, 3, 1, bool(call.attribute("interleaved", 0)))
    return [_rotate(call, view, tables, _head_dim(call, view, tables))]


def standard_rotary(call: Call) -> Outputs:
    call.allow("interleaved", "num_heads", "rotary_embedding_dim")
    view = call.view(0)
    tables = _tables(call, 1, 2, 3, bool(call.attribute("interleaved", 0)))
    return [_rotate(call, view, tables, _head_dim(call, view, tables))]


def _head_dim(call: Call, view: View, tables: Tables) -> int:
    if len(view.shape) == 4:
        return view.shape[-1]
    heads = call.attribute("num_heads", 0)
    if heads:
        return int(view.shape[-1] // heads)
    return int(2 * tables.cos.shape[1])


# -- attention -----------------------------------------------------------------------------------------


def attention_term(
    call: Call, q: Term, k: Term, v: Term, *, heads: int, key_heads: int, head_dim: int, **values: Any
) -> Term:
    """Attention over (1, tokens, heads * head_dim), checked."""
    tokens = call.probe.tokens
    for term, count in ((q, heads), (k, key_heads), (v, key_heads)):
        if term.shape != (1, tokens, count * head_dim):
            raise call.unsupported(f"{count} heads of {head_dim} in features of shape {term.shape}")
    found = {
        "query": "",
        "query_pairs": None,
        "key_pairs": None,
        "masks": [],
        "window": None,
        "softcap": None,
        **values,
    }
    return call.term(
        "attention", (q, k, v), (1, tokens, heads * head_dim),
        heads=heads, key_heads=key_heads, head_dim=head_dim, **found,
    )  # fmt: skip


def _past(call: Call, at: int) -> Term | None:
    value = call.optional(at)
    if value is None:
        return None
    if not isinstance(value, View) or value.base.operator != "past" or not value.is_whole:
        raise call.unsupported("a cache that is no input of the model")
    return value.base


def _present(call: Call, attention: Term, pasts: tuple[Term | None, Term | None]) -> list[View]:
    """Outputs that carry the cache on."""
    return [
        View(call.term("present", (attention, *(() if past is None else (past,))), (1,)), (1,))
        for past in pasts
    ]


_GROUP_QUERY = (
    "num_heads", "kv_num_heads", "scale", "local_window_size", "softcap", "do_rotary", "rotary_interleaved",
    "qk_norm_epsilon", "sliding_window_cache", "smooth_softmax", "qk_output", "k_quant_type", "v_quant_type",
    "kv_cache_bit_width",
)  # fmt: skip


def group_query_attention(call: Call) -> Outputs:
    call.allow(*_GROUP_QUERY)
    for name in ("smooth_softmax", "qk_output"):
        if call.attribute(name, 0) not in (0, -1):
            raise call.unsupported(name)
    for at, what in (
        (10, "a bias on the scores"),
        (11, "sinks"),
        (12, "a quantized cache"),
        (13, "a quantized cache"),
    ):
        if call.optional(at) is not None:
            raise call.unsupported(what)
    probe = call.probe
    heads, key_heads = call.attribute("num_heads", 0), call.attribute("kv_num_heads", 0)
    if heads <= 0 or key_heads <= 0 or heads % key_heads:
        raise call.unsupported(f"{heads} heads and {key_heads} key heads")
    if (
        int(call.known(5).reshape(-1)[0]) != probe.total - 1
        or int(call.known(6).reshape(-1)[0]) != probe.total
    ):
        raise call.unsupported("lengths other than those of the attention mask")
    q, k, v, head_dim = _group_query_inputs(call, heads, key_heads)
    weights = call.optional(14), call.optional(15)
    if weights[0] is not None and weights[1] is not None:
        eps = _eps(call.attribute("qk_norm_epsilon", 1e-6))
        q, k = (
            call.term(
                "rms_norm",
                (x,),
                x.shape,
                weight=call.weight(at).reshaped((head_dim,)),
                eps=eps,
                group=head_dim,
            )
            for x, at in ((q, 14), (k, 15))
        )
    if call.attribute("do_rotary", 0):
        tables = _tables(call, 7, 8, 9, bool(call.attribute("rotary_interleaved", 0)))
        q, k = (call.term("rotary", (x,), x.shape, tables=tables, head_dim=head_dim) for x in (q, k))
    window = call.attribute("local_window_size", -1)
    pasts = _past(call, 3), _past(call, 4)
    term = attention_term(
        call, q, k, v, heads=heads, key_heads=key_heads, head_dim=head_dim,
        scale=_eps(call.attribute("scale", 0.0)) or None,
        softcap=_eps(call.attribute("softcap", 0.0)) or None,
        window=window if window > 0 else None, causal=True, caches=pasts,
    )  # fmt: skip
    return [View(term, term.shape), *_present(call, term, pasts)]


def _group_query_inputs(call: Call, heads: int, key_heads: int) -> tuple[Term, Term, Term, int]:
    q = features_of(call.view(0))
    if call.optional(1) is not None:
        if q.width % heads:
            raise call.unsupported(f"{q.width} features in {heads} heads")
        return q, features_of(call.view(1)), features_of(call.view(2)), q.width // heads
    if q.width % (heads + 2 * key_heads):
        raise call.unsupported(f"{q.width} features in {heads} and two times {key_heads} heads")
    head_dim = q.width // (heads + 2 * key_heads)
    ends = heads * head_dim, (heads + key_heads) * head_dim
    return q.slice(0, ends[0]), q.slice(ends[0], ends[1]), q.slice(ends[1], q.width), head_dim


def multi_head_attention(call: Call) -> Outputs:
    call.allow("num_heads", "scale", "mask_filter_value", "unidirectional")
    for at, what in ((3, "a bias"), (4, "a padding mask"), (8, "a shared cache"), (9, "a cache indirection")):
        if call.optional(at) is not None:
            raise call.unsupported(what)
    heads = call.attribute("num_heads", 0)
    q, k, v = (features_of(call.view(at)) for at in range(3))
    if heads <= 0 or q.width % heads:
        raise call.unsupported(f"{q.width} features in {heads} heads")
    pasts = _past(call, 6), _past(call, 7)
    masks = [] if call.optional(5) is None else [(call.node.inputs[5], None)]
    term = attention_term(
        call, q, k, v, heads=heads, key_heads=heads, head_dim=q.width // heads, masks=masks, caches=pasts,
        scale=_eps(call.attribute("scale", 0.0)) or None, causal=bool(call.attribute("unidirectional", 0)),
    )  # fmt: skip
    return [View(term, term.shape), *_present(call, term, pasts)]


_STANDARD = (
    "is_causal", "kv_num_heads", "q_num_heads", "qk_matmul_output_mode", "scale", "softcap",
    "softmax_precision",
)  # fmt: skip


def standard_attention(call: Call) -> Outputs:
    """Attention of opset 23 and on."""
    call.allow(*_STANDARD)
    if len(call.node.outputs) > 3 and call.node.outputs[3]:
        raise call.unsupported("an output of the scores")
    if call.optional(6) is not None:
        raise call.unsupported("a padding length")
    q, k, v = (_standard_heads(call, at) for at in range(3))
    pasts = _past(call, 4), _past(call, 5)
    caches: tuple[Term | None, Term | None] = pasts
    if (k.heads, k.head_dim) != (v.heads, v.head_dim) or v.pairs is not None or v.gain != 1.0:
        raise call.unsupported("keys and values of different heads")
    scale = call.attribute("scale", q.head_dim**-0.5) * q.gain * k.gain
    masks = [] if call.optional(3) is None else [(call.node.inputs[3], None)]
    held = [call.view(at).base for at in (1, 2)]
    if pasts == (None, None) and all(term.operator == "cache" for term in held):
        caches = held[0], held[1]
        if call.attribute("is_causal", 0):
            raise call.unsupported("is_causal counts from the first key where the cache is joined before")
    term = attention_term(
        call, q.term, k.term, v.term, heads=q.heads, key_heads=k.heads, head_dim=q.head_dim, masks=masks,
        scale=_eps(scale), softcap=_eps(call.attribute("softcap", 0.0)) or None, caches=caches,
        query=call.node.inputs[0],
        causal=bool(call.attribute("is_causal", 0)), query_pairs=q.pairs, key_pairs=k.pairs,
    )  # fmt: skip
    tokens = call.probe.tokens
    if len(call.view(0).shape) == 3:
        made = View(term, term.shape)
    else:
        shape = (1, q.heads, tokens, q.head_dim)
        made = View(term, shape, lambda: [(by_heads(q.heads, tokens, q.head_dim, shape), None)])
    return [made, *_present(call, term, pasts)]


def _standard_heads(call: Call, at: int) -> Heads:
    from nybble.formats.onnx.recognise.arithmetic import keys_of

    view = call.view(at)
    if len(view.shape) == 4:
        return heads_of(view, call.probe.tokens) if at == 0 else keys_of(call, view)
    heads = call.attribute("kv_num_heads" if at else "q_num_heads", 0)
    term = features_of(view)
    if heads <= 0 or term.width % heads:
        raise call.unsupported(f"{term.width} features in {heads} heads")
    return Heads(term, heads, term.width // heads, 1.0, None)


RULES: Mapping[tuple[str, str], Rule] = {
    ("", "SimplifiedLayerNormalization"): rms_norm,
    ("", "RMSNormalization"): rms_norm,
    ("com.microsoft", "SimplifiedLayerNormalization"): rms_norm,
    ("com.microsoft", "SkipSimplifiedLayerNormalization"): skip_rms_norm,
    ("com.microsoft", "MatMulNBits"): matmul_n_bits,
    ("com.microsoft", "GatherBlockQuantized"): gather_block_quantized,
    ("", "DequantizeLinear"): dequantize,
    ("com.microsoft", "DequantizeLinear"): dequantize,
    ("com.microsoft", "RotaryEmbedding"): microsoft_rotary,
    ("", "RotaryEmbedding"): standard_rotary,
    ("com.microsoft", "GroupQueryAttention"): group_query_attention,
    ("com.microsoft", "MultiHeadAttention"): multi_head_attention,
    ("", "Attention"): standard_attention,
}
__all__ = ["RULES", "Known", "Tables", "Value"]
