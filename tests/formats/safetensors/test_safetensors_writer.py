"""The safetensors writer: files that the format's own library reads, bit for bit, in bounded memory."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.checkpoint.encodings import encoding
from nybble.checkpoint.tensor import Tensor
from nybble.formats.safetensors.reader import read_safetensors
from nybble.formats.safetensors.writer import write_safetensors, write_shards

NUMPY = {"f64": "f8", "f32": "f4", "f16": "f2", "i64": "i8", "i32": "i4", "i16": "i2", "i8": "i1"}


def a_tensor(name: str, kind: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    size = encoding(kind).nbytes(int(np.prod(shape)))
    return Tensor(name, shape, encoding(kind), np.random.default_rng(seed).integers(0, 256, size, np.uint8))


kinds = st.sampled_from(["f64", "f32", "f16", "bf16", "i64", "i32", "i16", "i8"])
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.text('abcж."\\', min_size=1), st.tuples(kinds, shapes), max_size=8),
    st.integers(1, 200),
)
def test_what_is_written_is_read(tmp_path_factory, described, shard_bytes) -> None:
    folder = tmp_path_factory.mktemp("written")
    tensors = {
        name: a_tensor(name, kind, shape, seed)
        for seed, (name, (kind, shape)) in enumerate(described.items())
    }
    written = write_shards(tensors, folder, shard_bytes=shard_bytes, metadata={"format": "pt"})
    assert sorted(folder.iterdir()) == sorted(written)
    weights = [path for path in written if path.suffix == ".safetensors"]
    theirs = {}
    for path in weights:
        found = dict(safetensors.deserialize(path.read_bytes()))
        assert len(found) == 1 or sum(len(item["data"]) for item in found.values()) <= shard_bytes
        theirs |= found
    assert {name: (item["shape"], bytes(item["data"])) for name, item in theirs.items()} == {
        name: (list(tensor.shape), tensor.data.tobytes()) for name, tensor in tensors.items()
    }
    with read_safetensors(written[-1]) as ours:  # the only file, or the index
        assert set(ours.tensors) == set(tensors)
        for name, tensor in tensors.items():
            found = ours.tensors[name]
            assert found.is_view and found.encoding == tensor.encoding
            np.testing.assert_array_equal(found.data, tensor.data)


def test_bytes_do_not_depend_on_the_order_that_tensors_come_in(tmp_path: Path) -> None:
    tensors = {name: a_tensor(name, kind, (3,)) for name, kind in (("b", "f32"), ("a", "f32"), ("c", "f64"))}
    one, other = tmp_path / "one", tmp_path / "other"
    write_safetensors(tensors, one, metadata={"y": "1", "x": "2"})
    write_safetensors(dict(reversed(tensors.items())), other, metadata={"x": "2", "y": "1"})
    assert one.read_bytes() == other.read_bytes()
    assert (8 + int.from_bytes(one.read_bytes()[:8], "little")) % 64 == 0
    assert [*read_safetensors(one).infos] == ["c", "a", "b"]


def test_the_index(tmp_path: Path) -> None:
    tensors = {name: a_tensor(name, "f32", (10,)) for name in ("c", "a", "b")}
    done = []
    paths = write_shards(tensors, tmp_path, shard_bytes=80, progress=lambda *numbers: done.append(numbers))
    assert [path.name for path in paths] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    assert json.loads(paths[-1].read_text()) == {
        "metadata": {"total_size": 120},
        "weight_map": {"a": paths[0].name, "b": paths[1].name, "c": paths[0].name},
    }
    assert done == [(40, 120), (80, 120), (120, 120)]


def test_tensors_are_computed_one_after_another(tmp_path: Path) -> None:
    size = 1 << 20
    f32 = encoding("f32")
    tensors = {
        f"t{i}": Tensor(f"t{i}", (size // 4,), f32, lambda i=i: np.full(size, i, np.uint8)) for i in range(30)
    }
    tracemalloc.start()
    try:
        write_shards(tensors, tmp_path, shard_bytes=7.5 * size)
        assert tracemalloc.get_traced_memory()[1] < 2.5 * size
    finally:
        tracemalloc.stop()
    assert len(list(tmp_path.glob("*.safetensors"))) == 5


def test_an_encoding_that_is_no_dtype_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    tensors = {"a": a_tensor("a", "f32", (4,)), "layer.weight": a_tensor("layer.weight", "q4_0", (32,))}
    with pytest.raises(
        ValueError, match=r"layer.weight: safetensors has no dtype for q4_0; choose one of f64"
    ):
        write_shards(tensors, tmp_path)
    with pytest.raises(ValueError, match="cannot be called __metadata__"):
        write_safetensors({"__metadata__": tensors["a"]}, tmp_path / "x")
    assert not [path for path in tmp_path.iterdir() if path.stat().st_size]
