"""The safetensors reader: against the format's own library, and files that are wrong on purpose."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.errors import FormatError, NotFoundError, NybbleError, UnsupportedError
from nybble.formats.safetensors.reader import SafetensorsFile, read_safetensors
from support.safetensors_bytes import build, tensor

DTYPES = {
    "float64": "f64",
    "float32": "f32",
    "float16": "f16",
    "int64": "i64",
    "int32": "i32",
    "int16": "i16",
    "int8": "i8",
}

names = st.text(
    st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12
).filter(lambda name: name != "__metadata__")  # fmt: skip
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@settings(max_examples=80, deadline=None)
@given(
    st.dictionaries(names, st.tuples(st.sampled_from(sorted(DTYPES)), shapes), max_size=6),
    st.dictionaries(names, st.text(st.characters(exclude_categories=("Cs",)), max_size=9), max_size=3),
)
def test_files_of_the_formats_own_library(tensors, metadata) -> None:
    random = np.random.default_rng(0)
    arrays = {
        name: np.frombuffer(random.bytes(int(np.prod(shape)) * np.dtype(dtype).itemsize), dtype).reshape(
            shape
        )
        for name, (dtype, shape) in tensors.items()
    }
    file = SafetensorsFile.from_bytes(safetensors.numpy.save(arrays, metadata or None))
    assert dict(file.metadata) == metadata
    assert set(file.tensors) == set(arrays)
    for name, array in arrays.items():
        found = file.tensors[name]
        assert (found.name, found.shape, found.encoding.name) == (name, array.shape, DTYPES[array.dtype.name])
        assert found.data.tobytes() == array.tobytes()


def test_tensors_are_views_of_the_mapped_file(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors.numpy.save({"w": values}))
    file = read_safetensors(path)
    one, other = file.tensors["w"], file.tensors["w"]
    assert one.is_view and np.shares_memory(one.data, other.data)
    assert not one.data.flags.writeable
    file.close()
    np.testing.assert_array_equal(one.dequantize(), values)  # views outlive the file


def test_bf16_and_misaligned_elements() -> None:
    header = {"a": tensor("I8", [1], 0, 1), "b": tensor("BF16", [2], 1, 5)}
    file = SafetensorsFile.from_bytes(build(header, b"\x05\x80\x3f\x00\xc0"))
    assert not file.tensors["b"].is_view  # copied to an even address
    assert file.tensors["b"].data.ctypes.data % 2 == 0
    assert file.tensors["b"].dequantize().tolist() == [1.0, -2.0]
    assert file.tensors["a"].dequantize().tolist() == [5.0]


@pytest.mark.parametrize("dtype", ["U8", "BOOL", "F8_E4M3", "U16", "C64", "F4"])
def test_dtypes_without_an_encoding_are_listed_but_not_read(dtype: str) -> None:
    size = {"U16": 16, "C64": 64, "F4": 4}.get(dtype, 8)
    file = SafetensorsFile.from_bytes(build({"x": tensor(dtype, [8], 0, size)}, bytes(size)))
    assert (file.infos["x"].dtype, file.infos["x"].nbytes, "x" in file.tensors) == (dtype, size, True)
    with pytest.raises(UnsupportedError, match=f"tensor 'x' is {dtype}; nybble computes with F64, F32"):
        file.tensors["x"]


F32 = tensor("F32", [2], 0, 8)
DEFECTS: dict[str, tuple[bytes, str]] = {
    "short": (b"1234567", "has 7 bytes; the header's length alone takes 8"),
    "huge header": ((10**9).to_bytes(8, "little") + b"{}", "claims a header of 1000000000 bytes; at most"),
    "header past the end": ((100).to_bytes(8, "little") + b"{}", "the header takes 100 bytes, but 2 follow"),
    "another beginning": (build(b"[]"), "the header starts with b'['"),
    "no JSON": (build(b"{]"), "the header: is not JSON"),
    "no UTF-8": (build(b'{"\xff":1}'), "the header: is not UTF-8: invalid start byte at byte 2"),
    "surrogate": (build(b'{"\\ud800":1}'), "half of a surrogate pair"),
    "deep": (build(b'{"a":' + b"[" * 100_000), "nested too deeply"),
    "key twice": (build(b'{"a":{},"a":{}}'), "has the key 'a' twice"),
    "inner key twice": (build(b'{"a":{"dtype":"F32","dtype":"F32"}}'), "has the key 'dtype' twice"),
    "many digits": (build(b'{"a":{"shape":[' + b"9" * 5000 + b"]}}"), "holds a number of 5000 digits"),
    "NaN": (build(b'{"a":NaN}'), "holds NaN, which is not JSON"),
    "no object": (build({"a": 1}), "tensor 'a': must be an object"),
    "no dtype": (build({"a": {"shape": [], "data_offsets": [0, 0]}}), "dtype is missing"),
    "shape is text": (build({"a": {**F32, "shape": "2"}}, bytes(8)), "shape is missing or no list"),
    "negative shape": (build({"a": {**F32, "shape": [-2]}}, bytes(8)), "shape is missing or no list"),
    "real shape": (build({"a": {**F32, "shape": [2.0]}}, bytes(8)), "shape is missing or no list"),
    "boolean shape": (build({"a": {**F32, "shape": [True, 2]}}, bytes(8)), "shape is missing or no list"),
    "many dimensions": (build({"a": {**F32, "shape": [1] * 33}}, bytes(8)), "has 33 dimensions; at most 32"),
    "too many elements": (build({"a": {**F32, "shape": [2**40, 2**40]}}, bytes(8)), "too many elements"),
    "one offset": (build({"a": {**F32, "data_offsets": [8]}}, bytes(8)), "must be two whole numbers"),
    "backwards": (build({"a": {**F32, "data_offsets": [8, 0]}}, bytes(8)), "must be two whole numbers"),
    "shape and offsets": (build({"a": {**F32, "shape": [3]}}, bytes(8)), "but F32 of shape [3] takes 12"),
    "half a byte": (build({"a": tensor("F4", [3], 0, 1)}, b"1"), "takes 1.5"),
    "past the end": (build({"a": F32}, bytes(7)), "tensors' data end at byte"),
    "more behind": (build({"a": F32}, bytes(9)), "has more behind them"),
    "gap at the start": (build({"a": tensor("F32", [1], 4, 8)}, bytes(8)), "leaves a gap after the header"),
    "gap": (
        build({"a": tensor("I8", [1], 0, 1), "b": tensor("I8", [1], 2, 3)}, bytes(3)),
        "tensor 'b' at byte 2 of the data leaves a gap after tensor 'a', which ends at byte 1",
    ),
    "overlap": (build({"a": F32, "b": tensor("I8", [1], 7, 8)}, bytes(8)), "overlaps tensor 'a'"),
    "metadata": (build({"__metadata__": {"a": 1}}), "__metadata__ must be an object with text alone"),
}  # fmt: skip


@pytest.mark.parametrize("name", DEFECTS)
def test_defects(name: str) -> None:
    data, message = DEFECTS[name]
    with pytest.raises(FormatError) as caught:
        SafetensorsFile.from_bytes(data, "file")
    assert str(caught.value).startswith("file: ") and message in str(caught.value)


def test_an_unknown_dtype_is_unsupported() -> None:
    with pytest.raises(UnsupportedError, match="unknown dtype 'Q4'; known: F64, F32"):
        SafetensorsFile.from_bytes(build({"a": tensor("Q4", [2], 0, 1)}, b"1"))


# -- shards ------------------------------------------------------------------------------------------


def write_shards(folder: Path, weight_map: dict[str, object], **files: list[str]) -> Path:
    for file, tensors in files.items():
        arrays = {name: np.full(3, len(name), np.float32) for name in tensors}
        (folder / f"{file}.safetensors").write_bytes(safetensors.numpy.save(arrays))
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return path


def test_shards_of_an_index(tmp_path: Path) -> None:
    path = write_shards(
        tmp_path, {"bb": "one.safetensors", "a": "two.safetensors"}, one=["bb"], two=["a", "ccc"]
    )
    with read_safetensors(path) as file:
        assert [p.name for p in file.paths] == ["one.safetensors", "two.safetensors"]
        # The index forgot a tensor; nothing that is stored is lost.
        assert list(file.tensors) == list(file.infos) == ["bb", "a", "ccc"]
        assert file.tensors["ccc"].dequantize().tolist() == [3.0] * 3


@pytest.mark.parametrize(
    "name",
    ["../one.safetensors", "/etc/passwd", "sub/one.safetensors", "..\\one.safetensors", "C:one.safetensors",
     "one.bin", ".one.safetensors", "a\0.safetensors", 3, None],
)  # fmt: skip
def test_an_index_names_files_of_its_own_folder_only(tmp_path: Path, name: object) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    write_shards(tmp_path, {}, one=["a"])
    path = write_shards(inner, {"a": name}, one=["a"])
    with pytest.raises(FormatError, match=r"only the name of a \*.safetensors file in the same folder"):
        read_safetensors(path)


def test_indexes_that_do_not_fit(tmp_path: Path) -> None:
    path = write_shards(tmp_path, {"a": "one.safetensors", "b": "gone.safetensors"}, one=["a"])
    with pytest.raises(NotFoundError, match=r"gone.safetensors: this part of the model is missing"):
        read_safetensors(path)
    path = write_shards(tmp_path, {"b": "one.safetensors"}, one=["a"])
    with pytest.raises(FormatError, match=r"says that one.safetensors holds tensor 'b', but it does not"):
        read_safetensors(path)
    for content in ("{}", '{"weight_map": []}', "[]", '{"weight_map": {"a": "x", "a": "y"}}', "\ufeff{}"):
        path.write_text(content)
        with pytest.raises(FormatError, match=r"index.json"):
            read_safetensors(path)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path / "none.safetensors.index.json", tmp_path):
        with pytest.raises(NotFoundError):
            read_safetensors(path)
    (tmp_path / "empty.safetensors").write_bytes(b"")
    with pytest.raises(NybbleError, match="is empty"):
        read_safetensors(tmp_path / "empty.safetensors")
