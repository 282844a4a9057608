"""GenerationOptions: what is refused, and how the message helps."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from nybble.generate.options import GenerationOptions, recommended_options


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -0.1}, "temperature must be between 0.0 and 1000000.0, got -0.1"),
        ({"temperature": math.nan}, "temperature must be between"),
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"top_k": -1}, "top_k must be between 0 and"),
        ({"top_k": 1.5}, "top_k must be a whole number, got 1.5"),
        ({"top_k": True}, "top_k must be a whole number, got True"),
        ({"top_p": 1.01}, "top_p must be between 0.0 and 1.0, got 1.01"),
        ({"max_tokens": 0}, "max_tokens must be between 1 and"),
        ({"n": 0}, "n must be between 1 and"),
        ({"seed": -1}, "seed must be between 0 and"),
        ({"mirostat": 1}, "version 1 is not offered"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0"),
        ({"stop": ("",)}, "stop must be strings that are not empty"),
        ({"stop": (3,)}, "stop must be strings that are not empty, got 3"),
        ({"stop_tokens": ("a",)}, "stop_tokens must be a whole number"),
        ({"logit_bias": {3: math.inf}}, "logit_bias of token 3 must be finite or -inf"),
        ({"logit_bias": {"a": 1}}, "logit_bias must be a whole number"),
    ],
)
def test_refused(change, message):
    with pytest.raises(ValueError) as error:
        GenerationOptions(**change)
    assert message in str(error.value)


def test_unknown_option_suggests_the_closest():
    with pytest.raises(TypeError, match="unknown generation option 'max_token'; did you mean max_tokens"):
        GenerationOptions().updated({"max_token": 3})
    with pytest.raises(TypeError, match="options are max_tokens, min_tokens"):
        GenerationOptions().updated({"zzzzzz": 3})


def test_values_are_normalized():
    options = GenerationOptions(
        stop="END", stop_tokens=[np.int32(3)], logit_bias={np.int64(4): -math.inf}, top_p=1
    )
    assert options.stop == ("END",)
    assert options.stop_tokens == (3,)
    assert options.logit_bias == {4: -math.inf}
    assert isinstance(options.top_p, float)
    assert options.updated({"stop": None}).stop == ()


def test_every_option_is_checked_and_documented():
    from nybble.generate import options as module

    checked = {
        *module._INTEGERS,
        *module._NUMBERS,
        "stop",
        "stop_tokens",
        "dry_sequence_breakers",
        "logit_bias",
        "adapters",
    }
    names = {field.name for field in dataclasses.fields(GenerationOptions)}
    assert names - checked == {"ignore_eos", "reuse_prefix", "trust_content"}


def test_adapters():
    assert GenerationOptions().adapters is None
    assert GenerationOptions(adapters={"pirate": 1}).adapters == {"pirate": 1.0}
    assert GenerationOptions(adapters={}).adapters == {}
    for bad in ("pirate", ["pirate"], {"pirate": "1"}, {"pirate": float("nan")}, {"pirate": 1e5}):
        with pytest.raises(ValueError, match="adapter"):
            GenerationOptions(adapters=bad)


def test_greedy_is_temperature_zero_or_next_to_it():
    assert GenerationOptions(temperature=0).greedy
    assert GenerationOptions(temperature=1e-9).greedy
    assert not GenerationOptions(temperature=0.01).greedy


def test_a_models_recommendation_replaces_defaults():
    metadata = {
        "general.sampling.temp": np.float32(0.6),
        "general.sampling.top_k": 20,
        "general.sampling.penalty_repeat": 1.1,
        "general.sampling.top_p": 7.0,  # out of range: ignored
        "general.name": "x",
    }
    options = recommended_options(metadata)
    assert options == GenerationOptions(temperature=0.6, top_k=20, repetition_penalty=1.1)
    assert recommended_options({}) == GenerationOptions()
