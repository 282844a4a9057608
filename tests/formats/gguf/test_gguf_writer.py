"""GGUF files as bytes: values of every type, layout, split files, memory, refusals."""

from __future__ import annotations

import io
import weakref
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.checkpoint.encodings import encoding
from nybble.checkpoint.tensor import Tensor
from nybble.errors import FormatError
from nybble.formats.gguf.metadata import GGUFMetadata
from nybble.formats.gguf.reader import GGUFFile
from nybble.formats.gguf.values import SCALARS
from nybble.formats.gguf.write_values import write_value
from nybble.formats.gguf.writer import write_file
from support import gguf_bytes as gb


def tensor(name: str, shape: tuple[int, ...], kind: str = "f32", seed: int = 0) -> Tensor:
    row = encoding(kind)
    nbytes = row.nbytes(int(np.prod(shape)))
    data = np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)
    return Tensor(name, shape, row, data)


def reread(tmp_path: Path, metadata: Any, tensors: Any = ()) -> GGUFFile:
    [path] = write_file(tmp_path / "out.gguf", metadata, list(tensors))
    return GGUFFile.open(path)


def plain(value: Any) -> Any:
    """Lists and Python numbers, however a value is held."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, str | bool | int | float):
        return value
    return [plain(item) for item in value]


EVERY_TYPE: dict[str, tuple[Any, str]] = {
    "a.u8": (np.uint8(255), "uint8"),
    "a.i8": (np.int8(-128), "int8"),
    "a.u16": (np.uint16(65535), "uint16"),
    "a.i16": (np.int16(-32768), "int16"),
    "a.u32": (np.uint32(2**32 - 1), "uint32"),
    "a.i32": (np.int32(-(2**31)), "int32"),
    "a.f32": (np.float32(0.1), "float32"),
    "a.bool": (np.bool_(True), "bool"),
    "a.u64": (np.uint64(2**64 - 1), "uint64"),
    "a.i64": (np.int64(-(2**63)), "int64"),
    "a.f64": (np.float64(0.1), "float64"),
    "p.text": ("naïve \U0001f600", "string"),
    "p.empty": ("", "string"),
    "p.true": (True, "bool"),
    "p.int": (7, "uint32"),
    "p.negative": (-7, "int32"),
    "p.large": (2**40, "uint64"),
    "p.large_negative": (-(2**40), "int64"),
    "p.float": (0.5, "float32"),
    "p.bytes": (b"\x00\xff", "array[uint8]"),
    "p.ints": ([1, -2], "array[int32]"),
    "p.long_ints": ([1, 2**33], "array[int64]"),
    "p.floats": ([1, 0.5], "array[float32]"),
    "p.bools": ([True, False], "array[bool]"),
    "p.texts": (["a", ""], "array[string]"),
    "p.nested": ([[1, 2], [3]], "array[array]"),
    "p.deep": ([[["a"], ["b", "c"]], [["d"]]], "array[array]"),
    "n.matrix": (np.arange(6, dtype=np.uint16).reshape(2, 3), "array[array]"),
    "n.empty": (np.zeros(0, np.float64), "array[float64]"),
    "n.big_endian": (np.array([1, 2], ">i4"), "array[int32]"),
}


def test_every_type_of_value_comes_back(tmp_path: Path) -> None:
    with reread(tmp_path, {key: value for key, (value, _) in EVERY_TYPE.items()}) as file:
        assert list(file.metadata) == list(EVERY_TYPE)
        for key, (value, name) in EVERY_TYPE.items():
            assert file.value_types[key] == name, key
            assert plain(file.metadata[key]) == plain(list(value) if isinstance(value, bytes) else value), key
        again = write_file(tmp_path / "again.gguf", GGUFMetadata(file.metadata, file.value_types), [])
        assert again[0].read_bytes() == (tmp_path / "out.gguf").read_bytes()


def test_bytes_are_those_of_the_specification(tmp_path: Path) -> None:
    keys = [
        ("general.alignment", gb.U32, 64),
        ("x.nested", gb.ARRAY, (gb.ARRAY, [(gb.I32, [1, 2]), (gb.I32, [3])])),
        ("x.names", gb.ARRAY, (gb.STRING, ["a", "bc"])),
    ]
    first, second = tensor("a", (3, 32), "q4_0"), tensor("b.weight", (5,))
    rows = [("a", (32, 3), 2, first.data.tobytes()), ("b.weight", (5,), 0, second.data.tobytes())]
    expected = gb.build(keys, rows, alignment=64)
    metadata = {"general.alignment": 64, "x.nested": [[1, 2], [3]], "x.names": ["a", "bc"]}
    [path] = write_file(tmp_path / "out.gguf", metadata, [first, second])
    # The writer pads the end as well, as llama.cpp does.
    assert path.read_bytes() == expected + bytes(-len(expected) % 64)


NUMBERS = [np.dtype(row.letter if row.letter != "?" else "bool") for row in SCALARS.values()]


@st.composite
def number_arrays(draw: st.DrawFn) -> npt.NDArray[Any]:
    dtype = draw(st.sampled_from(NUMBERS))
    raw = draw(st.binary(max_size=40).filter(lambda data: len(data) % dtype.itemsize == 0))
    return np.frombuffer(raw, np.uint8).astype(bool) if dtype.kind == "b" else np.frombuffer(raw, dtype)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
nested = st.recursive(
    number_arrays() | st.lists(texts, min_size=1, max_size=3),
    lambda inner: st.lists(inner, min_size=1, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(texts.filter(bool), nested | texts | st.booleans(), max_size=5))
@settings(max_examples=150, deadline=None)
def test_any_metadata_comes_back(values: dict[str, Any]) -> None:
    def equal(a: Any, b: Any) -> bool:
        if isinstance(a, np.ndarray):
            return a.dtype == b.dtype and a.tobytes() == b.tobytes()
        if isinstance(a, list):
            return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
        return bool(a == b)

    out = io.BytesIO()
    for key, value in values.items():
        gb_key = gb.string("little", key)
        out.write(gb_key)
        write_value(out, key, value)
    head = b"GGUF" + gb.number("little", "I", 3) + bytes(8) + gb.number("little", "Q", len(values))
    if "general.alignment" in values:
        return
    file = GGUFFile.from_bytes(head + out.getvalue())
    assert list(file.metadata) == list(values)
    for key, value in values.items():
        assert equal(value, file.metadata[key])


@pytest.mark.parametrize(
    ("value", "name", "message"),
    [
        (None, None, "GGUF has no type for NoneType"),
        ({"a": 1}, None, "GGUF has no type for dict"),
        ([], None, "the array is empty and its type is not known"),
        ([1, "a"], None, "GGUF has no type for int"),
        ([True, "a"], None, "an array holds one type, not bool, string"),
        (np.float16(1), None, "GGUF has no type for NumPy's float16"),
        (np.zeros(2, np.complex64), None, "GGUF has no type for NumPy's complex64"),
        (2**64, None, "18446744073709551616 does not fit in 64 bits"),
        (300, "uint8", "cannot be written"),
        (0.5, "uint32", "cannot be written"),
        (1e39, None, "cannot be written"),
        (1, "bool", "bool is needed, found int"),
        (True, "uint32", "uint32 is needed, found bool"),
        (1, "string", "text is needed, found int"),
        ("a", "array[string]", "an array is needed, found str"),
        ([0.5], "array[int32]", "an element is 0.5; all must be int32"),
        ([300], "array[uint8]", "cannot be written"),
        (["\ud800"], None, "cannot be written"),
        (1, "float16", "unknown type 'float16'"),
    ],
)
def test_values_that_gguf_cannot_hold(value: Any, name: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=r"key 'some.key' cannot be written") as caught:
        write_value(io.BytesIO(), "some.key", value, name)
    assert message in str(caught.value)


def test_types_that_are_named_win(tmp_path: Path) -> None:
    types = {"a": "uint64", "b": "array[uint16]", "c": "array[string]", "d": "float64"}
    with reread(tmp_path, GGUFMetadata({"a": 1, "b": [1, 2], "c": [], "d": 0.1}, types)) as file:
        assert dict(file.value_types) == types
        assert file.metadata["d"] == 0.1


def test_metadata_survives_json(tmp_path: Path) -> None:
    values = {key: value for key, (value, _) in EVERY_TYPE.items()} | {"tokenizer.ggml.tokens": ["x"]}
    with reread(tmp_path, values) as file:
        metadata = GGUFMetadata(file.metadata, file.value_types)
        back = GGUFMetadata.from_json(metadata.to_json(leave_out=["tokenizer.", "n.matrix", "p.nested"]))
        [second] = write_file(tmp_path / "b.gguf", back, [])
        with GGUFFile.open(second) as other:
            left_out = {"tokenizer.ggml.tokens", "n.matrix", "p.nested"}
            assert list(other.metadata) == [key for key in file.metadata if key not in left_out]
            for key, value in other.metadata.items():
                assert other.value_types[key] == file.value_types[key]
                assert plain(value) == plain(file.metadata[key])
    for broken in ("x", [1], [{"key": 1, "value": 2}], [{"key": "a"}], [{"key": "a", "value": 1}] * 2):
        with pytest.raises(FormatError, match="GGUF metadata"):
            GGUFMetadata.from_json(broken)


def test_tensors_lie_aligned_and_the_gguf_package_reads_them(tmp_path: Path) -> None:
    tensors = [
        tensor("token_embd.weight", (3, 64), "q8_0", 1),
        tensor("blk.0.attn_norm.weight", (7,), "f32", 2),
        tensor("blk.0.attn_q.weight", (4, 256), "q6_k", 3),
        tensor("cube", (2, 3, 32), "q4_1", 4),
        tensor("half", (2, 3), "f16", 5),
    ]
    path = tmp_path / "out.gguf"
    write_file(path, {"general.architecture": "llama", "general.alignment": 128}, tensors)
    first = path.read_bytes()
    write_file(path, {"general.architecture": "llama", "general.alignment": 128}, tensors)
    assert path.read_bytes() == first
    with GGUFFile.open(path) as file:
        assert list(file.tensors) == [t.name for t in tensors]
        assert all(info.offset % 128 == 0 for info in file.infos.values())
        for t in tensors:
            found = file.tensors[t.name]
            assert (found.shape, found.encoding.name) == (t.shape, t.encoding.name)
            assert found.data.tobytes() == t.data.tobytes()
    reader = gguf.GGUFReader(path)
    for mine, theirs in zip(tensors, reader.tensors, strict=True):
        assert (theirs.name, tuple(reversed(theirs.shape.tolist()))) == (mine.name, mine.shape)
        assert theirs.data.tobytes() == mine.data.tobytes()


def test_split_files(tmp_path: Path) -> None:
    tensors = [tensor(f"t{i}", (8 + i,), seed=i) for i in range(7)]
    metadata = {"general.architecture": "llama", "general.alignment": 64, "split.no": 9, "split.count": 10}
    seen: list[tuple[int, int]] = []
    paths = write_file(
        tmp_path / "model.gguf", metadata, tensors, split_bytes=130, progress=lambda *at: seen.append(at)
    )
    assert [path.name for path in paths] == [f"model-{i:05}-of-00004.gguf" for i in range(1, 5)]
    assert not (tmp_path / "model.gguf").exists()
    total = sum(t.nbytes for t in tensors)
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)
    for number, path in enumerate(paths):
        part = GGUFFile.from_bytes(path.read_bytes())
        assert {key: part.metadata[key] for key in part.metadata if key.startswith("split.")} == {
            "split.no": number,
            "split.count": 4,
            "split.tensors.count": 7,
        }
        assert part.value_types["split.no"] == part.value_types["split.count"] == "uint16"
        assert part.value_types["split.tensors.count"] == "int32"
        assert ("general.architecture" in part.metadata) == (number == 0)
        assert sum(-(-info.nbytes // 64) * 64 for info in part.infos.values()) <= 130
    with GGUFFile.open(paths[2]) as file:
        assert list(file.tensors) == [t.name for t in tensors]
        assert all(file.tensors[t.name].data.tobytes() == t.data.tobytes() for t in tensors)


def test_one_file_where_all_fits_and_a_part_for_a_tensor_that_is_too_large(tmp_path: Path) -> None:
    tensors = [tensor(f"t{i}", (8,), seed=i) for i in range(2)]
    assert write_file(tmp_path / "a.gguf", {"split.count": 3}, tensors, split_bytes=10**6) == [
        tmp_path / "a.gguf"
    ]
    with GGUFFile.open(tmp_path / "a.gguf") as file:
        assert not file.metadata
    assert len(write_file(tmp_path / "b", {}, tensors, split_bytes=1)) == 2
    assert (tmp_path / "b-00002-of-00002.gguf").exists()


def test_one_tensor_at_a_time_is_in_memory(tmp_path: Path) -> None:
    alive: list[weakref.ref[npt.NDArray[np.uint8]]] = []

    def data() -> npt.NDArray[np.uint8]:
        assert all(reference() is None for reference in alive)
        made = np.zeros(400, np.uint8)
        alive.append(weakref.ref(made))
        return made

    tensors = [Tensor(f"t{i}", (100,), encoding("f32"), data) for i in range(4)]
    write_file(tmp_path / "out.gguf", {}, tensors)
    assert len(alive) == 4


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ([tensor("a", (2,)), tensor("a", (2,))], {}, "tensor 'a' is there twice"),
        ([tensor("", (2,))], {}, "1 to 63 are allowed"),
        ([tensor("x" * 64, (2,))], {}, "has a name of 64 bytes"),
        ([tensor("a", (2, 32), "int4_g32_f16")], {}, "is int4_g32_f16, which GGUF does not have"),
        ([tensor("a", (1, 1, 1, 1, 1))], {}, "at most 4 sizes"),
        ([tensor("a", (0, 4))], {}, "at most 4 sizes above 0"),
        ([tensor("a", (4, 16), "q4_0")], {}, "rows of 16 elements; q4_0 needs a multiple of 32"),
        ([], {"general.alignment": 48}, "a power of two"),
        ([], {"general.alignment": "32"}, "a power of two"),
        ([], {"": 1}, "1 to 65535 are allowed"),
    ],
)
def test_what_gguf_cannot_hold_is_refused(
    tmp_path: Path, tensors: list[Tensor], metadata: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_file(tmp_path / "out.gguf", metadata, tensors)
    with pytest.raises(ValueError, match="split_bytes is 0"):
        write_file(tmp_path / "out.gguf", {}, [], split_bytes=0)
