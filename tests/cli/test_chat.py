"""``nybble chat``: conversations from a pipe, and Ctrl-C at a real terminal."""

from __future__ import annotations

import json
import os
import re
import sys
import textwrap
import time

import pytest

from nybble.errors import ContextLengthError


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


ANSWER = assistant("Hello, world")


def asked(model):
    return [messages for _, messages, _ in model.asked]


def test_conversation_grows(nybble_command, fake_model):
    result = nybble_command("chat", "m", stdin="Hi\n\nAnd you?\n")
    assert (result.code, result.out, result.err) == (0, "Hello, world\nHello, world\n", "")
    assert asked(fake_model) == [[user("Hi")], [user("Hi"), ANSWER, user("And you?")]]


def test_several_lines(nybble_command, fake_model):
    nybble_command("chat", "m", stdin='"""\nfirst\nsecond\n"""\none \\\ntwo\n')
    assert asked(fake_model)[0] == [user("first\nsecond")]
    assert asked(fake_model)[1][-1] == user("one \ntwo")


def test_system_and_reset(nybble_command, fake_model):
    nybble_command("chat", "m", "--system", "Be brief", stdin="Hi\n/reset\nAgain\n/system Be kind\nMore\n")
    assert asked(fake_model) == [
        [system("Be brief"), user("Hi")],
        [system("Be brief"), user("Again")],
        [system("Be kind"), user("More")],
    ]


def test_set(nybble_command, fake_model):
    lines = "/set temperature 0\n/set max-tokens 2\nHi\n/set temperature default\nHi\n/set\n"
    result = nybble_command("chat", "m", "--seed", "5", stdin=lines)
    options = [given for _, _, given in fake_model.asked]
    assert options == [{"seed": 5, "temperature": 0.0, "max_tokens": 2}, {"seed": 5, "max_tokens": 2}]
    assert "cut off at max_tokens" in result.err
    assert "  seed = 5\n  max_tokens = 2\n" in result.out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/set temprature 1", "/set: no option 'temprature'; did you mean temperature?"),
        ("/set temprature", "/set: no option 'temprature'; did you mean temperature?"),
        ("/set temperature hot", "/set: temperature: 'hot' is not T"),
        ("/set top_p 2", "/set: top_p must be between 0.0 and 1.0, got 2.0"),
        ("/set n 2", "/set: n has no use in a chat"),
        ("/save", "/save: name a file"),
        ("/load nowhere.json", "/load: [Errno 2]"),
        ("/stats maybe", "/stats: on, off or nothing"),
        ("/nonsense", "no command /nonsense; /help lists them"),
    ],
)
def test_wrong_commands_do_not_end_the_chat(nybble_command, fake_model, line, message):
    result = nybble_command("chat", "m", stdin=f"{line}\nHi\n")
    assert result.code == 0
    assert f"nybble: error: {message}" in result.err
    assert asked(fake_model) == [[user("Hi")]]


def test_save_and_load(nybble_command, fake_model, tmp_path):
    path = tmp_path / "talk.json"
    nybble_command("chat", "m", "--system", "Be brief", stdin=f"Grüße\n/save {path}\n")
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert saved == {"model": "m", "messages": [system("Be brief"), user("Grüße"), ANSWER]}
    for argv, stdin in ((["--load", str(path)], "More\n"), ([], f"/load {path}\nMore\n")):
        fake_model.asked.clear()
        assert nybble_command("chat", "m", *argv, stdin=stdin + "/reset\nNew\n").code == 0
        assert asked(fake_model) == [[*saved["messages"], user("More")], [system("Be brief"), user("New")]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "holds no list of messages"),
        ('[{"role": "robot", "content": "x"}]', "message 0 lacks a role"),
        ('[{"role": "user", "content": 5}]', "message 0 lacks a role"),
        ("no json", "Expecting value"),
    ],
)
def test_load_refuses_other_files(nybble_command, fake_model, tmp_path, content, message):
    path = tmp_path / "talk.json"
    path.write_text(content, encoding="utf-8")
    result = nybble_command("chat", "m", stdin=f"/load {path}\nHi\n")
    assert message in result.err
    assert asked(fake_model) == [[user("Hi")]]
    assert nybble_command("chat", "m", "--load", str(path)).code == 1


