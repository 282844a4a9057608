"""What stands above the device works on ONNX folders: generate, chat with reuse, bench, the commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import nybble
from devices.onnxruntime.conftest import DATA
from nybble.errors import DeviceError
from nybble.evaluate.benchmark import measure
from nybble.loading import from_checkpoint
from support.onnx_decoders import save_decoder

FOLDER = DATA / "llama-int4-cpu"


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nybble", *map(str, arguments)],
        capture_output=True, text=True, check=False, encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def model():
    with nybble.load(FOLDER, device="onnxruntime:cpu", threads=1) as loaded:
        yield loaded


def test_generate_and_logits(model):
    text = model.generate("Hello", max_tokens=8, temperature=0)
    assert text == model.generate("Hello", max_tokens=8, temperature=0)
    ids = model.tokenizer.encode("Hello", add_special=True)
    logits = model.logits(ids)
    assert logits.shape == (len(ids), 98)
    reply = model.complete("Hello", max_tokens=1, temperature=0, logprobs=1)
    assert reply.choices[0].token_ids[0] == int(np.argmax(logits[-1]))
    assert "".join(model.stream("Hello", max_tokens=8, temperature=0)) == text


def test_chat_reuses_what_is_computed(model):
    model.forget()
    messages = [{"role": "user", "content": "Hi"}]
    first = model.chat(messages, max_tokens=4, temperature=0)
    assert first.usage.cached_tokens == 0
    messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "More"}]
    second = model.chat(messages, max_tokens=4, temperature=0)
    assert second.usage.cached_tokens > 0
    model.forget()
    assert (
        model.chat(messages, max_tokens=4, temperature=0).choices[0].token_ids == second.choices[0].token_ids
    )


def test_several_answers_and_sampling(model):
    replies = [model.complete("A", n=2, max_tokens=5, seed=3, temperature=1.0) for _ in range(2)]
    assert [choice.token_ids for choice in replies[0].choices] == [c.token_ids for c in replies[1].choices]


def test_the_benchmark(model):
    for result in measure(model.session, prefill=[8], decode=[4], depths=[0, 8], repetitions=1):
        assert result.median > 0


def test_a_model_of_another_format():
    from support.tiny_models import tiny_checkpoint

    with pytest.raises(DeviceError, match="convert it first"):
        from_checkpoint(tiny_checkpoint(), device="onnxruntime:cpu")


def test_the_commands():
    answer = command(
        "run", FOLDER, "Hi", "--device", "onnxruntime:cpu", "--max-tokens", 4, "--json", "--temperature", 0
    )
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["usage"]
    missing = command("run", FOLDER, "Hi", "--device", "onnxruntime:qnn")
    assert missing.returncode == 1 and "pip install onnxruntime-qnn" in missing.stderr
    listed = json.loads(command("devices", "--json").stdout)
    found = next(report for report in listed if report["name"] == "onnxruntime")
    assert found["available"] and found["facts"]["providers"]["onnxruntime:cpu"] == ""
    text = command("devices").stdout
    assert "onnxruntime:cuda" in text and "onnxruntime-gpu" in text


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["llama-int4-cpu", "phi3-longrope-int4-cpu"])
def test_the_tokens_of_onnxruntime_genai(name):
    """Greedy tokens on the same folder; below LongRoPE's switch, where onnxruntime-genai needs no help."""
    genai = pytest.importorskip("onnxruntime_genai")
    prompt = [5, 17, 33, 4, 8]
    length = 16 if "longrope" in name else 48
    theirs = genai.Model(str(DATA / name))
    parameters = genai.GeneratorParams(theirs)
    parameters.set_search_options(max_length=length, do_sample=False)
    generator = genai.Generator(theirs, parameters)
    generator.append_tokens(np.array(prompt, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    expected = list(generator.get_sequence(0))[len(prompt) :]
    with nybble.load(DATA / name, device="onnxruntime:cpu", threads=1) as model:
        found = model.complete(prompt, max_tokens=length - len(prompt), temperature=0).choices[0].token_ids
    assert list(found) == expected[: len(found)] and len(found) >= 5


def test_inspect_of_what_is_not_recognised(tmp_path):
    folder = save_decoder(tmp_path / "strange")
    shown = command("inspect", folder, "--json")
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["format"] == "onnx"
    assert "--device onnxruntime alone" in shown.stderr
