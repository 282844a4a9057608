"""``--fail-if``: what is a limit, and when one is broken."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.evaluate.limits import MEASURES, LimitError, broken, parse_limit
from support.evaluations import made_up_evaluation


@pytest.mark.parametrize(
    ("text", "measure", "ratio", "operator", "bound"),
    [
        ("kld>0.05", "kld", False, ">", 0.05),
        (" top1 < 95% ", "top1", False, "<", 0.95),
        ("perplexity_ratio>=1.02", "perplexity", True, ">=", 1.02),
        ("size>100M", "size", False, ">", 1e8),
        ("memory_ratio<=.5", "memory", True, "<=", 0.5),
        ("kld99>1e-3", "kld99", False, ">", 1e-3),
        ("decode<2k", "decode", False, "<", 2000),
    ],
)
def test_parse(text: str, measure: str, ratio: bool, operator: str, bound: float) -> None:
    limit = parse_limit(text)
    assert (limit.measure, limit.ratio, limit.operator) == (measure, ratio, operator)
    assert limit.bound == pytest.approx(bound)


@pytest.mark.parametrize(
    "text",
    ["", "kld", "kld>", ">0.05", "kld>x", "kld=0.05", "kld==0.05", "kld>0.05 or top1<1", "kld>-1",
     "__import__('os')>0", "kld>0.05;", "kld>1e9999", "0.05<kld", "kld>0.05T"],
)  # fmt: skip
def test_what_is_no_limit(text: str) -> None:
    with pytest.raises(LimitError, match="is not MEASURE OPERATOR NUMBER"):
        parse_limit(text)


@pytest.mark.parametrize("text", ["quality>1", "ratio>1", "kld_mean>1", "x_ratio>1"])
def test_unknown_measures(text: str) -> None:
    with pytest.raises(LimitError, match="no measure is called"):
        parse_limit(text)


@given(st.text(max_size=30))
def test_no_text_does_harm(text: str) -> None:
    with contextlib.suppress(LimitError):
        assert parse_limit(text).measure in MEASURES


def test_every_measure_has_a_value() -> None:
    evaluation = made_up_evaluation()
    for name, (_, value) in MEASURES.items():
        assert isinstance(value(evaluation.models[1]), (int, float)), name


def test_broken_limits() -> None:
    evaluation = made_up_evaluation(2)
    model = evaluation.models[1]
    assert model.quality is not None and model.quality.kld is not None
    high = model.quality.kld.value
    limits = [parse_limit(text) for text in (f"kld>{high * 1.01:.6f}", "size_ratio>0.9", "bits>2")]
    found = broken(evaluation, limits)
    assert found == [f"{m.label}: bits>2: bits is {m.bits_per_weight:.6g}" for m in evaluation.others]
    # The reference is not judged.
    assert broken(replace(evaluation, models=evaluation.models[:1]), limits) == []


def test_a_failed_model_breaks_every_limit() -> None:
    evaluation = made_up_evaluation()
    failed = replace(evaluation.models[1], failure="out of memory", quality=None)
    evaluation = replace(evaluation, models=(evaluation.models[0], failed))
    found = broken(evaluation, [parse_limit("kld>100")])
    assert found == [f"{failed.label}: kld>100: the model failed: out of memory"]


def test_what_was_not_measured() -> None:
    evaluation = made_up_evaluation()
    slow = replace(evaluation.models[1], decode=None)
    evaluation = replace(evaluation, models=(evaluation.models[0], slow))
    with pytest.raises(LimitError, match="decode was not measured"):
        broken(evaluation, [parse_limit("decode<10")])
    with pytest.raises(LimitError, match=r"kld was not measured for f16\.gguf"):
        broken(evaluation, [parse_limit("kld_ratio>1")])
