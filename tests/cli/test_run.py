"""``nybble run``: what goes to the model, what goes to which stream."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from nybble.errors import ContextLengthError


def test_text_alone_on_standard_output(nybble_command, fake_model):
    result = nybble_command("run", "smollm2", "Hi")
    assert (result.code, result.out, result.err) == (0, "Hello, world\n", "")
    assert fake_model.loaded[0][0] == "smollm2"
    assert fake_model.asked == [("chat", [{"role": "user", "content": "Hi"}], {})]


def test_no_second_newline(nybble_command, fake_model):
    fake_model.pieces = ("done\n",)
    assert nybble_command("run", "m", "Hi").out == "done\n"


def test_raw_and_options(nybble_command, fake_model):
    argv = ["run", "m", "--raw", "--max-tokens", "2", "--temperature", "0", "--stop", "X", "Once"]
    assert nybble_command(*argv).out == "Hello, \n"
    assert fake_model.asked == [("raw", "Once", {"max_tokens": 2, "temperature": 0.0, "stop": ("X",)})]


def test_system_message(nybble_command, fake_model):
    nybble_command("run", "m", "--system", "Be brief", "Hi")
    messages = fake_model.asked[0][1]
    assert messages == [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi"}]


def test_load_options(nybble_command, fake_model):
    nybble_command(
        "run", "m", "Hi", "--device", "cpu", "--threads", "2", "--context-length", "100", "--kv-cache", "q8_0"
    )
    options = dict(fake_model.loaded[0][1])
    del options["progress"]
    assert options == {"device": "cpu", "threads": 2, "context_length": 100, "kv_cache": "q8_0"}


def test_chat_template_by_name_or_file(nybble_command, fake_model, tmp_path):
    path = tmp_path / "own.jinja"
    path.write_text("{{ messages }} é", encoding="utf-8")
    for given in ("chatml", str(path), "{{ bos_token }}"):
        assert nybble_command("run", "m", "Hi", "--chat-template", given).code == 0
    templates = [options["chat_template"] for _, options in fake_model.loaded]
    assert templates == ["chatml", "{{ messages }} é", "{{ bos_token }}"]


@pytest.mark.parametrize("argv", [["run", "m"], ["run", "m", "-"], ["run", "m", "-", "--max-tokens", "9"]])
def test_prompt_from_standard_input(nybble_command, fake_model, argv):
    nybble_command(*argv, stdin="two\nlines\n")
    assert fake_model.asked[0][1] == [{"role": "user", "content": "two\nlines"}]


@pytest.mark.parametrize(
    "argv",
    [
        ["run", "m", "--", "-1 + 1"],
        ["run", "--seed", "1", "m", "--", "-1 + 1"],
        ["run", "m", "--seed", "1", "--", "-1 + 1"],
    ],
)
def test_prompt_that_begins_with_a_minus(nybble_command, fake_model, argv):
    assert nybble_command(*argv).code == 0
    assert fake_model.asked[0][1] == [{"role": "user", "content": "-1 + 1"}]


def test_no_prompt_at_a_terminal(nybble_command, fake_model):
    result = nybble_command("run", "m", stdin=None)
    assert result.code == 2
    assert "no prompt: give one, pipe one in, or use nybble chat" in result.err
    assert fake_model.loaded == []


def test_json(nybble_command, fake_model):
    result = nybble_command("run", "m", "Hi", "--json")
    value = json.loads(result.out)
    assert value["text"] == "Hello, world"
    assert value["token_ids"] == [0, 1, 2]
    assert value["finish_reason"] == "stop"
    assert value["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 3,
        "cached_tokens": 0,
        "total_tokens": 10,
    }
    assert value["timings"]["decode_tokens_per_second"] == 6.0
    assert value["seed"] == 42
    assert "choices" not in value


def test_json_with_several_choices(nybble_command, fake_model):
    value = json.loads(nybble_command("run", "m", "Hi", "--json", "--n", "2").out)
    assert [choice["text"] for choice in value["choices"]] == ["Hello, world"] * 2


def test_timings_on_standard_error(nybble_command, fake_model):
    result = nybble_command("run", "m", "Hi", "--timings")
    assert result.out == "Hello, world\n"
    assert "prefill 7 tokens in 0.25 s (28.0 tokens/s)" in result.err
    assert "decode 3 tokens in 0.50 s (6.0 tokens/s)" in result.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--raw", "--system", "S"], "--system means nothing with --raw"),
        (["--raw", "--chat-template", "chatml"], "--chat-template means nothing with --raw"),
        (["--n", "2"], "--n and --logprobs need --json"),
        (["--logprobs", "2"], "--n and --logprobs need --json"),
        (["--top-p", "7"], "top_p must be between 0.0 and 1.0"),
        (["--threads", "0"], "0 is not above 0"),
    ],
)
def test_wrong_use(nybble_command, fake_model, argv, message):
    result = nybble_command("run", "m", "Hi", *argv)
    assert result.code == 2
    assert message in result.err
    assert fake_model.loaded == []


def test_failure_in_the_middle(nybble_command, fake_model):
    fake_model.failure = ContextLengthError("the context is full")
    result = nybble_command("run", "m", "Hi")
    assert result.code == 1
    assert result.out.startswith("Hello, world")
    assert result.err == "nybble: error: the context is full\n"


@pytest.mark.skipif(os.name == "nt", reason="sends a POSIX signal")
def test_ctrl_c_ends_quietly():
    script = textwrap.dedent(f"""
        import sys, nybble
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        from nybble.cli.main import main
        from fake_model import FakeModel
        nybble.load = FakeModel(["first"] + [" more"] * 100, seconds=1.0).load
        sys.exit(main(["run", "m", "Hi"]))
    """)
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            assert process.stdout.read(5) == "first"
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert err == ""
    assert out.count("more") < 5
