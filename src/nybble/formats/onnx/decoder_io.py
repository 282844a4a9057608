"""DecoderIO: what the inputs and outputs of an ONNX decoder mean, so that it can be run as it is.

Names come from ``genai_config.json`` where there is one, else from the usual ones (onnxruntime-genai's
model builder, optimum, transformers.js). Nothing of the graph's mathematics is recognised.
Source: https://onnxruntime.ai/docs/genai/reference/config.html.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from nybble.errors import FormatError, UnsupportedError
from nybble.formats.fields import Fields
from nybble.formats.onnx.switch import Switch, length_switch

if TYPE_CHECKING:
    import onnx

ELEMENT_TYPES = {
    1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 16: "bfloat16",
}  # fmt: skip
"""TensorProto's element types that decoders have at their border, by NumPy's name."""

CACHE_TYPES = ("float32", "float16", "int8", "uint8")

USUAL_INPUTS = {
    "input_ids": "input_ids",
    "attention_mask": "attention_mask",
    "position_ids": "position_ids",
    "num_logits_to_keep": "num_logits_to_keep",
    "logits_to_keep": "num_logits_to_keep",
    "use_cache_branch": "use_cache_branch",
}
"""Roles by the usual name."""

GENAI_INPUTS = ("input_ids", "attention_mask", "position_ids")
"""Roles that ``genai_config.json`` may rename."""

USUAL_CACHES = (
    ("past_key_values.%d.key", "past_key_values.%d.value", "present.%d.key", "present.%d.value"),
    (
        "past_key_values.%d.key",
        "past_key_values.%d.value",
        "present_key_values.%d.key",
        "present_key_values.%d.value",
    ),
    ("past_key_%d", "past_value_%d", "present_key_%d", "present_value_%d"),
    ("past_key_self_%d", "past_value_self_%d", "present_key_self_%d", "present_value_self_%d"),
)
"""Names of past keys, past values, present keys and present values."""


@dataclass(frozen=True)
class Port:
    """One input or output: its name, element type and declared shape (a name or None: any size)."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]


@dataclass(frozen=True)
class CachePort:
    """One cache: keys or values of one layer, (1, ``heads``, length, ``width``).

    ``window``: the model keeps this many of the last positions, wherever it likes in a buffer that is at
    least as long (``sliding_window_cache``); None: all of them, each at its place.
    """

    past: str
    present: str
    dtype: str
    heads: int
    width: int
    window: int | None = None


@dataclass(frozen=True)
class DecoderIO:
    """How to call a decoder for one sequence.

    ``inputs`` are by role (``input_ids``, ``attention_mask``, ...). ``shares_buffers``: past and
    present of every cache may be one buffer, longer than what it holds. ``switch``: the graph
    computes other keys for sequences longer than this (LongRoPE); None: it does not.
    ``last_row_only``: logits of the last token alone come out.
    """

    inputs: Mapping[str, Port]
    logits: Port
    caches: tuple[CachePort, ...]
    shares_buffers: bool
    switch: Switch | None
    vocab_size: int
    context_length: int | None

    @property
    def last_row_only(self) -> bool:
        """Whether the graph keeps one row of logits however many tokens it gets."""
        return self.logits.shape[1] == 1


