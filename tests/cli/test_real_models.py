"""The commands on real models, as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.real_model


def nybble(*argv, stdin="", code=0):
    result = subprocess.run(
        [sys.executable, "-m", "nybble", *map(str, argv)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        input=stdin,
        timeout=120,
        check=False,
    )
    assert result.returncode == code, result.stderr
    return result


def test_run(smollm2_path):
    argv = ["run", smollm2_path, "What is the capital of France?", "--temperature", "0", "--max-tokens", "20"]
    plain = nybble(*argv)
    assert "Paris" in plain.stdout
    assert plain.stderr == ""
    value = json.loads(nybble(*argv, "--json").stdout)
    assert value["text"] == plain.stdout.removesuffix("\n")
    assert value["usage"]["completion_tokens"] == len(value["token_ids"])
    assert value["timings"]["prefill_tokens"] == value["usage"]["prompt_tokens"] > 10


def test_run_raw_from_a_pipe(smollm2_path):
    argv = ["run", smollm2_path, "--raw", "--temperature", "0", "--max-tokens", "3"]
    assert nybble(*argv, stdin="The capital of France is\n").stdout.split()[0].startswith("Paris")


def test_same_seed_same_text(smollm2_path):
    argv = ["run", smollm2_path, "Tell me a story", "--max-tokens", "12", "--seed", "7"]
    texts = {nybble(*argv, "--threads", threads).stdout for threads in ("1", "2")}
    assert len(texts) == 1


def test_chat_remembers(smollm2_path):
    lines = "My name is Ada.\nWhat is my name?\n/stats\n"
    result = nybble("chat", smollm2_path, "--temperature", "0", "--max-tokens", "24", stdin=lines)
    assert result.stdout.count("Ada") >= 1
    assert "cached)" in result.stdout.splitlines()[-1]


def test_inspect(smollm2_path, gemma3_path):
    value = json.loads(nybble("inspect", smollm2_path, "--json").stdout)
    assert (value["architecture"], value["parameters"]) == ("llama", 134_515_008)
    assert [total["name"] for total in value["encodings"]] == ["q4_1", "q8_0", "f32"]
    assert value["tokenizer"]["vocabulary"] == 49152
    value = json.loads(nybble("inspect", gemma3_path, "--json").stdout)
    assert {total["name"] for total in value["encodings"]} == {"q8_0", "q5_0", "q6_k", "q4_k", "f32"}


def test_inspect_reads_no_weights(gemma3_path):
    code = f"""
from nybble.cli.main import main
from nybble.evaluate.benchmark import peak_memory
assert main(["inspect", {str(gemma3_path)!r}, "--tensors"]) == 0
print(peak_memory())
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert int(result.stdout.splitlines()[-1]) < 120e6  # the weights are 247 MB


def test_bench(smollm2_path):
    argv = ["bench", smollm2_path, "--prefill", "16", "--decode", "4", "--repetitions", "2", "--json"]
    value = json.loads(nybble(*argv).stdout)
    assert [row["phase"] for row in value["results"]] == ["prefill", "decode"]
    assert all(row["tokens_per_second"]["slowest"] > 1 for row in value["results"])
    assert value["threads"] >= 1
    assert value["peak_memory_bytes"] > 50e6


def test_list(smollm2_path):
    for model in json.loads(nybble("list", "--json").stdout):
        assert set(model) == {"name", "source", "path", "size", "last_used", "sha256"}


@pytest.mark.parametrize("command", ["run", "chat"])
def test_a_model_without_template_says_what_to_do(gemma3_path, command):
    result = nybble(command, gemma3_path, stdin="Hi", code=1)
    assert result.stdout == ""
    assert f"{gemma3_path} has no chat template: nybble run --raw continues a text" in result.stderr
