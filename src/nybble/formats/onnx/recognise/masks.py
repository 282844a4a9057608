"""Attention masks, computed for made-up lengths and compared with the causal one and sliding windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from nybble.errors import FormatError, NybbleError, UnsupportedError
from nybble.formats.onnx.recognise.arithmetic import MASKED
from nybble.formats.onnx.recognise.probe import RUN_INSTEAD, Probe
from nybble.formats.onnx.recognise.values import Array, Known, Term, Weight

MaskNames = tuple[tuple[str, "bool | None"], ...]


def allowed_keys(probe: Probe, masks: MaskNames, causal: bool) -> Array:
    """Which keys each new token sees: bool (tokens, total)."""
    positions = probe.past + np.arange(probe.tokens)[:, None]
    seen = np.ones((probe.tokens, probe.total), np.bool_)
    if causal:
        seen &= np.arange(probe.total) <= positions
    for name, hidden in masks:
        value = probe.get(name)
        if not isinstance(value, Known | Weight):
            raise UnsupportedError(f"the mask {name!r} depends on activations; {RUN_INSTEAD}")
        array = value.array if isinstance(value, Known) else value.known()
        if array.dtype == np.bool_:
            allowed = ~array if hidden else array
        else:
            allowed = array > MASKED
            if (array[allowed] != 0).any():
                raise UnsupportedError(f"the mask {name!r} adds numbers to the scores; {RUN_INSTEAD}")
        if not allowed.size:
            raise FormatError(f"the mask {name!r} has shape {array.shape} for {seen.shape} scores")
        heads = allowed.reshape(-1, *allowed.shape[-2:]) if allowed.ndim > 2 else allowed[None]
        if (heads != heads[:1]).any():
            raise UnsupportedError(f"the mask {name!r} differs between heads; {RUN_INSTEAD}")
        try:
            seen &= heads[0]
        except ValueError:
            shapes = f"{array.shape} for {seen.shape} scores"
            raise FormatError(f"the mask {name!r} has shape {shapes}") from None
    return seen


def window_of(attention: Term, probe_of: Callable[[int], Probe], pasts: Sequence[int]) -> int | None:
    """The sliding window of an attention, or None where every earlier token is seen.

    ``probe_of(past)`` makes a run; of ``pasts`` the first that can be computed is used.

    Raises:
        UnsupportedError: a mask that is neither causal nor a window.
    """
    masks: MaskNames = tuple(attention.values["masks"])
    causal: bool = attention.values["causal"]
    window: int | None = attention.values["window"]
    if not masks:
        if not causal:
            raise UnsupportedError(f"node {attention.node}: attention that sees later tokens; {RUN_INSTEAD}")
        return window
    problem: NybbleError | None = None
    for past in pasts:
        try:
            probe = probe_of(past)
            seen = allowed_keys(probe, masks, causal)
        except NybbleError as error:
            problem = problem or error
            continue
        count = int(seen[-1].sum())
        found = None if count == probe.total else count
        positions = probe.past + np.arange(probe.tokens)[:, None]
        keys = np.arange(probe.total)
        expected = keys <= positions
        if found is not None:
            expected &= keys > positions - found
        if (seen != expected).any():
            raise UnsupportedError(
                f"node {attention.node}: its mask is neither causal nor a sliding window; {RUN_INSTEAD}"
            )
        if found is None or window is None:
            return found if window is None else window
        return min(found, window)
    raise problem or UnsupportedError(f"node {attention.node}: its mask cannot be computed; {RUN_INSTEAD}")
