"""Conversions stream: memory follows the largest tensor, not the model."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.encodings import encoding
from nybble.checkpoint.tensor import Tensor
from nybble.convert.threads import in_order
from nybble.formats.huggingface.writer import write_huggingface_folder
from support.random_checkpoints import LLAMA, rope, shapes

CONFIG = replace(
    LLAMA,
    hidden_size=1024,
    intermediate_size=4096,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=128,
    num_hidden_layers=24,
    rope=rope(128),
)
LARGEST = 1024 * 4096

RUN = """
import json, resource, sys
import numpy, onnx, nybble.convert.convert, nybble.formats.onnx.write
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
nybble.convert(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))
print(before * 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 800 MB in bf16."""
    bf16 = encoding("bf16")
    assert bf16.quantize is not None
    pool = bf16.quantize((np.random.default_rng(0).standard_normal(LARGEST) * 0.02).astype(np.float32))

    def tensor(name: str, shape: tuple[int, ...]) -> Tensor:
        return Tensor(name, shape, bf16, lambda: np.resize(pool, 2 * int(np.prod(shape))))

    path = tmp_path_factory.mktemp("model")
    tensors = {name: tensor(name, shape) for name, shape in shapes(CONFIG).items()}
    write_huggingface_folder(Checkpoint(CONFIG, tensors), path)
    assert sum(file.stat().st_size for file in path.iterdir()) > 750_000_000
    return path


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read as Linux counts it")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("x.gguf", {"to": "gguf", "encoding": "q8_0"}),
        ("y.gguf", {"to": "gguf"}),
        ("folder", {"to": "safetensors", "encoding": "f32"}),
        ("onnx", {"to": "onnx-cpu-int4"}),
    ],
)
def test_memory_follows_the_largest_tensor(
    name: str, options: dict[str, str], folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("onnx")
    command = [sys.executable, "-c", RUN, str(folder), str(tmp_path / name), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    before, peak = map(int, done.stdout.split())
    # Some copies of the largest tensor in float32 (17 MB), what threads work on, and no model.
    assert peak - before < 150_000_000


def test_pieces_come_in_order_and_errors_in_their_place() -> None:
    assert list(in_order(lambda item: item * item, range(100))) == [item * item for item in range(100)]
    seen = []
    with pytest.raises(ZeroDivisionError):
        for result in in_order(lambda item: 1 // (item - 20), range(1000)):
            seen.append(result)
    assert len(seen) == 20
    assert list(in_order(str, [])) == []