def decoder_io(graph: onnx.GraphProto, genai: Mapping[str, object], where: str) -> DecoderIO:
    """Find out how to call a decoder.

    Args:
        graph: the main graph; weights are not needed.
        genai: the parsed ``genai_config.json``; empty where there is none.
        where: the model's file, for messages.

    Raises:
        FormatError: genai_config.json and the graph do not fit together.
        UnsupportedError: an input that nybble does not know how to fill, or a shape that is fixed
            where it has to grow.
    """
    model = Fields(genai, where).fields("model")
    decoder = model.fields("decoder")
    constants = {tensor.name for tensor in graph.initializer}
    ports = {value.name: _port(value, where) for value in graph.input if value.name not in constants}
    outputs = {value.name: _port(value, where) for value in graph.output}
    roles = _roles(decoder, ports)
    caches = _with_windows(_caches(decoder, ports, outputs, where), graph, where)
    used = {port.name for port in roles.values()} | {cache.past for cache in caches}
    if unknown := sorted(set(ports) - used):
        raise UnsupportedError(
            f"{where}: nybble does not know how to fill the input{'s' if len(unknown) > 1 else ''}"
            f" {', '.join(unknown[:8])}; it runs decoders with"
            f" {', '.join(sorted(set(USUAL_INPUTS.values())))} and key/value caches"
        )
    if "input_ids" not in roles:
        raise UnsupportedError(f"{where}: has no input input_ids; nybble runs decoders of token ids")
    _check_lengths(roles, where)
    logits = _logits(decoder, outputs, where)
    vocab_size = logits.shape[2] if isinstance(logits.shape[2], int) else model.integer("vocab_size", None)
    if vocab_size is None:
        raise UnsupportedError(f"{where}: neither the logits' shape nor genai_config.json tells vocab_size")
    shares_buffers = _shares_buffers(graph, genai, caches, where)
    if not shares_buffers and any(cache.window for cache in caches):
        raise UnsupportedError(
            f"{where}: caches of sliding layers keep their window only, but past and present may not share"
            " buffers (past_present_share_buffer)"
        )
    return DecoderIO(
        inputs=roles,
        logits=logits,
        caches=caches,
        shares_buffers=shares_buffers,
        switch=length_switch(graph, {port.name: role for role, port in roles.items()}, where),
        vocab_size=vocab_size,
        context_length=model.integer("context_length", None),
    )


def _port(value: onnx.ValueInfoProto, where: str) -> Port:
    tensor = value.type.tensor_type
    dtype = ELEMENT_TYPES.get(tensor.elem_type)
    if dtype is None:
        raise UnsupportedError(
            f"{where}: {value.name} has element type {tensor.elem_type}; known:"
            f" {', '.join(ELEMENT_TYPES.values())}"
        )
    shape = tuple(
        int(size.dim_value) if size.HasField("dim_value") else (size.dim_param or None)
        for size in tensor.shape.dim
    )
    return Port(value.name, dtype, shape)


def _roles(decoder: Fields, ports: Mapping[str, Port]) -> dict[str, Port]:
    names = dict(USUAL_INPUTS)
    given = decoder.fields("inputs")
    for role in GENAI_INPUTS:
        if given.has(role):
            names = {name: r for name, r in names.items() if r != role}
            names[given.string(role)] = role
    return {role: ports[name] for name, role in names.items() if name in ports}


def _caches(
    decoder: Fields, ports: Mapping[str, Port], outputs: Mapping[str, Port], where: str
) -> tuple[CachePort, ...]:
    inputs, results = decoder.fields("inputs"), decoder.fields("outputs")
    candidates: Sequence[tuple[str, str, str, str]] = USUAL_CACHES
    if inputs.has("past_names"):
        raise inputs.unsupported("past_names", "means caches that hold keys and values together: not known")
    if inputs.has("past_key_names"):
        candidates = (
            (
                inputs.string("past_key_names"),
                inputs.string("past_value_names"),
                results.string("present_key_names"),
                results.string("present_value_names"),
            ),
        )
    for templates in candidates:
        layers = _layers(templates[0], ports)
        if layers and (len(candidates) == 1 or templates[2].replace("%d", str(layers[0])) in outputs):
            break
    else:
        raise UnsupportedError(
            f"{where}: has no inputs such as {candidates[0][0].replace('%d', '0')}; nybble runs"
            " decoders that take and give key/value caches (export with past_key_values)"
        )
    found = []
    for layer in layers:
        for past, present in ((templates[0], templates[2]), (templates[1], templates[3])):
            names = (past.replace("%d", str(layer)), present.replace("%d", str(layer)))
            if names[0] not in ports or names[1] not in outputs:
                raise FormatError(
                    f"{where}: layer {layer} lacks the input {names[0]} or the output {names[1]}"
                )
            found.append(_cache(ports[names[0]], outputs[names[1]], decoder, where))
    return tuple(found)


def _layers(template: str, ports: Mapping[str, Port]) -> list[int]:
    before, mark, after = template.partition("%d")
    if not mark or "%" in before + after:
        return []
    pattern = re.compile(re.escape(before) + r"(\d{1,4})" + re.escape(after))
    return sorted(int(match[1]) for match in map(pattern.fullmatch, ports) if match)


