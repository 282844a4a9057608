"""Plots as inline SVG: points and lines with axes, in the colours of the page that they stand in.

Colours, fonts and dark mode come from CSS classes that ``report_html.py`` defines; every text is
escaped. Nothing is loaded from anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from nybble.evaluate.numerals import printable

COLOURS = 8
"""Classes ``c0`` to ``c7``; more series begin anew."""

_LEFT, _RIGHT, _TOP, _BOTTOM = 64.0, 14.0, 12.0, 40.0
_LABEL_HEIGHT = 13.0
_CHARACTER = 6.4  # width of one at 11 px, about
_GAP = 9.0  # between a mark and its text


@dataclass(frozen=True)
class Point:
    """One mark. ``text`` is shown beside it, ``hint`` when the mouse is over it."""

    x: float
    y: float
    colour: int
    text: str
    hint: str


@dataclass(frozen=True)
class Line:
    """One line through points (x, y), or through gaps where y is None."""

    points: Sequence[tuple[float, float | None]]
    colour: int
    hint: str


@dataclass(frozen=True)
class Axis:
    """From data to pixels, and the ticks on the way."""

    low: float
    high: float
    logarithmic: bool
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        """0 at the low end, 1 at the high end."""
        if self.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def axis(values: Sequence[float], *, logarithmic: bool = False, from_zero: bool = False) -> Axis:
    """An axis that holds all values, which are positive if it is logarithmic."""
    if logarithmic:
        return _logarithmic(min(values), max(values))
    low, high = min(values), max(values)
    if from_zero:
        low = min(0.0, low)
    if high <= low:
        low, high = (0.0, low * 2) if low > 0 else (low - 1, low + 1)
    step = _nice((high - low) / 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    ticks = tuple(index * step for index in range(first, last + 1))
    return Axis(ticks[0], ticks[-1], False, ticks)


def scatter(
    points: Sequence[Point],
    *,
    x_title: str,
    y_title: str,
    name: str,
    x_mark: tuple[float, str] | None = None,
    width: float = 460,
    height: float = 300,
) -> str:
    """Points on a linear x axis from 0 and a logarithmic y axis; ``x_mark`` is a line with a text."""
    xs = [point.x for point in points] + ([x_mark[0]] if x_mark else [])
    frame = _Frame(axis(xs, from_zero=True), axis([p.y for p in points], logarithmic=True), width, height)
    parts = [frame.axes(x_title, y_title)]
    if x_mark is not None:
        x = frame.x(x_mark[0])
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{frame.bottom:.1f}"/>')
        parts.append(frame.label(x, _TOP + 10, x_mark[1], "label mark"))
    places = _apart([frame.y(point.y) for point in points])
    for point, label_y in zip(points, places, strict=True):
        x, y = frame.x(point.x), frame.y(point.y)
        colour = f"c{point.colour % COLOURS}"
        parts.append(
            f'<g class="{colour}"><title>{_safe(point.hint)}</title>'
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5"/>'
            f"{frame.label(x, label_y + 4, point.text, 'label')}</g>"
        )
    return frame.svg("".join(parts), name)


def lines(
    series: Sequence[Line],
    *,
    x_title: str,
    y_title: str,
    name: str,
    y_axis: Axis,
    width: float = 300,
    height: float = 190,
) -> str:
    """Lines over whole numbers from 0, with a dot at each value."""
    frame = _Frame(_whole(max(x for line in series for x, _ in line.points)), y_axis, width, height)
    parts = [frame.axes(x_title, y_title)]
    for line in series:
        placed = [(frame.x(x), frame.y(y)) for x, y in line.points if y is not None]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="1.8"/>' for x, y in placed)
        parts.append(
            f'<g class="c{line.colour % COLOURS}"><title>{_safe(line.hint)}</title>'
            f'<polyline points="{path}"/>{dots}</g>'
        )
    return frame.svg("".join(parts), name)


class _Frame:
    """The area of a plot."""

    def __init__(self, x_axis: Axis, y_axis: Axis, width: float, height: float) -> None:
        self._x, self._y = x_axis, y_axis
        self.width, self.height = width, height
        self.bottom = height - _BOTTOM

    def x(self, value: float) -> float:
        """Pixels from the left."""
        return _LEFT + self._x.at(value) * (self.width - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        """Pixels from the top."""
        return self.bottom - self._y.at(value) * (self.bottom - _TOP)

    def label(self, x: float, y: float, text: str, kind: str) -> str:
        """A text beside x: to the right if it has room there, else where there is more, cut if need be."""
        right, left = (int((room - _GAP) / _CHARACTER) for room in (self.width - x, x - _LEFT))
        room = right if len(text) <= right or right >= left else left
        if len(text) > room:
            text = text[: room - 1] + "…"
        return _text(x, y, text, kind, "start" if room == right else "end")

    def axes(self, x_title: str, y_title: str) -> str:
        """Grid, tick labels and titles."""
        parts = []
        right = self.width - _RIGHT
        for value in self._y.ticks:
            y = self.y(value)
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(_text(_LEFT + 3, y + 4, _tick(value), "tick", "end"))
        for value in self._x.ticks:
            x = self.x(value)
            parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{self.bottom:.1f}"/>')
            parts.append(_text(x, self.bottom + 15, _tick(value), "tick", "middle"))
        parts.append(_text((_LEFT + right) / 2, self.height - 6, x_title, "title", "middle"))
        middle = (_TOP + self.bottom) / 2
        parts.append(
            f'<text class="title" text-anchor="middle" transform="translate(11 {middle:.1f}) rotate(-90)">'
            f"{_safe(y_title)}</text>"
        )
        return "".join(parts)

    def svg(self, content: str, name: str) -> str:
        """The whole picture; ``name`` is for those who hear it."""
        return (
            f'<svg class="plot" viewBox="0 0 {self.width:g} {self.height:g}" role="img"'
            f' aria-label="{_safe(name)}">{content}</svg>'
        )


def _text(x: float, y: float, text: str, kind: str, anchor: str) -> str:
    shift = {"start": _GAP, "end": -_GAP, "middle": 0}[anchor]
    return f'<text class="{kind}" x="{x + shift:.1f}" y="{y:.1f}" text-anchor="{anchor}">{_safe(text)}</text>'


def _safe(text: str) -> str:
    """Text as HTML, with control characters made visible."""
    return escape(printable(text))


def _apart(places: Sequence[float]) -> list[float]:
    """The heights of labels, moved down where they would overlap."""
    result = [0.0] * len(places)
    last = -math.inf
    for index in sorted(range(len(places)), key=places.__getitem__):
        last = result[index] = max(places[index], last + _LABEL_HEIGHT)
    return result


def _tick(value: float) -> str:
    if value and (abs(value) < 1e-4 or abs(value) >= 1e6):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.6g}"


def _nice(step: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))


def _logarithmic(low: float, high: float) -> Axis:
    """Powers of ten, and 2 and 5 of each where there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    if first == last:
        last += 1
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    ticks = [factor * 10.0**power for power in range(first, last) for factor in factors] + [10.0**last]
    while len(ticks) > 2 and ticks[1] <= low:
        ticks.pop(0)
    while len(ticks) > 2 and ticks[-2] >= high:
        ticks.pop()
    return Axis(ticks[0], ticks[-1], True, tuple(ticks))


def _whole(most: float) -> Axis:
    step = max(1, math.ceil(_nice(max(1.0, most) / 5)))
    ticks = tuple(float(value) for value in range(0, int(most) + 1, step))
    return Axis(0.0, max(1.0, most), False, ticks)
