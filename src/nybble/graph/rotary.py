"""Rotary position embedding: the angle of each pair of features, for every kind of scaling.

Sources: RoFormer (arXiv:2104.09864); linear: arXiv:2306.15595; dynamic: NTK-aware scaling as in
transformers; llama3: Llama 3.1's reference code; longrope: arXiv:2402.13753; yarn:
arXiv:2309.00071. Values follow transformers' ``modeling_rope_utils.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from nybble.checkpoint.config import RopeConfig
from nybble.errors import FormatError

Floats = npt.NDArray[np.float64]


def rotary_frequencies(rope: RopeConfig, sequence_length: int) -> tuple[npt.NDArray[np.float32], float]:
    """Inverse frequencies and the factor on cos and sin.

    ``sequence_length`` is the whole length of the sequence, cached tokens included: longrope takes
    its long divisors when it is above ``original_max_position_embeddings``, dynamic grows theta
    with it, all others ignore it. Pair i of a token at position p is turned by
    p * inverse_frequency[i]; cos and sin are multiplied by the factor.

    Returns:
        float32 (rotary_dim / 2), and a float.

    Raises:
        FormatError: divisors of another length than rotary_dim / 2, or a constant that the kind
            needs is missing or makes no sense.
    """
    exponents = np.arange(0, rope.rotary_dim, 2, dtype=np.float64) / rope.rotary_dim
    frequencies, factor = _KINDS[rope.kind](rope, exponents, sequence_length)
    if rope.frequency_factors:
        frequencies = frequencies / _divisors(rope.frequency_factors, rope, "frequency_factors")
    if rope.attention_factor is not None:
        factor = rope.attention_factor
    return frequencies.astype(np.float32), factor


def is_long(rope: RopeConfig, sequence_length: int) -> bool:
    """Whether longrope uses its long divisors for a sequence of this length; else False."""
    return rope.kind == "longrope" and sequence_length > _original(rope)


def _default(rope: RopeConfig, exponents: Floats, length: int) -> tuple[Floats, float]:
    return rope.theta**-exponents, 1.0


def _linear(rope: RopeConfig, exponents: Floats, length: int) -> tuple[Floats, float]:
    return rope.theta**-exponents / rope.factor, 1.0


def _dynamic(rope: RopeConfig, exponents: Floats, length: int) -> tuple[Floats, float]:
    original = _original(rope)
    if rope.rotary_dim <= 2:
        raise FormatError("rope: dynamic scaling needs a rotary_dim above 2")
    growth = rope.factor * max(length, original) / original - (rope.factor - 1)
    theta = rope.theta * growth ** (rope.rotary_dim / (rope.rotary_dim - 2))
    return theta**-exponents, 1.0


def _llama3(rope: RopeConfig, exponents: Floats, length: int) -> tuple[Floats, float]:
    """Long wavelengths are stretched by ``factor``, short ones kept, those between interpolated."""
    original = _original(rope)
    if not 0 < rope.low_freq_factor < rope.high_freq_factor:
        raise FormatError(
            f"rope: low_freq_factor {rope.low_freq_factor} must be above 0"
            f" and below high_freq_factor {rope.high_freq_factor}"
        )
    frequencies = rope.theta**-exponents
    turns = original * frequencies / (2 * math.pi)  # over the original context
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return (1 - smooth) * frequencies / rope.factor + smooth * frequencies, 1.0


def _longrope(rope: RopeConfig, exponents: Floats, length: int) -> tuple[Floats, float]:
    original = _original(rope)
    name = "long_factor" if is_long(rope, length) else "short_factor"
    divisors = _divisors(getattr(rope, name), rope, name)
    if rope.factor > 1 and original < 2:
        raise FormatError("rope: longrope needs original_max_position_embeddings above 1")
    factor = math.sqrt(1 + math.log(rope.factor) / math.log(original)) if rope.factor > 1 else 1.0
    return rope.theta**-exponents / divisors, factor


def _yarn(rope: RopeConfig, exponents: Floats, length: int) -> tuple[Floats, float]:
    """Between the pairs that turn beta_slow and beta_fast times, a ramp from stretched to kept."""
    original, half = _original(rope), len(exponents)
    if rope.theta <= 1:
        raise FormatError(f"rope: yarn needs a theta above 1, not {rope.theta}")

    def pair_that_turns(times: float) -> float:
        return rope.rotary_dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = max(math.floor(pair_that_turns(rope.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(rope.beta_slow)), rope.rotary_dim - 1)
    ramp = np.clip((np.arange(half) - low) / max(high - low, 0.001), 0.0, 1.0)
    frequencies = rope.theta**-exponents
    stretched = ramp * frequencies / rope.factor + (1 - ramp) * frequencies
    if rope.mscale and rope.mscale_all_dim:
        return stretched, _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    return stretched, _mscale(rope.factor, 1.0)


def _mscale(factor: float, multiplier: float) -> float:
    return 0.1 * multiplier * math.log(factor) + 1.0 if factor > 1 else 1.0


_KINDS: Mapping[str, Callable[[RopeConfig, Floats, int], tuple[Floats, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "longrope": _longrope,
    "yarn": _yarn,
}


def _original(rope: RopeConfig) -> int:
    if rope.original_max_position_embeddings is None:
        raise FormatError(f"rope: {rope.kind} scaling needs original_max_position_embeddings")
    return rope.original_max_position_embeddings


def _divisors(values: tuple[float, ...], rope: RopeConfig, name: str) -> Floats:
    if len(values) != rope.rotary_dim // 2:
        raise FormatError(f"rope: {name} has {len(values)} values; {rope.rotary_dim // 2} are needed")
    return np.asarray(values, np.float64)
