"""The GGUF reader against the gguf package, on files written here, by gguf, and on real models."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.checkpoint.encodings import ENCODINGS
from nybble.errors import FormatError, UnsupportedError
from nybble.formats.gguf.reader import GGUFFile
from nybble.formats.gguf.values import NestedArray, StringArray
from support.gguf_bytes import (
    ARRAY,
    BOOL,
    F32,
    F64,
    I8,
    I16,
    I32,
    I64,
    STRING,
    U8,
    U16,
    U32,
    U64,
    build,
)

gguf = pytest.importorskip("gguf")
ROOT = Path(__file__).parents[3]

EVERY_VALUE = [
    ("u8", U8, 200), ("i8", I8, -5), ("u16", U16, 60000), ("i16", I16, -5), ("u32", U32, 2**31),
    ("i32", I32, -5), ("f32", F32, 1.5), ("bool", BOOL, 1), ("u64", U64, 2**64 - 1), ("i64", I64, -5),
    ("f64", F64, 0.1), ("string", STRING, "жук ☃ 𝄞"), ("empty", STRING, ""),
]  # fmt: skip


def blocks(kind: str, count: int, seed: int = 0) -> bytes:
    size = ENCODINGS[kind].block_bytes * count
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8).tobytes()


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("order", ["little", "big"])
def test_every_value_type(order: str, version: int) -> None:
    file = GGUFFile.from_bytes(build(EVERY_VALUE, order=order, version=version))
    assert (file.version, file.byte_order, file.alignment) == (version, order, 32)
    assert dict(file.metadata) == {name: value for name, _, value in EVERY_VALUE} | {"bool": True}
    assert file.metadata["bool"] is True
    names = "uint8 int8 uint16 int16 uint32 int32 float32 bool uint64 int64 float64 string string"
    assert list(file.value_types.values()) == names.split()


@pytest.mark.parametrize("order", ["little", "big"])
def test_arrays(order: str) -> None:
    numbers = [(U8, "u1"), (I8, "i1"), (U16, "u2"), (I16, "i2"), (U32, "u4"), (I32, "i4"), (F32, "f4"),
               (U64, "u8"), (I64, "i8"), (F64, "f8")]  # fmt: skip
    keys = [(f"n{kind}", ARRAY, (kind, [0, 1, 100])) for kind, _ in numbers]
    keys += [("bools", ARRAY, (BOOL, [1, 0])), ("none", ARRAY, (I32, []))]
    keys += [("words", ARRAY, (STRING, ["", "a", "▁b"]))]
    keys += [("nested", ARRAY, (ARRAY, [(U32, [1, 2]), (STRING, ["x"]), (ARRAY, [(I8, [-1])])]))]
    metadata = GGUFFile.from_bytes(build(keys, order=order)).metadata
    for kind, dtype in numbers:
        value = metadata[f"n{kind}"]
        assert value.dtype == np.dtype(dtype) and value.dtype.isnative
        assert value.tolist() == [0, 1, 100]
        assert not value.flags.writeable
    assert metadata["bools"].tolist() == [True, False]
    assert metadata["none"].shape == (0,)
    words = metadata["words"]
    assert isinstance(words, StringArray)
    assert words == ["", "a", "▁b"] and words != ["", "a"] and words[-1] == "▁b" and words[:2] == ["", "a"]
    assert list(words.raw()) == [b"", b"a", "▁b".encode()]
    nested = metadata["nested"]
    assert isinstance(nested, NestedArray) and len(nested) == 3
    assert nested[0].tolist() == [1, 2] and nested[1] == ["x"] and nested[2][0].tolist() == [-1]


def test_tensors_have_row_major_shapes_and_are_views() -> None:
    content = blocks("q4_0", 3)
    data = build([], [("a", (32, 3), 2, content), ("b", (), 0, np.float32(2.5).tobytes())])
    file = GGUFFile.from_bytes(data)
    assert list(file.tensors) == ["a", "b"] and len(file.tensors) == 2 and "a" in file.tensors
    tensor = file.tensors["a"]
    assert (tensor.name, tensor.shape, tensor.encoding) == ("a", (3, 32), ENCODINGS["q4_0"])
    assert tensor.data.tobytes() == content
    assert not tensor.data.flags.owndata and not tensor.data.flags.writeable
    assert file.tensors["b"].shape == () and file.tensors["b"].dequantize() == 2.5
    with pytest.raises(KeyError):
        file.tensors["c"]


@pytest.mark.parametrize("alignment", [1, 8, 256])
def test_alignment(alignment: int) -> None:
    rows = [("a", (3,), 24, b"abc"), ("b", (2,), 24, b"de")]
    data = build([("general.alignment", U32, alignment)], rows, alignment=alignment)
    file = GGUFFile.from_bytes(data)
    assert file.alignment == alignment
    assert [tensor.data.tobytes() for tensor in file.tensors.values()] == [b"abc", b"de"]
    assert all(info.offset % alignment == 0 for info in file.infos.values())


# Byte ranges that a big-endian writer of the C structures swaps, by width.
SWAPPED = {
    "f32": [(0, 4)], "f16": [(0, 2)], "bf16": [(0, 2)], "f64": [(0, 8)], "i64": [(0, 8)], "i8": [],
    "q4_1": [(0, 2), (2, 2)], "q8_0": [(0, 2)], "q4_k": [(0, 2), (2, 2)], "q6_k": [(208, 2)],
    "q3_k": [(108, 2)], "mxfp4": [],
}  # fmt: skip


@pytest.mark.parametrize("kind", SWAPPED)
def test_big_endian_tensors_read_as_little_endian_ones(kind: str) -> None:
    row = ENCODINGS[kind]
    little = np.frombuffer(blocks(kind, 6), np.uint8).reshape(6, -1)
    big = little.copy()
    for start, width in SWAPPED[kind]:
        big[:, start : start + width] = big[:, start : start + width][:, ::-1]
    dimensions = (2 * row.block_size, 3)
    file = GGUFFile.from_bytes(build([], [("t", dimensions, row.ggml_type, big.tobytes())], order="big"))
    assert file.tensors["t"].data.tobytes() == little.tobytes()
    assert file.tensors["t"].shape == (3, 2 * row.block_size)


@pytest.mark.parametrize("kind", ["q5_0", "q5_1", "iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq3_xxs"])
def test_big_endian_blocks_without_an_agreed_form_are_refused(kind: str) -> None:
    row = ENCODINGS[kind]
    rows = [("odd", (row.block_size,), row.ggml_type, blocks(kind, 1)), ("fine", (1,), 0, bytes(4))]
    file = GGUFFile.from_bytes(build([], rows, order="big"))
    assert file.tensors["fine"].nbytes == 4
    with pytest.raises(UnsupportedError, match=f"tensor 'odd': {kind} in a big-endian file cannot be read"):
        file.tensors["odd"]


def write_with_gguf(path: Path, order: str, shards: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    endian = gguf.GGUFEndian.BIG if order == "big" else gguf.GGUFEndian.LITTLE
    writer = gguf.GGUFWriter(path, "llama", endianess=endian, split_max_tensors=shards)
    writer.add_uint32("llama.block_count", 3)
    writer.add_float32("llama.eps", 1e-5)
    writer.add_array("words", ["a", "bc", "☃"])
    writer.add_array("numbers", [1, -2, 3])
    writer.add_bool("flag", True)
    expected = {}
    for index in range(5):
        values = rng.standard_normal((index + 2, 32)).astype(np.float16 if index % 2 else np.float32)
        expected[f"t{index}"] = values.astype(np.float32)
        writer.add_tensor(f"t{index}", values)
    if order == "little":
        packed = gguf.quants.quantize(expected["t4"], gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor("packed", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        expected["packed"] = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.mark.parametrize("order", ["little", "big"])
def test_files_of_gguf_writer(tmp_path: Path, order: str) -> None:
    path = tmp_path / "model.gguf"
    expected = write_with_gguf(path, order)
    with GGUFFile.open(path) as file:
        assert (file.byte_order, file.version, file.path, file.paths) == (order, 3, path, (path,))
        assert file.metadata["general.architecture"] == "llama"
        assert file.metadata["words"] == ["a", "bc", "☃"]
        assert file.metadata["numbers"].tolist() == [1, -2, 3]
        assert list(file.tensors) == list(expected)
        for name, values in expected.items():
            assert np.array_equal(file.tensors[name].dequantize(), values)


def test_split_files_of_gguf_writer(tmp_path: Path) -> None:
    expected = write_with_gguf(tmp_path / "model.gguf", "little", shards=2)
    paths = sorted(tmp_path.glob("*.gguf"))
    assert [path.name for path in paths] == [f"model-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for part in paths:  # any part stands for the whole
        with GGUFFile.open(part) as file:
            assert file.paths == tuple(paths) and file.path == paths[0]
            assert file.metadata["words"] == ["a", "bc", "☃"]
            assert list(file.tensors) == list(file.infos) == list(expected)
            assert len(file.tensors) == len(expected) and "t0" in file.tensors
            for name, values in expected.items():
                assert np.array_equal(file.tensors[name].dequantize(), values)


def plain(value: object) -> object:
    if isinstance(value, np.ndarray):
        return value.tolist()
    return list(value) if isinstance(value, StringArray) else value


def compare_with_gguf(path: Path) -> None:
    reader = gguf.GGUFReader(path)
    file = GGUFFile.open(path)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert list(file.metadata) == list(fields)
    for name, field in fields.items():
        ours = plain(file.metadata[name])
        theirs = field.contents()
        assert np.array_equal(ours, theirs, equal_nan=True) if isinstance(ours, float) else ours == theirs, (
            name
        )
    assert list(file.tensors) == [tensor.name for tensor in reader.tensors]
    for theirs in reader.tensors:
        ours = file.tensors[theirs.name]
        assert list(reversed(ours.shape)) == theirs.shape.tolist()
        assert ours.encoding.ggml_type == theirs.tensor_type
        assert file.infos[theirs.name].offset == theirs.data_offset
        assert np.array_equal(ours.data, theirs.data.reshape(-1).view(np.uint8))


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.parametrize("fixture", ["smollm2_path", "gemma3_path"])
def test_real_models_equal_gguf(fixture: str, request: pytest.FixtureRequest) -> None:
    compare_with_gguf(Path(request.getfixturevalue(fixture)))


VOCABULARIES = sorted((ROOT / "tests" / "data").rglob("*vocab*.gguf*"))


@pytest.mark.slow
@pytest.mark.skipif(not VOCABULARIES, reason="no vocabulary files in tests/data")
@pytest.mark.parametrize(
    "path", [p for p in VOCABULARIES if p.suffix in (".gguf", ".gz")], ids=lambda p: p.name
)
def test_vocabulary_files_equal_gguf(path: Path, tmp_path: Path) -> None:
    if path.suffix == ".gz":
        unpacked = tmp_path / path.stem
        unpacked.write_bytes(gzip.decompress(path.read_bytes()))
        path = unpacked
    compare_with_gguf(path)


names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)
scalars = st.one_of(
    st.tuples(st.just(U8), st.integers(0, 255)),
    st.tuples(st.just(I16), st.integers(-(2**15), 2**15 - 1)),
    st.tuples(st.just(U64), st.integers(0, 2**64 - 1)),
    st.tuples(st.just(I64), st.integers(-(2**63), 2**63 - 1)),
    st.tuples(st.just(F64), st.floats(allow_nan=False)),
    st.tuples(st.just(BOOL), st.booleans()),
    st.tuples(st.just(STRING), st.text(st.characters(codec="utf-8"), max_size=20)),
)
arrays = st.one_of(
    st.tuples(st.just(STRING), st.lists(st.text(st.characters(codec="utf-8"), max_size=9), max_size=9)),
    st.tuples(st.just(I32), st.lists(st.integers(-(2**31), 2**31 - 1), max_size=9)),
    st.tuples(st.just(F32), st.lists(st.floats(width=32, allow_nan=False), max_size=9)),
)
tensor_rows = st.tuples(
    st.sampled_from(sorted(ENCODINGS)), st.integers(1, 2), st.lists(st.integers(1, 3), max_size=3)
)


@settings(max_examples=150, deadline=None)
@given(
    keys=st.dictionaries(names, st.one_of(scalars, arrays.map(lambda array: (ARRAY, array))), max_size=8),
    tensors=st.dictionaries(names, tensor_rows, max_size=5),
    order=st.sampled_from(["little", "big"]),
    version=st.sampled_from([2, 3]),
    alignment=st.sampled_from([1, 8, 32, 64]),
)
def test_what_is_written_is_read(keys, tensors, order, version, alignment) -> None:
    keys.pop("general.alignment", None)
    rows = []
    for name, (kind, count, outer) in tensors.items():
        row = ENCODINGS[kind]
        dimensions = (row.block_size * count, *outer)
        rows.append((name, dimensions, row.ggml_type, blocks(kind, count * int(np.prod(outer, dtype=int)))))
    written = [("general.alignment", U32, alignment)] + [(name, *value) for name, value in keys.items()]
    data = build(written, rows, order=order, version=version, alignment=alignment)
    file = GGUFFile.from_bytes(data)
    assert list(file.metadata) == ["general.alignment", *keys]
    for name, (kind, value) in keys.items():
        assert plain(file.metadata[name]) == (value[1] if kind == ARRAY else value)
    assert list(file.infos) == list(tensors)
    for name, dimensions, number, content in rows:
        info = file.infos[name]
        assert info.shape == tuple(reversed(dimensions)) and info.encoding.ggml_type == number
        assert data[info.offset : info.offset + info.nbytes] == content
        if order == "little":
            assert file.tensors[name].data.tobytes() == content


def test_a_large_vocabulary_is_walked_over_fast_and_decoded_only_when_looked_at() -> None:
    words = [f"▁word{index}" for index in range(262_144)]
    data = build([("tokens", ARRAY, (STRING, words))])
    best = 9.0
    for _ in range(5):
        start = time.perf_counter()
        file = GGUFFile.from_bytes(data)
        best = min(best, time.perf_counter() - start)
    assert best < 0.15
    tokens = file.metadata["tokens"]
    assert isinstance(tokens, StringArray) and tokens._starts is None and len(tokens) == len(words)
    assert tokens == words


def test_closing_keeps_views_that_are_in_use(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(build([("k", ARRAY, (U32, [7]))], [("t", (4,), 24, b"abcd")]))
    file = GGUFFile.open(str(path))
    data = file.tensors["t"].data
    file.close()
    file.close()
    assert data.tobytes() == b"abcd"
    assert len(file.tensors) == 0 and "1 tensors" in repr(file)
    with GGUFFile.open(path) as file:
        mapped = file._mapped[0]
    assert mapped.closed


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_opening_loads_nothing(tmp_path: Path) -> None:
    path = tmp_path / "large.gguf"
    size = 256 << 20
    head = build([], [("t", (size,), 24, b"")], data=b"")
    with path.open("wb") as out:
        out.write(head)
        out.truncate(len(head) + size)
    code = (
        "import sys, resource; from nybble.formats.gguf.reader import GGUFFile;"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "file = GGUFFile.open(sys.argv[1]); data = file.tensors['t'].data; assert data.size == 256 << 20;"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ},
    )
    assert int(done.stdout) < 4096  # KiB


def test_strings_that_are_not_utf8_are_an_error_when_looked_at() -> None:
    file = GGUFFile.from_bytes(build([("words", ARRAY, (STRING, ["ok", b"\xff\xfe"]))]))
    words = file.metadata["words"]
    assert isinstance(words, StringArray) and len(words) == 2
    with pytest.raises(FormatError, match=r"<memory>: at offset \d+: string 1 of key 'words' is not UTF-8"):
        words[0]
    assert list(words.raw())[1] == b"\xff\xfe"
