"""The HTML report: well formed, self-contained, and safe whatever is in a file."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from nybble.evaluate import plots
from nybble.evaluate.numerals import printable
from nybble.evaluate.report_html import report, write_report
from support.evaluations import HOSTILE, made_up_evaluation

VOID = {"meta", "br", "img", "input", "hr", "link"}


class Checker(HTMLParser):
    """Keeps what is open, and what was seen."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.text += data


def checked(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    return checker


def test_everything_is_there() -> None:
    evaluation = made_up_evaluation()
    page = report(evaluation)
    found = checked(page)
    for text in (
        "Evaluation: f16.gguf and 2 more", "20,400 tokens of 80 windows", "21.00± 0.30", "0.00480± 0.00012",
        "95.00 %± 0.20", "135.0 MB", "8.03", "Quality against size", "Quality against speed",
        "self_attn.q_proj", "model.embed_tokens.weight", "1,020 of 20,400 tokens", "a note", "sha256 000",
        "onnxruntime:cpu",
    ):  # fmt: skip
        assert text in found.text, text
    tags = [tag for tag, _ in found.seen]
    # Two trade-offs and a plot for each kind of matrix.
    assert tags.count("svg") == 2 + 3
    assert tags.count("polyline") == 3 * 2
    assert tags.count("circle") == 2 * 2 + 3 * 2 * 30


def test_nothing_is_loaded_and_nothing_runs() -> None:
    page = report(made_up_evaluation())
    assert "http" not in page.replace("http-equiv", "") and "//" not in page and "url(" not in page
    tags = {tag for tag, _ in checked(page).seen}
    assert not tags & {"script", "link", "img", "iframe", "object", "base"}
    names = {name for _, attributes in checked(page).seen for name in attributes}
    assert not names & {"src", "href", "onclick", "onerror", "onload"}


def test_hostile_text_stays_text() -> None:
    plain, page = report(made_up_evaluation()), report(made_up_evaluation(label=HOSTILE))
    expected, found = checked(plain), checked(page)
    assert [tag for tag, _ in found.seen] == [tag for tag, _ in expected.seen]
    assert printable(HOSTILE) in found.text and not re.search("[\x1b\u202e]", page)
    assert not re.search(r"<script|<img", page)


def test_numbers_of_svg_are_finite() -> None:
    page = report(made_up_evaluation())
    for _, attributes in checked(page).seen:
        for name in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "points"):
            value = attributes.get(name)
            if value:
                assert re.fullmatch(r"[-0-9., ]+", value), (name, value)


@pytest.mark.parametrize("count", [1, 2])
def test_fewer_models(count: int) -> None:
    found = checked(report(made_up_evaluation(count)))
    assert [tag for tag, _ in found.seen].count("svg") == (0 if count == 1 else 5)


def test_what_was_not_measured() -> None:
    evaluation = made_up_evaluation(2)
    reference, other = evaluation.models
    bare = replace(
        other, quality=None, prefill=None, decode=None, peak_memory_bytes=None, weight_errors=(), flips=(),
        parameters=None, threads=None, failure="its process was ended by SIGKILL",
    )  # fmt: skip
    page = report(replace(evaluation, models=(reference, bare), stride=64, load_average=None))
    found = checked(page)
    assert "failed: its process was ended by SIGKILL" in found.text
    assert "64 tokens apart" in found.text
    assert not re.search(r"\bnan\b", found.text)
    slow = replace(other, decode=None)
    found = checked(report(replace(evaluation, models=(reference, slow))))
    assert "Quality against size" in found.text and "Quality against speed" not in found.text


def test_equal_and_exact_models_can_be_drawn() -> None:
    evaluation = made_up_evaluation(3)
    first, second, third = evaluation.models
    assert second.quality is not None and second.quality.kld is not None
    zero = replace(second.quality, kld=replace(second.quality.kld, value=0.0, error=0.0))
    same = replace(third, weight_errors=(), weight_bytes=first.weight_bytes)
    checked(report(replace(evaluation, models=(first, replace(second, quality=zero), same))))


def test_an_old_report_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    write_report(made_up_evaluation(), path)
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    ("values", "options", "ticks"),
    [
        ([3.0, 97.0], {"from_zero": True}, (0, 20, 40, 60, 80, 100)),
        ([0.0, 0.23], {}, (0, 0.05, 0.1, 0.15, 0.2, 0.25)),
        ([5.0], {}, (0, 2, 4, 6, 8, 10)),
        ([0.0], {}, (-1, -0.5, 0, 0.5, 1)),
        ([0.003, 0.4], {"logarithmic": True}, (0.001, 0.01, 0.1, 1)),
        ([0.03, 0.4], {"logarithmic": True}, (0.02, 0.05, 0.1, 0.2, 0.5)),
        ([0.1], {"logarithmic": True}, (0.1, 0.2)),
    ],
)
def test_axes(values: list[float], options: dict[str, bool], ticks: tuple[float, ...]) -> None:
    axis = plots.axis(values, **options)
    assert axis.ticks == pytest.approx(ticks)
    assert all(0 <= axis.at(value) <= 1 for value in values)
