"""Llama 3's rotary scaling in its two spellings: four parameters, or one divisor for each frequency.

Hugging Face's config.json has the parameters; GGUF's ``rope_freqs.weight`` has the divisors that
llama.cpp's converter computes from them (``LlamaModel.generate_extra_tensors``). Source of the rule:
Llama 3.1's reference code, ``apply_scaling``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from nybble.checkpoint.config import RopeConfig

TOLERANCE = 1e-5
"""Relative difference of divisors: those in files were computed in float32."""
_CONTEXTS = (8192, *(2**power for power in range(4, 21) if power != 13))
"""Trained context lengths to try: Llama 3's own first."""
_LIMITS = ((1.0, 4.0), (1.0, 2.0), (1.0, 8.0), (1.0, 32.0))
"""low_freq_factor and high_freq_factor to try."""


def llama3_divisors(rope: RopeConfig) -> tuple[float, ...]:
    """The divisor of each inverse frequency, rounded to float32: rotary_dim / 2 values.

    ``rope`` is of the kind ``llama3``.
    """
    assert rope.original_max_position_embeddings is not None
    exponents = np.arange(0, rope.rotary_dim, 2, dtype=np.float64) / rope.rotary_dim
    turns = rope.original_max_position_embeddings * rope.theta**-exponents / (2 * math.pi)
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    divisors = 1 / ((1 - smooth) / rope.factor + smooth)
    return tuple(divisors.astype(np.float32).tolist())


def with_llama3_parameters(rope: RopeConfig, *, hint: int | None = None) -> RopeConfig | None:
    """``rope`` with the parameters that its ``frequency_factors`` were made from, or None.

    Parameters are tried, not solved for: only those that give every divisor back to 1e-5 count.
    ``hint`` is a context length to try first.
    """
    given = np.asarray(rope.frequency_factors, np.float64)
    for candidate in _candidates(rope, float(given.max()), hint):
        made = np.asarray(llama3_divisors(candidate), np.float64)
        if np.allclose(made, given, rtol=TOLERANCE, atol=0):
            return candidate
    return None


def matches(rope: RopeConfig, divisors: tuple[float, ...]) -> bool:
    """Whether the divisors are those of ``rope``, a llama3 one."""
    made = llama3_divisors(rope)
    return len(made) == len(divisors) and np.allclose(made, divisors, rtol=TOLERANCE, atol=0)


def _candidates(rope: RopeConfig, largest: float, hint: int | None) -> Iterator[RopeConfig]:
    contexts = _CONTEXTS if hint is None else (hint, *_CONTEXTS)
    for factor in dict.fromkeys((largest, 8.0, 32.0)):
        for context in contexts:
            for low, high in _LIMITS:
                yield replace(
                    rope,
                    kind="llama3",
                    factor=factor,
                    low_freq_factor=low,
                    high_freq_factor=high,
                    original_max_position_embeddings=context,
                    frequency_factors=(),
                )
