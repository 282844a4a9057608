"""Every generation option of the library can be given, and only what is given is passed on."""

from __future__ import annotations

import argparse
import dataclasses

import pytest

from nybble.cli.main import UsageError
from nybble.cli.options import (
    GENERATION,
    NOT_OFFERED,
    add_generation_arguments,
    add_load_arguments,
    generation_options,
    load_options,
    parse_setting,
)
from nybble.generate.options import GenerationOptions


def parse(*argv):
    parser = argparse.ArgumentParser()
    add_generation_arguments(parser)
    return generation_options(parser.parse_args(argv))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pirate.gguf", ("pirate.gguf", 1.0)),
        ("pirate.gguf:0.5", ("pirate.gguf", 0.5)),
        ("folder/pirate:-1", ("folder/pirate", -1.0)),
        ("hf:owner/repo", ("hf:owner/repo", 1.0)),
        ("hf:owner/repo:2", ("hf:owner/repo", 2.0)),
        ("C:\\pirate.gguf", ("C:\\pirate.gguf", 1.0)),
        (":1", (":1", 1.0)),
    ],
)
def test_adapters(text, expected):
    parser = argparse.ArgumentParser()
    add_load_arguments(parser)
    assert load_options(parser.parse_args(["--adapter", text])) == {"adapters": [expected]}
    assert load_options(parser.parse_args([])) == {}


def test_every_option_of_the_library_is_offered():
    fields = {field.name for field in dataclasses.fields(GenerationOptions)}
    assert {option.name for option in GENERATION} == fields - set(NOT_OFFERED)


def test_only_what_was_given():
    assert parse() == {}
    assert parse("--temperature", "0", "--seed", "0") == {"temperature": 0.0, "seed": 0}


def test_collections():
    options = parse(
        "--stop", "a", "--stop", "b", "--stop-tokens", "3", "--logit-bias", "5=-inf", "--logit-bias", "7=1.5"
    )
    assert options == {"stop": ("a", "b"), "stop_tokens": (3,), "logit_bias": {5: float("-inf"), 7: 1.5}}


def test_switches():
    assert parse("--ignore-eos", "--trust-content") == {"ignore_eos": True, "trust_content": True}


def test_out_of_range():
    with pytest.raises(UsageError, match="top_p must be between"):
        parse("--top-p", "2")


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("temperature", "0.5", ("temperature", 0.5)),
        ("max-tokens", "12", ("max_tokens", 12)),
        ("ignore_eos", "on", ("ignore_eos", True)),
        ("ignore_eos", "off", ("ignore_eos", False)),
        ("stop", "END", ("stop", ("END",))),
        ("logit_bias", "5=-1", ("logit_bias", {5: -1.0})),
    ],
)
def test_settings(name, text, expected):
    assert parse_setting(name, text) == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("temprature", "1", "did you mean temperature"),
        ("temperature", "hot", "'hot' is not T"),
        ("top_p", "3", "top_p must be between"),
        ("ignore_eos", "maybe", "on or off"),
        ("logit_bias", "5", "not TOKEN=AMOUNT"),
    ],
)
def test_wrong_settings(name, text, message):
    with pytest.raises(UsageError, match=message):
        parse_setting(name, text)
