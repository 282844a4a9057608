"""Speed, time left, throttling, and what is printed."""

from __future__ import annotations

import io

from nybble.hub.progress import (
    BarDisplay,
    LineDisplay,
    Meter,
    Transfer,
    describe,
    format_bytes,
    format_seconds,
    progress_display,
)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_speed_and_time_left_over_the_last_seconds() -> None:
    clock, reports = Clock(), []
    meter = Meter(reports.append, "x", done=1000, total=11_000, clock=clock)
    assert reports == [Transfer("x", "downloading", 1000, 11_000)]
    for second in range(1, 5):
        clock.now = second
        meter.update(1000 + 500 * second)
    assert reports[-1].speed == 500  # what an earlier attempt got does not count as speed
    assert reports[-1].seconds_left == 16
    for second in range(5, 20):
        clock.now = second
        meter.update(3000 + 100 * (second - 4))
    assert reports[-1].speed == 100


def test_reports_are_throttled_but_the_last_one_comes() -> None:
    clock, reports = Clock(), []
    meter = Meter(reports.append, "x", total=1000, clock=clock)
    for step in range(1000):
        clock.now = step / 1000
        meter.update(step + 1)
    meter.finish()
    assert 5 <= len(reports) <= 12
    assert reports[-1].done == 1000 and reports[-1].finished


def test_a_restart_does_not_make_the_speed_negative() -> None:
    clock, reports = Clock(), []
    meter = Meter(reports.append, "x", total=1000, clock=clock)
    for now, done in ((1, 500), (2, 10), (3, 20)):
        clock.now = now
        meter.update(done)
    assert reports[-1].speed == 10


def test_lines() -> None:
    stream = io.StringIO()
    with progress_display(stream) as display:
        assert isinstance(display, LineDisplay)
        for done in range(0, 100, 10):
            display(Transfer("x.gguf", "downloading", done * 10**6, 98 * 10**6, 2e6, 49.0))
        display(Transfer("x.gguf", "downloading", 98 * 10**6, 98 * 10**6, finished=True))
    assert stream.getvalue().splitlines() == [
        "downloading x.gguf: 0 B of 98.0 MB, 2.0 MB/s, 0:49 left",
        "downloading x.gguf: done, 98.0 MB",
    ]


def test_bar() -> None:
    stream = io.StringIO()
    with BarDisplay(stream) as display:
        display(Transfer("x[bold].gguf", "downloading", 10**6, None))
        display(Transfer("x[bold].gguf", "downloading", 10**6, 2 * 10**6))
    assert "downloading x[bold].gguf" in stream.getvalue()
    assert "1.0/2.0 MB" in stream.getvalue()


def test_words() -> None:
    assert describe(Transfer("x", "waiting", 0, None)) == "waiting: another process is getting x"
    assert [format_bytes(n) for n in (0, 999, 1000, 98_362_432, 2.5e9, 3e12)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "98.4 MB",
        "2.5 GB",
        "3.0 TB",
    ]
    assert [format_seconds(s) for s in (0, 61, 3661)] == ["0:00", "1:01", "1:01:01"]
