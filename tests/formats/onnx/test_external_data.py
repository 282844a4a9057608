"""External data and initializers of hostile files: nothing outside the folder, nothing before its check."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from nybble.errors import FormatError, NotFoundError, NybbleError, UnsupportedError
from nybble.formats.onnx.external_data import ExternalFiles, initializer
from nybble.formats.onnx.proto import MAX_DEPTH, load_model, parse_model

onnx = pytest.importorskip("onnx")
TensorProto = onnx.TensorProto


def external(location: str, shape=(4,), data_type=TensorProto.FLOAT, **entries: object):
    tensor = TensorProto(name="w", data_type=data_type, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


@pytest.fixture
def folder(tmp_path):
    inside = tmp_path / "model"
    inside.mkdir()
    (inside / "data.bin").write_bytes(np.arange(8, dtype=np.float32).tobytes())
    (tmp_path / "secret.bin").write_bytes(b"secret" * 10)
    return inside


def read(folder: Path, tensor) -> np.ndarray:
    return initializer(tensor, ExternalFiles(folder)).load()


def test_data_is_mapped_from_its_place(folder):
    assert read(folder, external("data.bin", offset=8)).tolist() == [2, 3, 4, 5]
    assert read(folder, external("./data.bin", offset=16, length=16)).tolist() == [4, 5, 6, 7]
    stored = initializer(external("data.bin"), ExternalFiles(folder))
    assert not stored.load().flags.writeable


def test_a_subfolder_is_inside(folder):
    (folder / "sub").mkdir()
    (folder / "data.bin").rename(folder / "sub" / "data.bin")
    assert read(folder, external("sub/data.bin")).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "location",
    [
        "../secret.bin", "sub/../../secret.bin", "./../secret.bin", "..", "", ".", "/etc/passwd",
        "//host/share", "..\\secret.bin", "C:\\secret.bin", "C:secret.bin", "\\\\host\\share\\x",
        "data.bin\0.txt", "data.bin:stream",
    ],
)  # fmt: skip
def test_paths_that_leave_the_folder_are_refused(folder, location):
    """CVE-2024-27318 and what came after it."""
    with pytest.raises(FormatError):
        read(folder, external(location))


def test_an_absolute_path_is_refused_even_to_the_folder_itself(folder):
    with pytest.raises(FormatError, match="only a relative path"):
        read(folder, external(str(folder / "data.bin")))


needs_links = pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")


@needs_links
def test_links_that_leave_the_folder_are_refused(folder):
    (folder / "link.bin").symlink_to(folder.parent / "secret.bin")
    (folder / "up").symlink_to(folder.parent)
    (folder / "loop.bin").symlink_to(folder / "loop.bin")
    for location in ("link.bin", "up/secret.bin"):
        with pytest.raises(FormatError, match="link that leads out"):
            read(folder, external(location))
    with pytest.raises(NotFoundError):
        read(folder, external("loop.bin"))


@needs_links
def test_a_link_inside_the_folder_is_followed(folder):
    (folder / "link.bin").symlink_to("data.bin")
    assert read(folder, external("link.bin")).tolist() == [0, 1, 2, 3]


@needs_links
def test_a_second_hard_link_is_refused(folder):
    os.link(folder.parent / "secret.bin", folder / "hard.bin")
    with pytest.raises(FormatError, match="hard link"):
        read(folder, external("hard.bin"))


@needs_links
def test_pipes_and_folders_are_refused(folder):
    os.mkfifo(folder / "pipe")  # opening it must not wait either
    (folder / "sub").mkdir()
    for location in ("pipe", "sub"):
        with pytest.raises(NybbleError):
            read(folder, external(location))


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        ({"offset": 17}, "are wanted"),
        ({"offset": 2**63}, "are wanted"),
        ({"offset": -4}, "offset is"),
        ({"offset": "1e3"}, "offset is"),
        ({"offset": "9" * 30}, "offset is"),
        ({"length": 12}, "its shape takes 16"),
        ({"length": 2**40}, "its shape takes 16"),
        ({"length": -1}, "length is"),
    ],
)
def test_offsets_and_lengths_are_checked(folder, entries, problem):
    with pytest.raises(FormatError, match=problem):
        read(folder, external("data.bin", **entries))


@pytest.mark.parametrize("shape", [(2**40,), (2**20, 2**20), (2**62, 4), (0x7FFFFFFF,) * 8, (-1,), (1,) * 9])
def test_shapes_are_checked_before_memory_is_taken(folder, shape):
    with pytest.raises(FormatError):
        read(folder, external("data.bin", shape=shape))
    with pytest.raises(FormatError):
        initializer(TensorProto(name="w", data_type=1, dims=shape, raw_data=b"1234"), ExternalFiles(None))


def test_a_missing_file_is_named(folder):
    with pytest.raises(NotFoundError, match=r"other\.bin"):
        read(folder, external("other.bin"))


def test_a_model_in_memory_has_no_external_data():
    with pytest.raises(FormatError, match="no folder"):
        initializer(external("data.bin"), ExternalFiles(None))


# -- inside the file ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "array",
    [
        np.array([1.5, -2], np.float32), np.array([[1, 2]], np.float16), np.array([3, -3], np.int64),
        np.array([3, -3], np.int32), np.array([200, 3], np.uint8), np.array([-7], np.int8),
        np.array([True, False]), np.array(2.5, np.float64),
    ],
)  # fmt: skip
@pytest.mark.parametrize("typed", [False, True])
def test_arrays_inside_the_file(array, typed):
    if typed:
        values = array.view(np.uint16) if array.dtype == np.float16 else array
        kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        tensor = TensorProto(name="w", data_type=kind, dims=array.shape)
        field = {1: tensor.float_data, 11: tensor.double_data, 7: tensor.int64_data}.get(
            kind, tensor.int32_data
        )
        field.extend((values.astype(int) if kind == TensorProto.BOOL else values).reshape(-1).tolist())
    else:
        tensor = onnx.numpy_helper.from_array(array, "w")
    found = initializer(tensor, ExternalFiles(None)).load()
    assert found.dtype == array.dtype and found.shape == array.shape and (found == array).all()


@pytest.mark.parametrize(("kind", "codes"), [("UINT4", [1, 15, 7]), ("INT4", [-8, 7, -1])])
def test_four_bit_arrays(kind, codes):
    tensor = onnx.helper.make_tensor("w", getattr(TensorProto, kind), (3,), codes)
    assert initializer(tensor, ExternalFiles(None)).load().tolist() == codes


def test_data_of_another_size_than_the_shape_is_refused():
    for tensor in (
        TensorProto(name="w", data_type=1, dims=(2,), raw_data=b"1234"),
        TensorProto(name="w", data_type=1, dims=(2,), float_data=[1.0]),
        TensorProto(name="w", data_type=3, dims=(2,), int32_data=[1]),
        TensorProto(name="w", data_type=1, dims=(2,)),
    ):
        with pytest.raises(FormatError, match="takes"):
            initializer(tensor, ExternalFiles(None))


def test_an_unknown_element_type_is_named():
    with pytest.raises(UnsupportedError, match="element type 8"):
        initializer(TensorProto(name="w", data_type=8, dims=(1,)), ExternalFiles(None))


def nested(depth: int):
    graph = onnx.GraphProto(name="g", node=[onnx.helper.make_node("Identity", ["a"], ["b"])])
    for _ in range(depth):
        node = onnx.helper.make_node("If", ["a"], ["b"], then_branch=graph, else_branch=graph)
        graph = onnx.GraphProto(name="g", node=[node])
    return onnx.ModelProto(ir_version=8, graph=graph)


def test_nesting_is_bounded():
    parse_model(nested(MAX_DEPTH - 1).SerializeToString())
    with pytest.raises(FormatError, match="nested"):
        parse_model(nested(MAX_DEPTH + 1).SerializeToString())
    with pytest.raises(FormatError):
        # A graph in an attribute in a node in a graph, a thousand times: the parser's own limit.
        data = b""
        for _ in range(1000):
            data = b"\x0a" + varint(len(data) + 10)[:5] + data
        parse_model(b"\x3a" + varint(len(data)) + data)


def varint(number: int) -> bytes:
    found = b""
    while number > 127:
        found += bytes([number & 127 | 128])
        number >>= 7
    return found + bytes([number])


def test_sparse_weights_and_functions_are_refused():
    model = nested(0)
    model.graph.sparse_initializer.add()
    with pytest.raises(UnsupportedError, match="sparse"):
        parse_model(model.SerializeToString())
    model = nested(0)
    model.functions.add(name="norm")
    with pytest.raises(UnsupportedError, match="functions of its own"):
        parse_model(model.SerializeToString())


def test_a_huge_file_is_not_read(tmp_path):
    path = tmp_path / "model.onnx"
    with path.open("wb") as file:
        file.truncate(1 << 31)  # a hole
    with pytest.raises(FormatError, match="at most"):
        load_model(path)
