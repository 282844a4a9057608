"""The operators' definition: each one in plain NumPy, float32.

Every device's kernels are tested against these functions. A value is a matrix (tokens, width);
the tokens of several sequences lie one after another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from nybble.graph.graph import SEQUENCE_SCALE_MULTIPLE

Floats = npt.NDArray[np.float32]

QUERY_BLOCK = 256
"""Queries that attention takes at once: bounds the memory of the scores, changes nothing else."""


def embedding(tokens: npt.NDArray[np.int64], weight: Floats, scale: float = 1.0) -> Floats:
    """Rows of ``weight`` (vocab_size, width) picked by ``tokens`` (n), times ``scale``."""
    return weight[tokens] * np.float32(scale)


def linear(x: Floats, weight: Floats, bias: Floats | None = None) -> Floats:
    """x @ weight.T + bias. x: (n, in_features), weight: (out_features, in_features)."""
    y = x @ weight.T
    return y if bias is None else y + bias


def rms_norm(x: Floats, weight: Floats, eps: float, offset: float, group: int) -> Floats:
    """x / sqrt(mean(x**2) + eps) * (weight + offset), the mean over each ``group`` columns."""
    groups = x.reshape(len(x), x.shape[1] // group, group)
    mean = np.mean(groups * groups, axis=-1, keepdims=True, dtype=np.float32)
    normal = groups / np.sqrt(mean + np.float32(eps))
    return (normal * (weight + np.float32(offset))).reshape(x.shape)


def rotary(
    x: Floats,
    positions: npt.NDArray[np.int64],
    inverse_frequencies: Floats,
    factor: float,
    *,
    head_dim: int,
    interleaved: bool,
) -> Floats:
    """Turns pairs of features of each head by position * inverse_frequency.

    x: (n, heads * head_dim), positions: (n), inverse_frequencies: (rotary_dim / 2) as
    ``rotary_frequencies`` gives them. Pair i is features i and i + rotary_dim/2, or 2i and 2i + 1
    when interleaved. Features from rotary_dim on stay. ``factor`` multiplies cos and sin.
    """
    half = len(inverse_frequencies)
    angles = positions.astype(np.float32)[:, None] * inverse_frequencies
    cos = (np.cos(angles) * np.float32(factor))[:, None, :]
    sin = (np.sin(angles) * np.float32(factor))[:, None, :]
    heads = x.reshape(len(x), x.shape[1] // head_dim, head_dim)
    first = slice(0, 2 * half, 2) if interleaved else slice(0, half)
    second = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
    a, b = heads[..., first], heads[..., second]
    turned = heads.copy()
    turned[..., first] = a * cos - b * sin
    turned[..., second] = b * cos + a * sin
    return turned.reshape(x.shape)


def attention(
    q: Floats,
    keys: Floats,
    values: Floats,
    *,
    head_dim: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Floats:
    """Causal attention of one sequence.

    q: (n, heads * head_dim) of the last n tokens; keys and values: (length, key_value_heads *
    head_dim) of all tokens. The query at position p sees keys max(0, p - window + 1) .. p. Scores
    are q.k * scale, then cap * tanh(score / cap) where capped, then softmax.

    Returns:
        (n, heads * head_dim).
    """
    length, new = len(keys), len(q)
    key_heads = keys.shape[1] // head_dim
    k = keys.reshape(length, key_heads, head_dim).transpose(1, 2, 0)  # (key_value_heads, head_dim, length)
    v = values.reshape(length, key_heads, head_dim).transpose(1, 0, 2)
    repeats = q.shape[1] // keys.shape[1]
    queries = q.reshape(new, len(k), repeats, head_dim).transpose(1, 2, 0, 3)
    result = np.empty((new, len(k), repeats, head_dim), np.float32)
    at = np.arange(length)
    for start in range(0, new, QUERY_BLOCK):
        block = queries[:, :, start : start + QUERY_BLOCK]
        scores = (block @ k[:, None]) * np.float32(scale)
        if softcap is not None:
            scores = softcap_logits(scores, softcap)
        position = length - new + start + np.arange(block.shape[2])[:, None]
        hidden = at > position
        if window is not None:
            hidden |= at <= position - window
        scores = np.where(hidden, np.float32(-np.inf), scores)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        result[start : start + QUERY_BLOCK] = (weights @ v[:, None]).transpose(2, 0, 1, 3)
    return result.reshape(q.shape)


def softcap_logits(x: Floats, cap: float) -> Floats:
    """cap * tanh(x / cap): keeps values between -cap and cap."""
    return np.tanh(x / np.float32(cap)) * np.float32(cap)


def silu(x: Floats) -> Floats:
    """x * sigmoid(x)."""
    # tanh does not overflow where exp would.
    half = np.float32(0.5)
    return x * (half * (np.tanh(x * half) + 1))


def gelu(x: Floats) -> Floats:
    """x * (1 + erf(x / sqrt(2))) / 2, exactly."""
    erf = np.frompyfunc(math.erf, 1, 1)(x * math.sqrt(0.5)).astype(np.float32)
    return x * np.float32(0.5) * (1 + erf)


def gelu_pytorch_tanh(x: Floats) -> Floats:
    """x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3))) / 2 (arXiv:1606.08415)."""
    inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
    return x * np.float32(0.5) * (1 + np.tanh(inner))


ACTIVATIONS: Mapping[str, Callable[[Floats], Floats]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_pytorch_tanh": gelu_pytorch_tanh,
}


def gated_activation(gate: Floats, up: Floats, kind: str) -> Floats:
    """activation(gate) * up; both (n, intermediate_size)."""
    return ACTIVATIONS[kind](gate) * up


def add(a: Floats, b: Floats) -> Floats:
    """a + b; both (n, width)."""
    return a + b


def scale(x: Floats, factor: float) -> Floats:
    """x * factor."""
    return x * np.float32(factor)


def split(x: Floats, widths: Sequence[int]) -> list[Floats]:
    """Neighbouring column ranges of x."""
    ends = np.cumsum(widths)[:-1]
    return np.split(x, ends, axis=1)


def gather_columns(x: Floats, columns: npt.NDArray[np.int32]) -> Floats:
    """Column i of the result is column ``columns[i]`` of x; columns: (width,), each one once."""
    return x[:, columns]


def scale_by_sequence(x: Floats, weights: Floats, slots: npt.NDArray[np.int32], scales: Floats) -> Floats:
    """Column i times scales[i] * weights[:, slots[i]]; 0 where that factor is 0.

    x: (n, width), weights: (n, adapters) of each row's sequence, slots and scales: (width,).

    Returns:
        (n, width rounded up to a multiple of SEQUENCE_SCALE_MULTIPLE), zeros at the end.
    """
    factors = weights[:, slots] * scales
    with np.errstate(all="ignore"):
        scaled = np.where(factors == 0, np.float32(0), x * factors)
    return np.pad(scaled, ((0, 0), (0, -x.shape[1] % SEQUENCE_SCALE_MULTIPLE)))


def select_rows(x: Floats, rows: npt.NDArray[np.int64]) -> Floats:
    """The rows whose logits the batch asks for, in order."""
    return x[rows]
