"""Elementwise chains as functions: what an export spells out in a dozen nodes is found by its values.

A chain of terms over one or two others is evaluated on sample numbers and compared with the functions
that models have: activations, soft caps, the inverse root of a mean square.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from nybble.formats.onnx.recognise.values import Array, Term
from nybble.graph.reference import ACTIVATIONS

_each_erf = np.frompyfunc(math.erf, 1, 1)


def _erf(x: Array) -> Array:
    return np.asarray(_each_erf(x), np.float64)


FUNCTIONS: Mapping[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "Tanh": np.tanh,
    "Sigmoid": lambda x: 0.5 * (np.tanh(0.5 * x) + 1),
    "Erf": _erf,
    "Exp": np.exp,
    "Neg": np.negative,
    "Abs": np.abs,
    "Sqrt": np.sqrt,
    "Reciprocal": lambda x: 1 / x,
    "silu": lambda x: 0.5 * x * (np.tanh(0.5 * x) + 1),
    "gelu": lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2))),
    "gelu_pytorch_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "spread": lambda x: x,
}
"""Terms that work on each element by itself (``spread`` repeats one number over a group)."""
WITH_NUMBER: Mapping[str, Callable[[Array, float], Array]] = {
    "scale": lambda x, c: x * c,
    "shift": lambda x, c: x + c,
    "power": lambda x, c: x**c,
    "over": lambda x, c: c / x,
}
"""The same with a constant, the term's ``factor``."""

MAX_STEPS = 64


def evaluate(term: Term, given: Mapping[int, Array], steps: int = 0) -> Array | None:
    """The chain's values where ``given`` has those of other terms by id; None where it is no chain."""
    if id(term) in given:
        return given[id(term)]
    if steps > MAX_STEPS or not (term.operator in FUNCTIONS or term.operator in WITH_NUMBER):
        return None
    values = [evaluate(arg, given, steps + 1) for arg in term.args]
    found = [value for value in values if value is not None]
    if len(found) < len(values):
        return None
    with np.errstate(all="ignore"):
        if term.operator in WITH_NUMBER:
            return WITH_NUMBER[term.operator](found[0], term.values["factor"])
        return FUNCTIONS[term.operator](*found)


def leaves(term: Term) -> list[Term]:
    """The terms that a chain starts from, in order of appearance."""
    found: dict[int, Term] = {}
    stack, seen = [(term, 0)], 0
    while stack:
        item, depth = stack.pop()
        seen += 1
        chain = item.operator in FUNCTIONS or item.operator in WITH_NUMBER
        if not chain or depth > MAX_STEPS or seen > 1000:
            found.setdefault(id(item), item)
        else:
            stack += [(arg, depth + 1) for arg in reversed(item.args)]
    return list(found.values())


SAMPLES = np.array([-7.3, -3.1, -1.2, -0.6, -0.05, 0.02, 0.4, 0.9, 1.7, 2.8, 5.5])


def gate_of(term: Term) -> tuple[str, Term, Term] | None:
    """Activation, gate and up, where the chain is activation(gate) * up."""
    found = leaves(term)
    if len(found) != 2:
        return None
    g, u = SAMPLES[:, None] + 0 * SAMPLES, SAMPLES[None, :] + 0 * SAMPLES[:, None]
    for gate, up in (found, found[::-1]):
        values = evaluate(term, {id(gate): g, id(up): u})
        if values is None:
            return None
        for name in ACTIVATIONS:
            if close(values, FUNCTIONS[name](g) * u):
                return name, gate, up
    return None


def cap_of(term: Term) -> tuple[Term, float, float | None] | None:
    """The one term x that the chain starts from, scale and cap: scale * x, or cap * tanh(scale * x / cap)."""
    found = leaves(term)
    if len(found) != 1:
        return None
    x = SAMPLES * 10.0 ** np.arange(-2, 4)[:, None]
    values = evaluate(term, {id(found[0]): x})
    if values is None or not np.isfinite(values).all():
        return None
    slope = float(values[0, 4] / x[0, 4])
    if close(values, slope * x):
        return found[0], slope, None
    far = evaluate(term, {id(found[0]): np.array([1e12])})
    near = evaluate(term, {id(found[0]): np.array([1e-6])})
    if far is None or near is None:
        return None
    cap, scale = float(far[0]), float(near[0] / 1e-6)
    if cap > 0 and scale > 0 and close(values, cap * np.tanh(scale * x / cap)):
        return found[0], _neat(scale), _neat(cap)
    return None


def epsilon_of(term: Term, x: Term, mean: Term) -> float | None:
    """eps where the chain is x / sqrt(mean + eps)."""
    a, m = SAMPLES[:, None] + 0 * SAMPLES, np.abs(SAMPLES)[None, :] + 0 * SAMPLES[:, None]
    at_zero = evaluate(term, {id(x): np.ones(1), id(mean): np.zeros(1)})
    values = evaluate(term, {id(x): a, id(mean): m})
    if at_zero is None or values is None or not at_zero[0] > 0:
        return None
    eps = 0.0 if math.isinf(at_zero[0]) else float(at_zero[0]) ** -2
    return _neat(eps) if close(values, a / np.sqrt(m + eps)) else None


def is_square(term: Term, x: Term) -> bool:
    """Whether the chain is x * x."""
    values = evaluate(term, {id(x): SAMPLES})
    return values is not None and close(values, SAMPLES**2)


def close(a: Array, b: Array) -> bool:
    """Equal as far as constants rounded to float16 allow."""
    return bool(np.allclose(a, b, rtol=2e-3, atol=1e-9))


def _neat(value: float) -> float:
    """A constant as it was written, where float32 rounding hid it."""
    short = float(f"{value:.6g}")
    return short if math.isclose(short, value, rel_tol=3e-7) else value
