"""How a transfer reports its progress, and two ways to show it: a bar, or plain lines.

A callback gets a `Transfer` at most ten times a second. Nothing here knows where the bytes come from.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Protocol, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

Action = Literal["downloading", "unpacking", "checking", "waiting", "converting"]

_REPORT_SECONDS = 0.1
_WINDOW_SECONDS = 5.0


@dataclass(frozen=True)
class Transfer:
    """State of one transfer.

    Attributes:
        name: the file, as a person knows it.
        action: what is going on; "waiting": another process is getting the same model.
        done: bytes so far, those of an earlier, broken attempt included.
        total: bytes in all, or None while unknown.
        speed: bytes a second over the last seconds, or None before it can be told.
        seconds_left: at that speed, or None.
        finished: this is the transfer's last report.
    """

    name: str
    action: Action
    done: int
    total: int | None
    speed: float | None = None
    seconds_left: float | None = None
    finished: bool = False


ProgressCallback = Callable[[Transfer], None]


class Meter:
    """Turns byte counts into `Transfer` reports with a speed over a sliding window."""

    def __init__(
        self,
        callback: ProgressCallback | None,
        name: str,
        *,
        action: Action = "downloading",
        done: int = 0,
        total: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._callback = callback
        self._clock = clock
        self.name = name
        self.action: Action = action
        self.done = done
        self.total = total
        now = clock()
        self._samples: deque[tuple[float, int]] = deque([(now, done)])
        self._reported = now
        self._report(finished=False)

    def update(self, done: int) -> None:
        """Say that `done` bytes in all are there."""
        self.done = done
        now = self._clock()
        if now - self._reported < _REPORT_SECONDS:
            return
        if done < self._samples[-1][1]:  # started again from the beginning
            self._samples.clear()
        self._samples.append((now, done))
        while len(self._samples) > 2 and now - self._samples[0][0] > _WINDOW_SECONDS:
            self._samples.popleft()
        self._reported = now
        self._report(finished=False)

    def finish(self) -> None:
        """Send the last report."""
        self._report(finished=True)

    def _report(self, *, finished: bool) -> None:
        if self._callback is None:
            return
        (start, first), (end, last) = self._samples[0], self._samples[-1]
        speed = (last - first) / (end - start) if end > start else None
        left = (self.total - self.done) / speed if self.total is not None and speed else None
        self._callback(Transfer(self.name, self.action, self.done, self.total, speed, left, finished))


def report_waiting(callback: ProgressCallback | None, name: str) -> None:
    """Tell `callback` that another process is getting `name`."""
    if callback is not None:
        callback(Transfer(name, "waiting", 0, None))


class ProgressDisplay(Protocol):
    """A callback that owns a part of the terminal while its `with` block lasts."""

    def __call__(self, transfer: Transfer) -> None: ...

    def __enter__(self) -> ProgressDisplay: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def progress_display(stream: TextIO | None = None) -> ProgressDisplay:
    """A bar if `stream` (standard error unless told) is a terminal, plain lines otherwise."""
    stream = sys.stderr if stream is None else stream
    return BarDisplay(stream) if stream.isatty() else LineDisplay(stream)


class BarDisplay:
    """A bar with speed and time left for each transfer, drawn by `rich`."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._bars: Progress | None = None
        self._tasks: dict[tuple[str, str], TaskID] = {}

    def __enter__(self) -> BarDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, transfer: Transfer) -> None:
        """Draw the transfer."""
        bars = self._started()
        key = (transfer.name, transfer.action)
        if key not in self._tasks:
            self._tasks[key] = bars.add_task(f"{transfer.action} {transfer.name}", total=transfer.total)
        bars.update(self._tasks[key], completed=transfer.done, total=transfer.total)

    def _started(self) -> Progress:
        if self._bars is None:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )

            self._bars = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=Console(file=self._stream),
            )
            self._bars.start()
        return self._bars


class LineDisplay:
    """One line when a transfer starts, every ten seconds, and when it ends."""

    def __init__(self, stream: TextIO, seconds: float = 10.0) -> None:
        self._stream = stream
        self._seconds = seconds
        self._printed: dict[tuple[str, str], float] = {}

    def __enter__(self) -> LineDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def __call__(self, transfer: Transfer) -> None:
        """Print a line if it is time for one."""
        key = (transfer.name, transfer.action)
        now = time.monotonic()
        first = key not in self._printed
        if first or transfer.finished or now - self._printed[key] >= self._seconds:
            self._printed[key] = now
            print(describe(transfer), file=self._stream, flush=True)


def describe(transfer: Transfer) -> str:
    """One line of plain text for a transfer."""
    if transfer.action == "waiting":
        return f"waiting: another process is getting {transfer.name}"
    amount = format_bytes(transfer.done)
    if transfer.total is not None:
        amount += f" of {format_bytes(transfer.total)}"
    if transfer.finished:
        return f"{transfer.action} {transfer.name}: done, {format_bytes(transfer.done)}"
    speed = f", {format_bytes(transfer.speed)}/s" if transfer.speed else ""
    left = f", {format_seconds(transfer.seconds_left)} left" if transfer.seconds_left is not None else ""
    return f"{transfer.action} {transfer.name}: {amount}{speed}{left}"


def format_bytes(count: float) -> str:
    """Bytes in decimal units: `98.4 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def format_seconds(seconds: float) -> str:
    """Seconds as `m:ss` or `h:mm:ss`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