def test_stats(nybble_command, fake_model):
    result = nybble_command("chat", "m", stdin="/stats\nHi\n/stats\n/stats on\nHi\n/stats off\nHi\n")
    line = "load 0.50 s · prefill 7 tokens in 0.25 s (28.0 tokens/s)"
    line += " · decode 3 tokens in 0.50 s (6.0 tokens/s) · stop\n"
    assert result.out == f"no answer yet\nHello, world\n{line}Hello, world\nHello, world\n"
    assert result.err == line


def test_help_and_quit(nybble_command, fake_model):
    result = nybble_command("chat", "m", stdin="/help\n/quit\nHi\n")
    assert result.code == 0
    assert fake_model.asked == []
    for name in ("/reset", "/save FILE", "/set [OPTION VALUE]", "/quit"):
        assert f"  {name} " in result.out


def test_failure_takes_the_message_back(nybble_command, fake_model):
    fake_model.failure = ContextLengthError("the prompt has 900 tokens")
    result = nybble_command("chat", "m", stdin="Hi\nShorter\n")
    assert result.code == 0
    assert result.err.count("nybble: error: the prompt has 900 tokens") == 2
    assert asked(fake_model) == [[user("Hi")], [user("Shorter")]]


def test_load_and_system_contradict(nybble_command, fake_model):
    assert nybble_command("chat", "m", "--load", "x", "--system", "y").code == 2


class TerminalProcess:
    """A Python script whose terminal is a pseudo-terminal of ours."""

    def __init__(self, script, environment):
        import pty

        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.execve(sys.executable, [sys.executable, "-c", script], environment)
        self.text = ""

    def expect(self, pattern, seconds=60.0):
        """Waits until the output since the last call matches, and returns what came before its end."""
        import select

        deadline = time.monotonic() + seconds
        while not (match := re.search(pattern, self.text)):
            ready, _, _ = select.select([self.terminal], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{pattern!r} did not come; got {self.text!r}"
            try:
                chunk = os.read(self.terminal, 4096)
            except OSError:
                chunk = b""
            assert chunk, f"{pattern!r} did not come before the end; got {self.text!r}"
            # Editing answers to no question of the terminal; escapes would only hide the words.
            self.text += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", chunk.decode("utf-8", "replace"))
        before, self.text = self.text[: match.end()], self.text[match.end() :]
        return before

    def type(self, text):
        os.write(self.terminal, text.encode())

    def wait(self):
        import select

        while select.select([self.terminal], [], [], 10)[0]:
            try:
                if not os.read(self.terminal, 4096):
                    break
            except OSError:
                break
        _, status = os.waitpid(self.pid, 0)
        os.close(self.terminal)
        return os.waitstatus_to_exitcode(status)


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX pseudo-terminal")
def test_at_a_terminal(tmp_path):
    script = textwrap.dedent(f"""
        import sys, nybble
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        from nybble.cli.main import main
        from fake_model import FakeModel
        nybble.load = FakeModel(["piece one"] + [" and more"] * 1000, seconds=0.2).load
        sys.exit(main(["chat", "m"]))
    """)
    environment = {
        **os.environ,
        "XDG_STATE_HOME": str(tmp_path),
        "TERM": "xterm",
        "PROMPT_TOOLKIT_NO_CPR": "1",
    }
    process = TerminalProcess(script, environment)
    process.expect(">>>")
    process.type("Hi\r")
    process.expect("piece one and more")
    process.type("\x03")
    process.expect("stopped")  # the answer ends, the program does not
    process.expect(">>>")
    process.type("half a line\x03")
    process.expect("/quit leaves")
    process.expect(">>>")
    process.type("/save " + str(tmp_path / "talk.json") + "\r")
    process.expect("saved 2 messages")
    process.expect(">>>")
    process.type("\x04")
    assert process.wait() == 0
    user_message, answer = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))["messages"]
    assert user_message == user("Hi")
    assert answer["content"].startswith("piece one and more")
    assert len(answer["content"]) < 500
    assert "+Hi" in (tmp_path / "nybble" / "chat_history").read_text(encoding="utf-8")