def _cache(past: Port, present: Port, decoder: Fields, where: str) -> CachePort:
    if past.dtype != present.dtype:
        raise FormatError(f"{where}: {past.name} is {past.dtype} and {present.name} is {present.dtype}")
    if past.dtype not in CACHE_TYPES:
        raise UnsupportedError(f"{where}: {past.name} is {past.dtype}; known: {', '.join(CACHE_TYPES)}")
    if len(past.shape) != 4 or len(present.shape) != 4:
        raise UnsupportedError(
            f"{where}: {past.name} has shape {past.shape}; (batch, heads, length, width) is needed"
        )
    if isinstance(past.shape[0], int) and past.shape[0] != 1:
        raise UnsupportedError(
            f"{where}: {past.name} has a fixed batch of {past.shape[0]}; 1 or any is needed"
        )
    if isinstance(past.shape[2], int):
        raise UnsupportedError(f"{where}: {past.name} has a fixed length of {past.shape[2]}; it has to grow")
    heads, width = past.shape[1], past.shape[3]
    if not isinstance(heads, int):
        heads = decoder.integer("num_key_value_heads")
    if not isinstance(width, int):
        width = decoder.integer("head_size")
    if not 0 < heads <= 65536 or not 0 < width <= 65536:
        raise FormatError(f"{where}: {past.name} has {heads} heads of {width}, which makes no sense")
    return CachePort(past.name, present.name, past.dtype, heads, width)


def _with_windows(caches: Sequence[CachePort], graph: onnx.GraphProto, where: str) -> tuple[CachePort, ...]:
    """The caches, with the windows of those that attention keeps short."""
    windows: dict[str, int] = {}
    for node in graph.node:
        if node.op_type != "GroupQueryAttention" or len(node.input) < 5:
            continue
        values = {attribute.name: attribute.i for attribute in node.attribute}
        if values.get("sliding_window_cache"):
            window = values.get("local_window_size", -1)
            if not 0 < window <= 1 << 24:
                raise FormatError(f"{where}: {node.name} keeps a window of {window} positions")
            windows |= dict.fromkeys(node.input[3:5], window)
    return tuple(replace(cache, window=windows.get(cache.past)) for cache in caches)


def _check_lengths(roles: Mapping[str, Port], where: str) -> None:
    for role in ("input_ids", "attention_mask", "position_ids"):
        port = roles.get(role)
        if port is None:
            continue
        if port.dtype not in ("int64", "int32"):
            raise UnsupportedError(f"{where}: {port.name} is {port.dtype}; int64 or int32 is needed")
        rank = 3 if role == "position_ids" and len(port.shape) == 3 else 2
        if len(port.shape) != rank or isinstance(port.shape[-1], int):
            raise UnsupportedError(f"{where}: {port.name} has shape {port.shape}; any length is needed")
        if isinstance(port.shape[-2], int) and port.shape[-2] != 1:
            raise UnsupportedError(f"{where}: {port.name} has a fixed batch of {port.shape[-2]}; 1 is needed")


def _logits(decoder: Fields, outputs: Mapping[str, Port], where: str) -> Port:
    name = decoder.fields("outputs").string("logits", "logits")
    port = outputs.get(name)
    if port is None:
        raise FormatError(f"{where}: has no output {name}")
    if len(port.shape) != 3 or port.dtype not in ("float32", "float16"):
        raise UnsupportedError(
            f"{where}: {name} is {port.dtype} of shape {port.shape}; float32 or float16 (batch, length,"
            " vocabulary) is needed"
        )
    return port


def _shares_buffers(
    graph: onnx.GraphProto, genai: Mapping[str, object], caches: Sequence[CachePort], where: str
) -> bool:
    """Whether each cache goes in and out of one GroupQueryAttention, which writes in place."""
    search = Fields(genai, where).fields("search")
    if genai and not search.boolean("past_present_share_buffer", False):
        return False
    pairs = set()
    for node in graph.node:
        if node.op_type == "GroupQueryAttention" and len(node.input) > 4 and len(node.output) > 2:
            pairs.add((node.input[3], node.output[1]))
            pairs.add((node.input[4], node.output[2]))
    return all((cache.past, cache.present) in pairs for cache in caches)
