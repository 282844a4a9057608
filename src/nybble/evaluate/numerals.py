"""Numbers as reports write them, no more digits than mean something; text that is safe to show."""

from __future__ import annotations

import math

from nybble.evaluate.estimates import Estimate

_MISSING = "-"


def number(value: float | None, digits: int = 4) -> str:
    """A number with so many significant digits and no exponent where it is of usual size."""
    if value is None:
        return _MISSING
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}" if value == 0 else str(value)
    if not 1e-6 <= abs(value) < 1e7:
        return f"{value:.{digits - 1}e}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def estimate(found: Estimate | None, scale: float = 1.0) -> str:
    """``0.0123 ± 0.0004``: the error to two digits at most, the value as far as the error goes."""
    if found is None:
        return _MISSING
    value, error = found.value * scale, found.error * scale
    if error <= 0 or not math.isfinite(error):
        return number(value)
    decimals = max(0, 1 - math.floor(math.log10(error)))
    if decimals > 8:
        return f"{value:.3e} ± {error:.1e}"
    return f"{value:,.{decimals}f} ± {error:,.{decimals}f}"


def percent(found: Estimate | None) -> str:
    """A share as a percentage, with its error."""
    return _MISSING if found is None else f"{estimate(found, 100)} %"


def size(count: float | None) -> str:
    """Bytes in decimal units: 98.1 MB."""
    from nybble.hub.progress import format_bytes

    return _MISSING if count is None else format_bytes(count)


def rate(value: float | None) -> str:
    """Tokens a second."""
    return _MISSING if value is None else number(value, 3)


def printable(text: str) -> str:
    """``text`` with control characters of a hostile file made visible, not obeyed."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
