"""GenerationOptions: every choice that a caller has about generated text, checked once.

The defaults are llama.cpp's; a model whose file recommends other values brings its own
(``recommended_options``), and what the caller passes wins over both.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class GenerationOptions:
    """How to generate. Raises ValueError that names the option, the value and what is allowed.

    ``temperature=0`` is greedy: always the most probable token (lowest id where two are equal).
    Order in which the samplers act: logit bias, penalties, DRY, top-n-sigma, top-k, typical, top-p,
    min-p, XTC, temperature; with mirostat: logit bias, penalties, DRY, temperature, mirostat.
    """

    max_tokens: int | None = None
    """Most new tokens. None: until the model ends its answer or the context is full; for raw text
    (``generate``, ``stream``, ``complete``), which may never end by itself, 256."""
    min_tokens: int = 0
    """Tokens before which the model may not end its answer by itself."""
    temperature: float = 0.8
    """Divides the logits before the draw; 0: greedy."""
    top_k: int = 40
    """Keep the k most probable tokens; 0: all."""
    top_p: float = 0.95
    """Keep the fewest tokens whose probabilities add up to this; 1: all."""
    min_p: float = 0.05
    """Keep tokens at least this times as probable as the most probable one; 0: all."""
    typical_p: float = 1.0
    """Keep tokens of typical surprise until their probabilities add up to this; 1: all."""
    top_n_sigma: float = 0.0
    """Keep logits within this many standard deviations of the largest; 0: all."""
    xtc_probability: float = 0.0
    """How often XTC removes the top choices; 0: never."""
    xtc_threshold: float = 0.1
    """XTC removes tokens at least this probable, except the least probable of them."""
    dry_multiplier: float = 0.0
    """Strength of the DRY penalty on repeated phrases; 0: none."""
    dry_base: float = 1.75
    """DRY's penalty is multiplier * base ** (repeated length - allowed length)."""
    dry_allowed_length: int = 2
    """Repeats shorter than this many tokens are free."""
    dry_penalty_last_n: int = -1
    """Tokens in which DRY looks for repeats; -1: all, 0: none."""
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    """A token that contains one of these strings ends a repeat and is never penalised."""
    mirostat: int = 0
    """2: mirostat version 2, in place of the samplers that cut the distribution; 0: off."""
    mirostat_tau: float = 5.0
    """Surprise that mirostat aims at, in bits."""
    mirostat_eta: float = 0.1
    """Learning rate of mirostat."""
    repetition_penalty: float = 1.0
    """Divides positive logits (multiplies negative ones) of recent tokens; 1: none."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of each recent token."""
    frequency_penalty: float = 0.0
    """Subtracted from the logit of each recent token, once for each time it occurs."""
    penalty_last_n: int = 64
    """Recent tokens, the prompt's included, that these three look at; -1: all, 0: none."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids; -inf forbids a token."""
    seed: int | None = None
    """Same seed, same text. None: a new one, reported in the reply."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are not part of it. A single string is one stop string."""
    stop_tokens: tuple[int, ...] = ()
    """Token ids that end the text, besides the model's own."""
    ignore_eos: bool = False
    """Forbid the model to end its answer."""
    logprobs: int | None = None
    """Report the log-probability of each token and of this many most probable ones; None: none."""
    n: int = 1
    """Completions of one prompt; the prompt is computed once."""
    adapters: Mapping[str, float] | None = None
    """Weights of the LoRA adapters that the model was loaded with, by name; those that are not named are
    off. None: as they were loaded (each at 1, unless ``load`` said otherwise)."""
    reuse_prefix: bool | None = None
    """Reuse the cached tokens that this prompt shares with an earlier one. None: in chats only,
    because a reused cache may round differently from a fresh one (never more than that)."""
    trust_content: bool = False
    """Chats: let text such as ``<|im_end|>`` in the messages of users and tools act as the special
    token. False encodes it as plain text, so that nobody can forge a turn."""

    def __post_init__(self) -> None:
        for name in ("stop", "dry_sequence_breakers"):
            object.__setattr__(self, name, _strings(name, getattr(self, name)))
        object.__setattr__(self, "stop_tokens", tuple(_integer("stop_tokens", t) for t in self.stop_tokens))
        object.__setattr__(self, "logit_bias", _bias(self.logit_bias))
        object.__setattr__(self, "adapters", _adapters(self.adapters))
        for name, (low, high) in _INTEGERS.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            object.__setattr__(self, name, _checked(name, _integer(name, value), low, high))
        for name, (least, most) in _NUMBERS.items():
            object.__setattr__(self, name, _checked(name, _number(name, getattr(self, name)), least, most))
        if self.repetition_penalty == 0:
            raise ValueError("repetition_penalty must be above 0 (1 means none)")
        if self.mirostat == 1:
            raise ValueError("mirostat must be 0 (off) or 2: version 1 is not offered, 2 replaces it")

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always taken: temperature 0, or too small to divide by."""
        return self.temperature < 1e-5

    def updated(self, changes: Mapping[str, Any]) -> GenerationOptions:
        """These options with some replaced.

        Raises:
            TypeError: an option does not exist; the message suggests the closest name.
            ValueError: a value is out of range.
        """
        known = [option.name for option in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {close[0]}?" if close else f"; options are {', '.join(known)}"
                raise TypeError(f"unknown generation option {name!r}{hint}")
        return dataclasses.replace(self, **changes)


_OPTIONAL = {"max_tokens", "seed", "logprobs"}
_INTEGERS: dict[str, tuple[int, int]] = {
    "max_tokens": (1, 2**31),
    "min_tokens": (0, 2**31),
    "top_k": (0, 2**31),
    "dry_allowed_length": (1, 2**31),
    "dry_penalty_last_n": (-1, 2**31),
    "mirostat": (0, 2),
    "penalty_last_n": (-1, 2**31),
    "seed": (0, 2**64 - 1),
    "logprobs": (0, 1000),
    "n": (1, 1024),
}
_NUMBERS: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 1e6),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "typical_p": (0.0, 1.0),
    "top_n_sigma": (0.0, 1e6),
    "xtc_probability": (0.0, 1.0),
    "xtc_threshold": (0.0, 1.0),
    "dry_multiplier": (0.0, 1e6),
    "dry_base": (1.0, 1e6),
    "mirostat_tau": (0.0, 1e6),
    "mirostat_eta": (0.0, 1.0),
    "repetition_penalty": (0.0, 1e6),
    "presence_penalty": (-1e6, 1e6),
    "frequency_penalty": (-1e6, 1e6),
}


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    return int(value)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise ValueError(f"{name} must be a number, got {value!r}")
    return float(value)


def _checked(name: str, value: Any, low: float, high: float) -> Any:
    if not low <= value <= high:  # also refuses NaN
        raise ValueError(f"{name} must be between {low} and {high}, got {value!r}")
    return value


def _strings(name: str, value: str | Sequence[str] | None) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else tuple(value or ())
    for string in strings:
        if not isinstance(string, str) or not string:
            raise ValueError(f"{name} must be strings that are not empty, got {string!r}")
    return strings


def _adapters(value: Mapping[str, float] | None) -> dict[str, float] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise ValueError(f"adapters must be weights by name, such as {{'pirate': 1.0}}, got {value!r}")
    weights = {}
    for name, weight in value.items():
        what = f"the weight of adapter {name!r}"
        weights[str(name)] = float(_checked(what, _number(what, weight), -1e4, 1e4))
    return weights


def _bias(value: Mapping[int, float] | None) -> dict[int, float]:
    bias = {}
    for token, amount in dict(value or {}).items():
        number = _number("logit_bias", amount)
        if math.isnan(number) or number == math.inf:
            raise ValueError(f"logit_bias of token {token} must be finite or -inf, got {amount!r}")
        bias[_integer("logit_bias", token)] = number
    return bias


# What a GGUF file may recommend, and which option it is. Source: gguf-py, Keys.General.
_GGUF_KEYS = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.xtc_probability": "xtc_probability",
    "general.sampling.xtc_threshold": "xtc_threshold",
    "general.sampling.penalty_last_n": "penalty_last_n",
    "general.sampling.penalty_repeat": "repetition_penalty",
    "general.sampling.mirostat": "mirostat",
    "general.sampling.mirostat_tau": "mirostat_tau",
    "general.sampling.mirostat_eta": "mirostat_eta",
}


# What a Hugging Face folder's generation_config.json may recommend. Source: transformers' GenerationConfig.
_GENERATION_CONFIG_KEYS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "repetition_penalty": "repetition_penalty",
}


def recommended_options(metadata: Mapping[str, object]) -> GenerationOptions:
    """The defaults for one model: nybble's own, replaced by what the file's metadata recommends.

    A recommendation that is out of range is ignored: the file is not the caller.
    """
    options = GenerationOptions()
    for name, found in _recommendations(metadata):
        value = found.item() if isinstance(found, np.generic) else found
        if isinstance(value, float) and name in _NUMBERS:
            # Files store float32: 0.6 comes back as 0.60000002.
            value = float(f"{value:.6g}")
        try:
            options = options if value is None else options.updated({name: value})
        except ValueError:
            continue
    return options


def _recommendations(metadata: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    for key, name in _GGUF_KEYS.items():
        yield name, metadata.get(key)
    generation = metadata.get("huggingface.generation_config")
    if isinstance(generation, Mapping):
        for key, name in _GENERATION_CONFIG_KEYS.items():
            # Without sampling the others have no effect there.
            if key == "repetition_penalty" or generation.get("do_sample") is not False:
                yield name, generation.get(key)
