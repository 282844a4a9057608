"""A conversion that is killed at any moment leaves nothing that looks finished."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nybble.convert.verify import verify
from nybble.loading import read_checkpoint
from support.conversions import model_file

pytestmark = pytest.mark.slow

SCRIPT = """
import sys
from pathlib import Path
from nybble.convert.convert import convert
print("ready", flush=True)
convert(sys.argv[1], sys.argv[2], to=sys.argv[3], encoding=sys.argv[4], overwrite=len(sys.argv) > 5)
"""


def start(source: Path, target: Path, to: str, encoding: str, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, str(source), str(target), to, encoding, *more]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    return child


def finished(child: subprocess.Popen[str]) -> int:
    if child.stdout is not None:
        child.stdout.close()
    return child.wait(60)


@pytest.mark.parametrize(
    ("to", "name", "encoding"), [("gguf", "x.gguf", "q8_0"), ("safetensors", "x", "bf16")]
)
def test_killed_at_random_moments(to: str, name: str, encoding: str, tmp_path: Path) -> None:
    source = model_file(tmp_path / "model.gguf", weights="f32", embeddings="f32")
    target = tmp_path / name
    child = start(source, target, to, encoding)
    begun = time.perf_counter()
    assert finished(child) == 0
    seconds = time.perf_counter() - begun
    assert verify(target).ok
    complete = killed = 0
    moments = random.Random(1)
    for _ in range(12):
        for path in (target, tmp_path / f"{name}.nybble.json"):
            if path.is_dir():
                for file in path.iterdir():
                    file.unlink()
                path.rmdir()
            else:
                path.unlink(missing_ok=True)
        child = start(source, target, to, encoding)
        time.sleep(moments.uniform(0, seconds))
        child.kill()
        killed += finished(child) != 0
        if target.exists():
            complete += 1
            assert verify(target).ok
            assert len(read_checkpoint(target).tensors) == 21
    assert killed, "it was never killed in the middle"
    # What is left over is no obstacle.
    assert finished(start(source, target, to, encoding, "overwrite")) == 0
    assert verify(target).ok
    assert not list(tmp_path.glob("*.partial"))


def test_killed_while_it_replaces_an_output(tmp_path: Path) -> None:
    source = model_file(tmp_path / "model.gguf", weights="f32", embeddings="f32")
    target = tmp_path / "x.gguf"
    assert finished(start(source, target, "gguf", "q8_0")) == 0
    moments = random.Random(2)
    for _ in range(8):
        child = start(source, target, "gguf", "q8_0", "overwrite")
        time.sleep(moments.uniform(0, 0.6))
        child.kill()
        finished(child)
        if target.exists():
            assert verify(target).ok
