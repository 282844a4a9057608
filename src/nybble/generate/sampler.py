"""Sampler: the chain from one row of logits to one token, with the state of one sequence.

The order is llama.cpp's default chain: logit bias, penalties, DRY, top-n-sigma, top-k, typical,
top-p, min-p, XTC, temperature, draw.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from nybble.errors import DeviceError
from nybble.generate import filters
from nybble.generate.candidates import Candidates, Floats, Ids, Logits
from nybble.generate.dry import Dry
from nybble.generate.mirostat import Mirostat
from nybble.generate.options import GenerationOptions
from nybble.generate.penalties import penalize


class Sampler:
    """Draws the tokens of one sequence.

    ``vocab_size``: logits beyond it are padding and are ignored.
    ``history``: the prompt's tokens, which the penalties look at. ``index``: which of the ``n``
    completions this is; the random numbers depend on the seed and on it alone, never on what else
    is in the batch. ``breakers``: ids of DRY's sequence breakers.
    """

    def __init__(
        self,
        options: GenerationOptions,
        *,
        vocab_size: int,
        history: Sequence[int] = (),
        seed: int = 0,
        index: int = 0,
        breakers: Sequence[int] = (),
    ) -> None:
        self._options = options
        self._vocab_size = vocab_size
        # Python promises that random() stays the same for a seed; importing numpy.random takes megabytes.
        self._random = random.Random((index << 64) | seed)
        history = [token for token in history if token < vocab_size]
        self._bias = _bias_arrays(options, vocab_size)
        self._recent: list[int] | None = history if _penalizes(options) else None
        self._dry: Dry | None = None
        if options.dry_multiplier > 0 and options.dry_penalty_last_n != 0:
            self._dry = Dry(
                multiplier=options.dry_multiplier,
                base=options.dry_base,
                allowed_length=options.dry_allowed_length,
                last_n=options.dry_penalty_last_n,
                breakers=breakers,
                vocab_size=vocab_size,
            )
            self._dry.extend(history)
        self._mirostat: Mirostat | None = None
        if options.mirostat == 2 and not options.greedy:
            self._mirostat = Mirostat(options.mirostat_tau, options.mirostat_eta)

    def sample(self, logits: Logits, forbidden: Sequence[int] = ()) -> int:
        """The next token after these logits (vocab_size,), which are not changed.

        ``forbidden``: token ids that must not come now.

        Raises:
            DeviceError: the logits hold NaN, or nothing but forbidden tokens.
        """
        logits = self._adjust(logits[: self._vocab_size], forbidden)
        if self._options.greedy:
            token = int(logits.argmax())  # the first NaN, if there is one
            _check(logits[token])
        else:
            candidates, probabilities = self._distribution(logits)
            place = _draw(probabilities, self._random.random())
            token = int(candidates.ids[place])
            if self._mirostat is not None:
                self._mirostat.observe(float(probabilities[place]))
        self._accept(token)
        return token

    def distribution(self, logits: Logits, forbidden: Sequence[int] = ()) -> tuple[Ids, Floats]:
        """Token ids (n,) and probabilities (n,) that ``sample`` would draw from; for inspection.

        XTC draws its random number here too.
        """
        logits = self._adjust(logits[: self._vocab_size], forbidden)
        if self._options.greedy:
            return np.array([int(logits.argmax())]), np.ones(1)
        candidates, probabilities = self._distribution(logits)
        return candidates.ids, probabilities

    def _adjust(self, logits: Logits, forbidden: Sequence[int]) -> Logits:
        """The logits after bias and penalties; a copy if anything changes."""
        options = self._options
        if self._bias is None and self._recent is None and self._dry is None and not forbidden:
            return logits
        logits = logits.copy()
        if self._bias is not None:
            ids, amounts = self._bias
            logits[ids] += amounts
        if forbidden:
            logits[list(forbidden)] = -np.inf
        if self._recent is not None:
            last = self._recent if options.penalty_last_n < 0 else self._recent[-options.penalty_last_n :]
            penalize(
                logits,
                np.asarray(last, dtype=np.int64),
                repetition=options.repetition_penalty,
                presence=options.presence_penalty,
                frequency=options.frequency_penalty,
            )
        if self._dry is not None:
            self._dry.penalize(logits)
        return logits

    def _distribution(self, logits: Logits) -> tuple[Candidates, Floats]:
        options = self._options
        _check(logits.max())
        candidates = Candidates.all(logits)
        if self._mirostat is not None:
            candidates = self._mirostat.cut(_cooled(candidates, options.temperature))
            return candidates, candidates.probabilities()
        candidates = filters.top_n_sigma(candidates, options.top_n_sigma)
        candidates = filters.top_k(candidates, options.top_k)
        candidates = filters.typical(candidates, options.typical_p)
        candidates = filters.top_p(candidates, options.top_p)
        candidates = filters.min_p(candidates, options.min_p)
        if options.xtc_probability > 0 and self._random.random() < options.xtc_probability:
            candidates = filters.xtc(candidates, options.xtc_threshold)
        candidates = _cooled(candidates, options.temperature)
        return candidates, candidates.probabilities()

    def _accept(self, token: int) -> None:
        if self._recent is not None:
            self._recent.append(token)
        if self._dry is not None:
            self._dry.extend((token,))


def _cooled(candidates: Candidates, temperature: float) -> Candidates:
    """Logits divided by the temperature, relative to the maximum so that nothing overflows."""
    if temperature == 1.0:
        return candidates
    with np.errstate(over="ignore"):
        logits = (candidates.logits - np.float32(candidates.maximum)) / np.float32(temperature)
    return Candidates(candidates.ids, logits, candidates.ordered)


def _draw(probabilities: Floats, uniform: float) -> int:
    """The place whose slice of the cumulative distribution holds ``uniform`` in [0, 1)."""
    cumulative = probabilities.cumsum()
    place = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    # Rounding may point past the end, and a probability of 0 must never be drawn.
    return place if place < probabilities.size else int(np.flatnonzero(probabilities)[-1])


def _check(largest: np.floating) -> None:
    if not np.isfinite(largest):
        reason = "NaN or infinite" if not np.isneginf(largest) else "-inf for every token"
        raise DeviceError(
            f"the model's logits are {reason}: the model file is damaged, the precision is too low for "
            "it (try precision='f32'), or logit_bias forbids every token"
        )


def _bias_arrays(options: GenerationOptions, vocab_size: int) -> tuple[Ids, Logits] | None:
    if not options.logit_bias:
        return None
    ids = np.array(list(options.logit_bias), dtype=np.int64)
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(f"logit_bias: token ids must be between 0 and {vocab_size - 1}, got {ids.tolist()}")
    return ids, np.array(list(options.logit_bias.values()), dtype=np.float32)


def _penalizes(options: GenerationOptions) -> bool:
    return options.penalty_last_n != 0 and (
        options.repetition_penalty != 1 or options.presence_penalty != 0 or options.frequency_penalty != 0
    )
