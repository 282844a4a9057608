"""SmolLM2, Gemma 3 and the Phi-3 made from SmolLM2, between all formats.

Exact ways give the same file again, and the same text; where a way is not exact it says so. Gemma 3, by far
the largest, is left out where its mix of block types is gone before the way begins.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import numpy as np
import pytest

import nybble
from nybble.convert.convert import convert
from nybble.convert.verify import verify
from nybble.loading import read_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.real_model]

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def phi3_path(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf")
    from support.phi3_from_smollm2 import make_phi3

    path = tmp_path_factory.mktemp("phi3") / "phi3.gguf"
    make_phi3(smollm2_path, path)
    return path


@pytest.fixture(params=["smollm2", "gemma3", "phi3"])
def source(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(f"{request.param}_path")
    return path


@pytest.fixture(params=["smollm2", "phi3"])
def small_source(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(f"{request.param}_path")
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def text(path: Path) -> str:
    model = nybble.load(path, precision="f32")
    answer: str = model.generate(PROMPT, max_tokens=8, temperature=0)
    return answer


@functools.lru_cache
def expected_text(source: Path) -> str:
    """The text of a model that several tests convert."""
    return text(source)


def same_tensors(one: Path, other: Path) -> None:
    first, second = read_checkpoint(one), read_checkpoint(other)
    assert list(first.tensors) == list(second.tensors)
    for name, tensor in first.tensors.items():
        assert second.tensors[name].encoding == tensor.encoding, name
        assert np.array_equal(second.tensors[name].data, tensor.data), name


def test_gguf_to_safetensors_and_back_is_the_same_file(source: Path, tmp_path: Path) -> None:
    there = convert(source, tmp_path / "folder", to="safetensors")
    assert there.relation == "exact" and verify(tmp_path / "folder").ok
    back = convert(tmp_path / "folder", tmp_path / "back.gguf", to="gguf")
    assert back.relation == "exact"
    assert sha256(tmp_path / "back.gguf") == sha256(source)
    assert text(tmp_path / "folder") == expected_text(source)


def test_gguf_to_onnx_and_back_gives_the_same_tensors(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    there = convert(source, tmp_path / "onnx", to="onnx", encoding="f32")
    assert there.relation == "exact" and verify(tmp_path / "onnx").ok
    assert convert(tmp_path / "onnx", tmp_path / "back.gguf", to="gguf").relation == "exact"
    same_tensors(source, tmp_path / "back.gguf")
    assert text(tmp_path / "onnx") == expected_text(source)


@pytest.mark.parametrize("to", ["onnx", "onnx-portable"])
def test_gguf_goes_through_onnx_as_integers(source: Path, to: str, tmp_path: Path) -> None:
    """Every block type of these files, those with minima too."""
    pytest.importorskip("onnx")
    there = convert(source, tmp_path / "onnx", to=to)
    assert there.relation == "exact" and verify(tmp_path / "onnx").ok
    kinds = {t.target for t in there.tensors if t.source in ("q4_1", "q4_k", "q5_k")}
    assert kinds and all(kind.endswith("_m") for kind in kinds)
    assert convert(tmp_path / "onnx", tmp_path / "back.gguf", to="gguf").relation == "exact"
    same_tensors(source, tmp_path / "back.gguf")
    assert text(tmp_path / "onnx") == expected_text(source)


def greedy(folder: Path, ids: list[int], count: int) -> list[int]:
    """Token ids that onnxruntime-genai generates."""
    genai = pytest.importorskip("onnxruntime_genai")
    model = genai.Model(str(folder))
    options = genai.GeneratorParams(model)
    options.set_search_options(do_sample=False, max_length=len(ids) + count, min_length=len(ids) + count)
    generator = genai.Generator(model, options)
    generator.append_tokens(np.array(ids, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    found: list[int] = generator.get_sequence(0).tolist()[len(ids) :]
    return found


def test_stock_onnxruntime_genai_says_the_same(source: Path, tmp_path: Path) -> None:
    """16 greedy tokens of the exact folder, ``accuracy_level`` 0, are those of the GGUF file."""
    pytest.importorskip("onnx")
    convert(source, tmp_path / "onnx", to="onnx")
    model = nybble.load(source, precision="f32")
    ids = list(model.tokenizer.encode(PROMPT, add_special=True))
    expected = []
    for _ in range(16):
        expected.append(int(np.argmax(model.logits([*ids, *expected])[-1])))
    assert greedy(tmp_path / "onnx", ids, 16) == expected


@pytest.mark.parametrize("kind", ["q4_0", "q8_0"])
def test_simple_blocks_go_through_onnx_as_they_are(kind: str, small_source: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    blocks = tmp_path / "blocks.gguf"
    convert(small_source, blocks, to="gguf", encoding=kind)
    there = convert(blocks, tmp_path / "onnx", to="onnx")
    assert there.relation == "exact"
    assert {tensor.how.split(", ")[-1] for tensor in there.tensors} == {"kept", "transcoded"}
    assert convert(tmp_path / "onnx", tmp_path / "back.gguf", to="gguf").relation == "exact"
    same_tensors(blocks, tmp_path / "back.gguf")


def test_simple_blocks_go_through_compressed_tensors_as_they_are(small_source: Path, tmp_path: Path) -> None:
    blocks = tmp_path / "blocks.gguf"
    convert(small_source, blocks, to="gguf", encoding="q4_0")
    there = convert(blocks, tmp_path / "folder", to="safetensors", quantization="compressed-tensors")
    assert there.relation == "exact"
    convert(tmp_path / "folder", tmp_path / "back.gguf", to="gguf")
    assert sha256(tmp_path / "back.gguf") == sha256(blocks)


def test_safetensors_to_onnx_and_back(small_source: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    convert(small_source, tmp_path / "folder", to="safetensors", encoding="f16")
    there = convert(tmp_path / "folder", tmp_path / "onnx", to="onnx")
    assert there.relation == "exact"
    report = convert(tmp_path / "onnx", tmp_path / "back", to="safetensors", encoding="f16")
    assert report.relation == "exact"
    first, second = read_checkpoint(tmp_path / "folder"), read_checkpoint(tmp_path / "back")
    assert set(first.tensors) == set(second.tensors)
    for name, tensor in first.tensors.items():
        if len(tensor.shape) == 2:
            assert np.array_equal(second.tensors[name].data, tensor.data), name


def test_int4_for_onnx_runtime_loses_nothing_unless_asked(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    report = convert(source, tmp_path / "onnx", to="onnx-cpu-int4")
    assert report.relation == "exact" and report.bits_per_weight < 11
    report = convert(source, tmp_path / "rounded", to="onnx-cpu-int4", encoding="int4_g32_f32")
    lossy = {tensor.name for tensor in report.tensors if tensor.relation == "lossy"}
    assert lossy and all(0 < t.relative_error < 0.2 for t in report.tensors if t.name in lossy)
