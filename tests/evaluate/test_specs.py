"""Models as a command line names them."""

from __future__ import annotations

import pytest

from nybble.evaluate.specs import ModelSpec, labelled, parse_spec


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a/b.gguf", ModelSpec("a/b.gguf")),
        ("folder@onnxruntime:cpu", ModelSpec("folder", "onnxruntime:cpu")),
        ("folder@onnxruntime", ModelSpec("folder", "onnxruntime")),
        ("hf:owner/repo@main", ModelSpec("hf:owner/repo@main")),
        ("hf:owner/repo/x.gguf@v1@cpu", ModelSpec("hf:owner/repo/x.gguf@v1", "cpu")),
        (
            "m.gguf@cpu,precision=f32,threads=2,label=the reference",
            ModelSpec("m.gguf", "cpu", {"precision": "f32", "threads": 2}, "the reference"),
        ),
        ("smollm2,kv_cache=f32", ModelSpec("smollm2", None, {"kv_cache": "f32"})),
        ("one, two.gguf,label=x=y", ModelSpec("one, two.gguf", label="x=y")),
        ("C:\\models\\a.gguf", ModelSpec("C:\\models\\a.gguf")),
    ],
)
def test_parse(text: str, expected: ModelSpec) -> None:
    assert parse_spec(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("m,colour=red", "'colour=red' is not OPTION=VALUE with one of precision, kv_cache, threads, label"),
        ("m,precision=", "is not OPTION=VALUE"),
        ("m,threads=0", "threads=0 is not a number above 0"),
        ("m,threads=two", "threads=two is not a number above 0"),
        ("@cpu", "names no model"),
        ("", "names no model"),
    ],
)
def test_what_is_no_spec(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_spec(text)


def test_labels_differ() -> None:
    def labels(*texts: str) -> list[str]:
        return [spec.label for spec in labelled(map(parse_spec, texts))]

    assert labels("a/x.gguf", "b/y/") == ["x.gguf", "y"]
    assert labels("x@cpu", "x@onnxruntime:cpu") == ["x@cpu", "x@onnxruntime:cpu"]
    assert labels("m", "m,precision=f32") == ["m", "m,precision=f32"]
    assert labels("a/x", "b/x") == ["a/x", "b/x"]
    assert labels("m", "m") == ["m", "m (2)"]
    assert labels("a,label=one", "b,label=two") == ["one", "two"]
