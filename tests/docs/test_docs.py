"""The documentation is true: its links lead somewhere, its tables are complete, its code runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nybble.checkpoint.encodings import ENCODINGS
from nybble.generate.options import GenerationOptions
from nybble.hub import KNOWN_MODELS
from nybble.models import ARCHITECTURES

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[object]:
    """Every code block of that language, with the page and line where it is."""
    found: list[object] = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in _BLOCK.finditer(text):
            if match[1] == language:
                line = text.count("\n", 0, match.start()) + 1
                found.append(pytest.param(match[2], id=f"{page.name}:{line}"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = [t for t in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in t]
    for target in targets:
        assert (page.parent / target.partition("#")[0]).exists(), f"{page.name} links to {target}"


def names(page: str) -> set[str]:
    """What stands in backquotes on a page."""
    return set(re.findall(r"`([^`\n]+)`", (ROOT / "docs" / page).read_text(encoding="utf-8")))


def test_every_known_model_is_documented() -> None:
    assert {model.name for model in KNOWN_MODELS} <= names("models.md")


def test_every_encoding_is_documented() -> None:
    quantized = {name for name, row in ENCODINGS.items() if row.block_size > 1}
    assert quantized <= names("formats-gguf.md")


def test_every_option_is_documented() -> None:
    assert set(GenerationOptions.__dataclass_fields__) <= names("generation.md")


def test_every_architecture_is_named_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in ARCHITECTURES if name not in text] == []


def run(command: list[str], folder: Path) -> None:
    scripts = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": scripts + os.pathsep + os.environ["PATH"]}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip(), "it printed nothing"


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.network
@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code: str, tmp_path: Path) -> None:
    run([sys.executable, "-W", "error", "-c", code], tmp_path)


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.network
@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
@pytest.mark.parametrize("script", blocks("bash"))
def test_bash_blocks_run(script: str, tmp_path: Path) -> None:
    run(["bash", "-euo", "pipefail", "-c", script], tmp_path)
