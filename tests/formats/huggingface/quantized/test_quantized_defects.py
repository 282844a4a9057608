"""Damaged files: whatever is changed, the answer is tensors or one of our errors, never anything else."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.encodings import encoding
from nybble.checkpoint.encodings.affine import AffineFormat
from nybble.checkpoint.tensor import Tensor
from nybble.errors import FormatError, UnsupportedError
from nybble.formats.huggingface.quantized import pack_quantized, quantized_tensors
from support.affine_models import affine_tensor, permutation_tensor
from support.random_checkpoints import LLAMA

WEIGHT, ORDER = "a.q_proj.weight", "a.q_proj.input_permutation"


def _files() -> dict[str, tuple[dict[str, Tensor], dict[str, Any]]]:
    tensor = affine_tensor(WEIGHT, AffineFormat(4, 32, "f16", True), (32, 64))
    plain = {WEIGHT: tensor}
    ordered = {WEIGHT: tensor, ORDER: permutation_tensor(ORDER, 64)}
    files: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {}
    for method, tensors in (("awq", plain), ("gptq", ordered), ("compressed-tensors", plain)):
        raw, config = pack_quantized(Checkpoint(LLAMA, tensors), method)
        files[method] = {name: piece.changed(data=piece.data) for name, piece in raw.items()}, dict(config)
    weight = Tensor(WEIGHT, (8, 32), encoding("i8"), np.arange(256, dtype=np.uint8))
    scale = Tensor(f"{WEIGHT}_scale", (8, 1), encoding("f32"), np.ones(8, np.float32).view(np.uint8))
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel"}}
    config = {
        "quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"group_0": group},
    }  # fmt: skip
    files["int-quantized"] = {tensor.name: tensor for tensor in (weight, scale)}, config
    return files


FILES = _files()
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 300) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


def _places(values: Any) -> list[tuple[Any, Any]]:
    """Every container of a config with each of its keys."""
    keys = values if isinstance(values, dict) else range(len(values)) if isinstance(values, list) else ()
    found = [(values, key) for key in keys]
    return found + [place for _, key in list(found) for place in _places(values[key])]


def _damage(draw: st.DrawFn, tensors: dict[str, Tensor]) -> None:
    name = draw(st.sampled_from(sorted(tensors)))
    tensor = tensors.pop(name)
    kind = draw(st.sampled_from(["gone", "renamed", "shape", "encoding", "bytes"]))
    if kind == "renamed":
        other = draw(st.sampled_from(["weight", "qzeros", "weight_scale", "g_idx", "bias", "k_scale", ""]))
        tensors[f"a.q_proj.{other}"] = tensor.changed(name=f"a.q_proj.{other}")
    elif kind == "bytes":
        random = np.random.default_rng(draw(st.integers(0, 99)))
        data = random.integers(0, 256, tensor.nbytes, dtype=np.uint8)
        tensors[name] = tensor.changed(data=data)
    elif kind in ("shape", "encoding"):
        shape = tensor.shape
        if kind == "shape":
            shape = tuple(draw(st.lists(st.sampled_from([0, 1, 2, 3, 8, 31, 32, 64]), max_size=3)))
        row = draw(st.sampled_from([encoding(n) for n in ("i8", "i32", "i64", "f16", "bf16", "f32")]))
        row = row if kind == "encoding" else tensor.encoding
        size = row.nbytes(int(np.prod(shape)))
        tensors[name] = Tensor(name, shape, row, np.resize(tensor.data, size))


@st.composite
def damaged(draw: st.DrawFn, method: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, config = dict(FILES[method][0]), copy.deepcopy(FILES[method][1])
    for _ in range(draw(st.integers(0, 2))):
        if tensors:
            _damage(draw, tensors)
    for _ in range(draw(st.integers(0, 2))):
        container, key = draw(st.sampled_from(_places(config)))
        container[key] = draw(JSON)
    return tensors, config


@pytest.mark.parametrize("method", FILES)
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(data=st.data())
def test_only_our_errors(method: str, data: st.DataObject) -> None:
    tensors, config = data.draw(damaged(method))
    try:
        for tensor in quantized_tensors(tensors, config, LLAMA).values():
            assert tensor.data.shape == (tensor.nbytes,)
    except (FormatError, UnsupportedError) as error:
        assert str(error)


@pytest.mark.parametrize("method", FILES)
def test_whole_files_are_read(method: str) -> None:
    assert WEIGHT in quantized_tensors(*FILES[method])
