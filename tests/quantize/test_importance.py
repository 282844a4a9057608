"""Importance matrices in both of llama.cpp's formats: against gguf-py, against the layout, and damaged."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nybble.errors import FormatError, NotFoundError, UnsupportedError
from nybble.formats.output import OutputError
from nybble.quantize.importance import (
    Importance,
    ImportanceMatrix,
    format_of,
    read_importance,
    write_importance,
)
from nybble.quantize.statistics import InputStatistics
from support.random_checkpoints import LLAMA, random_checkpoint

Q, DOWN = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"


def matrix() -> ImportanceMatrix:
    return ImportanceMatrix(
        {
            Q: Importance(np.array([1.0, 2.5, 0.0, 1e6]), 1000),
            DOWN: Importance(np.array([3.0, 4.0]), 1000),
            "lm_head.weight": Importance(np.array([7.0]), 1000),
        },
        ("a.txt", "b.txt"),
        chunk_count=2,
        chunk_size=500,
    )


def legacy(entries: list[tuple[bytes, int, list[float]]], tail: bytes = b"") -> bytes:
    """The old format by its layout."""
    parts = [struct.pack("<i", len(entries))]
    for name, calls, values in entries:
        parts.append(struct.pack("<i", len(name)) + name + struct.pack("<ii", calls, len(values)))
        parts.append(np.array(values, "<f4").tobytes())
    return b"".join(parts) + tail


def test_gguf_is_as_llama_cpp_has_it(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.gguf"
    write_importance(matrix(), path, "llama")
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "imatrix"
    assert fields["imatrix.datasets"] == ["a.txt", "b.txt"]
    assert (fields["imatrix.chunk_count"], fields["imatrix.chunk_size"]) == (2, 500)
    assert reader.fields["imatrix.chunk_count"].types == [gguf.GGUFValueType.UINT32]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert sorted(tensors) == sorted(
        f"{name}.{kind}"
        for name in ("blk.0.attn_q.weight", "blk.1.ffn_down.weight", "output.weight")
        for kind in ("in_sum2", "counts")
    )
    assert tensors["blk.0.attn_q.weight.in_sum2"].data.tolist() == [1.0, 2.5, 0.0, 1e6]
    assert tensors["blk.0.attn_q.weight.counts"].data.tolist() == [1000.0]
    assert all(tensor.tensor_type == gguf.GGMLQuantizationType.F32 for tensor in tensors.values())


def test_gguf_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.gguf"
    write_importance(matrix(), path, "llama")
    found = read_importance(path, "llama")
    assert (found.datasets, found.chunk_count, found.chunk_size) == (("a.txt", "b.txt"), 2, 500)
    assert set(found.entries) == set(matrix().entries)
    for name, entry in matrix().entries.items():
        assert found.entries[name].tokens == entry.tokens
        assert np.array_equal(found.entries[name].sum_squares, entry.sum_squares)
    again = tmp_path / "again.gguf"
    write_importance(found, again, "llama")
    assert again.read_bytes() == path.read_bytes()


def test_what_gguf_py_writes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", ["x"])
    for name, shape in (("blk.0.attn_q.weight", (1, 4)), ("blk.1.ffn_down.weight", (2,))):
        writer.add_tensor(f"{name}.in_sum2", np.full(shape, 6.0, np.float32))
        writer.add_tensor(f"{name}.counts", np.full((1, 1), 3.0, np.float32))
        writer.add_tensor(f"{name}.in_sum", np.full(shape, -1.0, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_importance(path, "llama")
    assert found.datasets == ("x",)
    assert found.weights(Q).tolist() == [2.0] * 4 and found.weights(DOWN).tolist() == [2.0] * 2
    assert found.weights("lm_head.weight") is None


def test_legacy_is_as_llama_cpp_has_it(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.dat"
    write_importance(matrix(), path, "llama", file_format="legacy")
    # 1000 tokens are 2 chunks of 500: the mean of squares times 2.
    expected = legacy(
        [
            (b"blk.0.attn_q.weight", 2, [0.002, 0.005, 0.0, 2000.0]),
            (b"blk.1.ffn_down.weight", 2, [0.006, 0.008]),
            (b"output.weight", 2, [0.014]),
        ],
        struct.pack("<ii", 2, 5) + b"b.txt",
    )
    assert path.read_bytes() == expected
    found = read_importance(path, "llama")
    assert (found.datasets, found.chunk_count) == (("b.txt",), 2)
    for name, entry in matrix().entries.items():
        assert np.allclose(found.weights(name), entry.mean_squares, rtol=1e-6)


def test_the_oldest_files_end_after_their_entries(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.dat"
    path.write_bytes(legacy([(b"blk.0.attn_q.weight", 4, [8.0, 2.0]), (b"output.weight", 0, [3.0])]))
    found = read_importance(path, "llama")
    assert found.weights(Q).tolist() == [2.0, 0.5]
    assert found.weights("lm_head.weight").tolist() == [3.0]
    assert (found.datasets, found.chunk_count) == ((), 0)


GOOD = legacy([(b"blk.0.attn_q.weight", 4, [8.0, 2.0])])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"abc", "needs 4 bytes"),
        (struct.pack("<i", 0) + bytes(20), "0 entries: not an importance matrix"),
        (b"\xff\xff\xff\x7f" + bytes(100), "2147483647 entries"),
        (GOOD[:-1], "the values of blk.0.attn_q.weight needs 8 bytes"),
        (GOOD[:12], "not an importance matrix"),
        (struct.pack("<ii", 1, 5000) + bytes(20), "a tensor's name is 5000 bytes long; at most 1024"),
        (legacy([(b"\xff\xfe", 4, [8.0, 2.0, 1.0])]), "a tensor's name is not UTF-8"),
        (legacy([(b"blk.0.attn_q.weight", -1, [8.0])]), "has 1 values of 4294967295 calls"),
        (legacy([(b"blk.0.attn_q.weight", 4, [-8.0])]), "negative or not finite"),
        (legacy([(b"blk.0.attn_q.weight", 4, [float("nan")])]), "negative or not finite"),
        (GOOD + struct.pack("<ii", 2, 5), "the name of the text needs 5 bytes"),
    ],
)
def test_damaged_legacy_files(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "imatrix.dat"
    path.write_bytes(data)
    with pytest.raises(FormatError, match=message):
        read_importance(path, "llama")


@given(data=st.binary(max_size=200), cut=st.integers(0, len(GOOD)))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_read_or_refused(tmp_path: Path, data: bytes, cut: int) -> None:
    path = tmp_path / "imatrix.dat"
    path.write_bytes(GOOD[:cut] + data or b"\0")
    try:
        found = read_importance(path, "llama")
    except (FormatError, UnsupportedError):
        return
    assert found.entries


def written(path: Path, kind: str | None, tensors: dict[str, np.ndarray]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    if kind is not None:
        writer.add_string("general.type", kind)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


ONE = np.ones(1, np.float32)


@pytest.mark.parametrize(
    ("kind", "tensors", "error", "message"),
    [
        ("model", {}, FormatError, "general.type is 'model'; an importance matrix has 'imatrix'"),
        (None, {}, FormatError, "general.type is None"),
        ("imatrix", {}, FormatError, "holds no sums"),
        ("imatrix", {"blk.0.attn_q.weight.in_sum2": ONE}, FormatError, "in_sum2 has no counts beside it"),
        ("imatrix", {"blk.0.attn_q.weight.counts": ONE}, FormatError, "counts has no in_sum2 beside it"),
        (
            "imatrix",
            {"blk.0.attn_q.weight.in_sum2": ONE.astype(np.float16), "blk.0.attn_q.weight.counts": ONE},
            FormatError,
            "is f16, not f32",
        ),
        (
            "imatrix",
            {"blk.0.ffn_up.weight.in_sum2": ONE, "blk.0.ffn_up.weight.counts": np.ones(8, np.float32)},
            UnsupportedError,
            "has 8 experts",
        ),
        (
            "imatrix",
            {"blk.0.attn_q.weight.in_sum2": ONE, "blk.0.attn_q.weight.counts": -ONE},
            FormatError,
            "counts is -1.0",
        ),
        (
            "imatrix",
            {"blk.0.attn_qkv.weight.in_sum2": ONE, "blk.0.attn_qkv.weight.counts": ONE},
            UnsupportedError,
            "does not belong to a model of the architecture 'llama'",
        ),
    ],
)
def test_gguf_files_that_are_none(
    tmp_path: Path, kind: str | None, tensors: dict[str, np.ndarray], error: type[Exception], message: str
) -> None:
    path = written(tmp_path / "x.gguf", kind, tensors)
    with pytest.raises(error, match=message):
        read_importance(path, "llama")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="an importance matrix is needed"):
        read_importance(tmp_path / "x", "llama")


def test_an_output_that_exists_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists"):
        write_importance(matrix(), path, "llama")
    assert path.read_bytes() == b"mine"
    write_importance(matrix(), path, "llama", overwrite=True)
    assert read_importance(path, "llama").entries


def test_a_matrix_of_another_model() -> None:
    checkpoint = random_checkpoint(LLAMA)
    good = {Q: Importance(np.ones(64), 5), DOWN: Importance(np.ones(96), 5)}
    ImportanceMatrix(good).check(checkpoint)
    with pytest.raises(UnsupportedError, match=r"32 columns for .*q_proj.* the shape \(64, 64\)"):
        ImportanceMatrix({Q: Importance(np.ones(32), 5)}).check(checkpoint)
    with pytest.raises(UnsupportedError, match="has no such tensor"):
        ImportanceMatrix({"model.layers.9.mlp.up_proj.weight": Importance(np.ones(64), 5)}).check(checkpoint)


def test_from_statistics() -> None:
    seen = InputStatistics(10, np.array([5.0, 20.0]), np.array([1.0, 1.0]))
    found = ImportanceMatrix.from_statistics({Q: seen}, datasets=["x"], chunk_count=1, chunk_size=10)
    assert found.weights(Q).tolist() == [0.5, 2.0]
    assert (found.datasets, found.chunk_count, found.chunk_size) == (("x",), 1, 10)


def test_the_name_tells_the_format() -> None:
    assert [format_of(name) for name in ("a.gguf", "a.dat", "b/A.DAT", "a.imatrix", "a")] == [
        "gguf", "legacy", "legacy", "legacy", "gguf",
    ]  # fmt: skip
