"""The command line as a whole: exit codes, errors, help, start-up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import nybble
from nybble.cli import main as main_module
from nybble.cli.main import COMMANDS, command_parser
from nybble.errors import NotFoundError

HEAVY = (
    "numpy",
    "tokenizers",
    "jinja2",
    "rich",
    "huggingface_hub",
    "prompt_toolkit",
    "urllib.request",
    "nybble._core",
)


def nybble_process(*argv, code=None, **options):
    """A real process; ``code`` replaces ``-m nybble``."""
    start = ["-m", "nybble", *argv] if code is None else ["-c", code]
    return subprocess.run(
        [sys.executable, *start], capture_output=True, text=True, timeout=60, check=False, **options
    )


def test_help_lists_every_command(nybble_command):
    result = nybble_command("--help")
    assert result.code == 0
    for name, summary in COMMANDS.items():
        assert f"  {name} " in result.out
        assert summary in result.out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(nybble_command, name):
    result = nybble_command(name, "--help")
    assert result.code == 0
    assert result.out.startswith(f"usage: nybble {name} [options]")


def test_no_command_is_wrong_use(nybble_command):
    result = nybble_command()
    assert result.code == 2
    assert "commands:" in result.out


def test_unknown_command_suggests(nybble_command):
    result = nybble_command("rnu")
    assert result.code == 2
    assert "unknown command 'rnu'; did you mean 'run'?" in result.err
    assert result.out == ""


def test_unknown_command_unlike_any(nybble_command):
    assert "commands: run, chat" in nybble_command("xyzzy").err


@pytest.mark.parametrize(
    "argv",
    [
        ["run"],
        ["run", "m", "--bad"],
        ["run", "m", "hi", "--max-tokens", "many"],
        ["run", "m", "--max", "5"],
        ["--bad", "run"],
    ],
)
def test_wrong_use(nybble_command, argv):
    result = nybble_command(*argv)
    assert result.code == 2
    assert result.err.startswith("usage: nybble")
    assert '--help" explains)' in result.err


def test_version(nybble_command):
    assert nybble_command("--version").out == f"nybble {nybble.__version__}\n"


def test_version_command(nybble_command):
    assert json.loads(nybble_command("version", "--json").out)["nybble"] == nybble.__version__
    assert nybble_command("version").out.splitlines()[0].split() == ["nybble", nybble.__version__]


def fail_with(monkeypatch, error):
    def load(*args, **options):
        raise error

    monkeypatch.setattr(nybble, "load", load, raising=False)


def test_own_errors_are_one_line(nybble_command, monkeypatch):
    fail_with(monkeypatch, NotFoundError("no model or file is called 'x'"))
    result = nybble_command("run", "x", "Hi")
    assert (result.code, result.out) == (1, "")
    assert result.err == "nybble: error: no model or file is called 'x'\n"


def test_system_errors_are_one_line(nybble_command, monkeypatch):
    fail_with(monkeypatch, PermissionError(13, "Permission denied", "model.gguf"))
    result = nybble_command("run", "x", "Hi")
    assert result.code == 1
    assert result.err == "nybble: error: [Errno 13] Permission denied: 'model.gguf'\n"


def test_a_bug_says_so(nybble_command, monkeypatch):
    fail_with(monkeypatch, KeyError("hidden_size"))
    result = nybble_command("run", "x", "Hi")
    assert result.code == 1
    assert result.err.startswith("nybble: error: unexpected KeyError: 'hidden_size' (a bug in nybble")


@pytest.mark.parametrize("argv", [["--traceback", "run", "x", "Hi"], ["run", "x", "Hi", "--traceback"]])
def test_traceback_raises(nybble_command, monkeypatch, argv):
    fail_with(monkeypatch, NotFoundError("nothing"))
    with pytest.raises(NotFoundError):
        nybble_command(*argv)


def test_interrupted(nybble_command, monkeypatch):
    fail_with(monkeypatch, KeyboardInterrupt())
    result = nybble_command("run", "x", "Hi")
    assert (result.code, result.out, result.err) == (130, "", "")


def test_unknown_model_suggests(nybble_command):
    result = nybble_command("pull", "smolm2")
    assert result.code == 1
    assert result.err.startswith("nybble: error: ")
    assert "smollm2" in result.err


def test_output_closed_is_quiet():
    # The reader takes one line of many and goes.
    code = """
import sys
from nybble.cli import main, console
class Command:
    @staticmethod
    def add_arguments(parser): pass
    @staticmethod
    def run(arguments):
        for i in range(100000): console.write("line\\n")
        return 0
sys.modules["nybble.cli.version"] = Command
sys.exit(main.main(["version"]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "line\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(60) == main_module.OUTPUT_CLOSED


def test_help_imports_nothing_heavy():
    code = f"""
import sys
from nybble.cli.main import COMMANDS, main
main(["--help"])
for name in COMMANDS:
    main([name, "--help"])
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    result = nybble_process(code=code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"


def test_python_m_nybble():
    result = nybble_process("--version")
    assert (result.returncode, result.stdout) == (0, f"nybble {nybble.__version__}\n")
    assert nybble_process("run").returncode == 2


def test_output_is_utf8_in_a_pipe():
    code = (
        "from nybble.cli import console; console.prepare_streams(); console.write('h\\u00e9 \\U0001f600\\n')"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, timeout=60, check=True, env=environment
    )
    assert result.stdout.decode("utf-8").strip() == "hé \U0001f600"


def test_docs_are_current():
    script = Path(__file__).parents[2] / "scripts" / "make_docs.py"
    result = subprocess.run(
        [sys.executable, script, "--check"], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr


def test_help_of_options_is_complete():
    for name in COMMANDS:
        for action in command_parser(name)[0]._actions:
            assert action.help, (name, action.dest)
