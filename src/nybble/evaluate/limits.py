"""Limits: ``kld>0.05`` and the like, which make an evaluation fail in a pipeline.

    MEASURE OPERATOR NUMBER

``MEASURES`` has the measures; with ``_ratio`` after its name, a measure is divided by the reference's.
Operators are ``<``, ``<=``, ``>``, ``>=``. A number may end in ``%``, ``k``, ``M`` or ``G`` (decimal).
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from nybble.errors import NybbleError
from nybble.evaluate.benchmark import Measurement
from nybble.evaluate.estimates import Estimate
from nybble.evaluate.results import Evaluation, ModelResult, Quality

OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
UNITS = {"": 1.0, "%": 0.01, "k": 1e3, "M": 1e6, "G": 1e9}
RATIO = "_ratio"

_LIMIT = re.compile(
    r"\s*(?P<measure>[a-z][a-z0-9_]*)\s*(?P<operator>[<>]=?)\s*"
    r"(?P<number>[0-9]*\.?[0-9]+(?:e[+-]?[0-9]{1,3})?)\s*(?P<unit>[%kMG]?)\s*"
)

Measure = Callable[[ModelResult], float | None]


class LimitError(NybbleError):
    """A limit that is not written as one, or asks for what was not measured."""


def _of_quality(name: str) -> Measure:
    def value(model: ModelResult) -> float | None:
        quality: Quality | None = model.quality
        found = None if quality is None else getattr(quality, name)
        return found.value if isinstance(found, Estimate) else found

    return value


def _rate(name: str) -> Measure:
    def value(model: ModelResult) -> float | None:
        found: Measurement | None = getattr(model, name)
        return None if found is None else found.median

    return value


MEASURES: Mapping[str, tuple[str, Measure]] = {
    "perplexity": ("perplexity of the text", _of_quality("perplexity")),
    "kld": ("mean KL divergence from the reference, nats", _of_quality("kld")),
    "kld_median": ("its median", _of_quality("kld_median")),
    "kld99": ("its 99th percentile", _of_quality("kld99")),
    "kld_max": ("its maximum", _of_quality("kld_max")),
    "top1": ("share of tokens with the reference's most probable one, 0 to 1", _of_quality("top1")),
    "flips": ("tokens with another one", _of_quality("flips")),
    "size": ("stored bytes of the weights", lambda model: float(model.weight_bytes)),
    "bits": ("bits a weight", lambda model: model.bits_per_weight),
    "prefill": ("tokens a second, a window at once", _rate("prefill")),
    "decode": ("tokens a second, one at a time", _rate("decode")),
    "memory": ("peak memory, bytes", lambda model: model.peak_memory_bytes),
}
"""What can be limited: what it is, and its value; None where it was not measured."""


@dataclass(frozen=True)
class Limit:
    """What must not be the case."""

    text: str
    measure: str
    ratio: bool
    operator: str
    bound: float

    def broken_by(self, model: ModelResult, reference: ModelResult) -> float | None:
        """The value where the model breaks the limit, else None.

        Raises:
            LimitError: the measure was not taken.
        """
        value = self._value(model)
        if self.ratio:
            value /= self._value(reference)
        return value if OPERATORS[self.operator](value, self.bound) else None

    def _value(self, model: ModelResult) -> float:
        value = MEASURES[self.measure][1](model)
        if value is None:
            raise LimitError(f"{self.text}: {self.measure} was not measured for {model.label}")
        return value


def parse_limit(text: str) -> Limit:
    """A limit from its text.

    Raises:
        LimitError: it is not one, or names no measure.
    """
    match = _LIMIT.fullmatch(text)
    if match is None:
        raise LimitError(
            f"{text!r} is not MEASURE OPERATOR NUMBER, such as kld>0.05, top1<95% or size_ratio>=0.3"
        )
    name = match["measure"]
    ratio = name not in MEASURES and name.endswith(RATIO)
    measure = name.removesuffix(RATIO) if ratio else name
    if measure not in MEASURES:
        raise LimitError(f"{text!r}: no measure is called {name}; there are {', '.join(MEASURES)}")
    return Limit(text, measure, ratio, match["operator"], float(match["number"]) * UNITS[match["unit"]])


def broken(evaluation: Evaluation, limits: list[Limit]) -> list[str]:
    """A sentence for each limit that a model breaks; the reference is not looked at.

    A model that failed breaks every limit.

    Raises:
        LimitError: a measure was not taken.
    """
    found = []
    for model in evaluation.others:
        for limit in limits:
            if model.failure is not None:
                found.append(f"{model.label}: {limit.text}: the model failed: {model.failure}")
                continue
            value = limit.broken_by(model, evaluation.reference)
            if value is not None:
                found.append(f"{model.label}: {limit.text}: {name_of(limit)} is {value:.6g}")
    return found


def name_of(limit: Limit) -> str:
    """The measure as it is written."""
    return limit.measure + (RATIO if limit.ratio else "")
