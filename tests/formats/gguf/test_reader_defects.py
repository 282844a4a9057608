"""One hand-made file for each defect that the GGUF reader must refuse, with the message it gives."""

from __future__ import annotations

import re
import tracemalloc
from pathlib import Path

import pytest

from nybble.errors import FormatError, NotFoundError
from nybble.formats.gguf.reader import GGUFFile
from support.gguf_bytes import ARRAY, BOOL, F32, I32, STRING, U8, U16, U32, U64, build, number, string

F32_TYPE = 0
ONE = [("t", (4,), F32_TYPE, bytes(16))]
TWO = [("t", (4,), F32_TYPE, bytes(16)), ("u", (4,), F32_TYPE, bytes(16))]


def array(element: int, count: int, content: bytes = b"") -> bytes:
    return number("little", "I", element) + number("little", "Q", count) + content


def nest(depth: int) -> bytes:
    return array(U8, 0) if depth == 1 else array(ARRAY, 1, nest(depth - 1))


DEFECTS = {
    "nothing": (b"", "offset 0: the file starts with b'' instead of b'GGUF'; not a GGUF file"),
    "other file": (b"PK\3\4" + bytes(99), r"offset 0: the file starts with b'PK\x03\x04' instead of b'GGUF'"),
    "format of 2023": (b"tjgg" + bytes(99), "this is GGJT, a format before GGUF: convert the model again"),
    "magic only": (b"GGUF", "offset 4: the version needs 4 bytes, but the file has 4"),
    "version 1": (build(version=1), "offset 4: GGUF version 1 is unknown; versions 2 and 3 can be read"),
    "version 4": (build(version=4), "offset 4: GGUF version 4 is unknown"),
    "version 1, big": (build(version=1, order="big"), "offset 4: GGUF version 1 is unknown"),
    "cut header": (
        build()[:12],
        "offset 8: the number of tensors needs 8 bytes, but the file ends 4 bytes later",
    ),
    "cut header 2": (
        build()[:20],
        "offset 16: the number of keys needs 8 bytes, but the file ends 4 bytes later",
    ),
    "tensor count": (
        build(tensor_count=2**64 - 1),
        "offset 8: the file claims 18446744073709551615 tensors (at least 461168601842738790375 bytes),"
        " but only 0 bytes follow",
    ),
    "key count": (
        build(key_count=3) + bytes(41),
        "offset 16: the file claims 3 keys (at least 42 bytes), but only 41",
    ),
    "one key too many": (
        build([("a", STRING, "b" * 40)], key_count=2),
        "a key needs 8 bytes, but the file ends 0 bytes later",
    ),
    "key length": (
        build(key_count=1) + number("little", "Q", 65536) + bytes(99),
        "offset 24: a key is 65536 bytes long; at most 65535 are allowed",
    ),
    "key beyond the end": (
        build(key_count=1) + number("little", "Q", 60000) + bytes(99),
        "offset 32: a key needs 60000 bytes, but the file ends 99 bytes later",
    ),
    "key empty": (build([("", U32, 1)]), "offset 24: a key is empty"),
    "key not UTF-8": (
        build([(b"\xff", U8, 1)]),
        "offset 32: a key is not UTF-8 (invalid start byte at its byte 0)",
    ),
    "key twice": (build([("k", U8, 1), ("k", U8, 2)]), "offset 38: key 'k' is there twice"),
    "value type": (
        build([("k", 13, b"\0")]),
        "offset 33: key 'k' has value type 13; known are 0 (uint8) to 12 (float64)",
    ),
    "value type 2": (build([("k", 2**32 - 1, b"\0")]), "key 'k' has value type 4294967295"),
    "cut value": (
        build([("k", U64, b"\0\0\0")]),
        "offset 37: the value of key 'k' (uint64) needs 8 bytes, but the file ends 3 bytes later",
    ),
    "bool": (build([("k", BOOL, 2)]), "offset 37: key 'k' is a bool of value 2; 0 or 1 is allowed"),
    "string length": (
        build([("k", U8, 0)])[:-5] + number("little", "I", STRING) + number("little", "Q", 2**64 - 1),
        "offset 45: the value of key 'k' needs 18446744073709551615 bytes, but the file ends 0 bytes later",
    ),
    "string not UTF-8": (
        build([("k", STRING, b"ab\xc3(")]),
        "the value of key 'k' is not UTF-8 (invalid continuation",
    ),
    "array type": (
        build([("k", ARRAY, array(77, 1, bytes(99)))]),
        "offset 37: key 'k' is an array of type 77",
    ),
    "cut array": (
        build([("k", ARRAY, number("little", "I", U8))]),
        "offset 41: the array length of key 'k' needs 8 bytes",
    ),
    "array length": (
        build([("k", ARRAY, array(F32, 2**62, bytes(99)))]),
        "offset 41: key 'k' claims 4611686018427387904 elements of type float32"
        " (at least 18446744073709551616 bytes), but the file ends 99 bytes later",
    ),
    "string array length": (
        build([("k", ARRAY, array(STRING, 2**61 + 1, bytes(99)))]),
        "key 'k' claims 2305843009213693953 elements of type string (at least 18446744073709551624 bytes)",
    ),
    "nested array length": (
        build([("k", ARRAY, array(ARRAY, 9, bytes(99)))]),
        "key 'k' claims 9 elements of type array (at least 108 bytes), but the file ends 99 bytes later",
    ),
    "inner array length": (
        build([("k", ARRAY, array(ARRAY, 1, array(U16, 100)))]),
        "key 'k' claims 100 elements of type uint16 (at least 200 bytes), but the file ends 0 bytes later",
    ),
    "array of bools": (
        build([("k", ARRAY, (BOOL, [1, 0, 7]))]),
        "offset 51: element 2 of key 'k' is a bool of value 7",
    ),
    "arrays too deep": (build([("k", ARRAY, nest(9))]), "key 'k' holds arrays more than 8 deep"),
    "arrays much too deep": (build([("k", ARRAY, nest(900))]), "key 'k' holds arrays more than 8 deep"),
    "string in array": (
        build([("k", ARRAY, array(STRING, 2, string("little", "ab") + number("little", "Q", 5)))]),
        "offset 67: string 1 of key 'k' needs 5 bytes, but the file ends 0 bytes later",
    ),
    "huge string in array": (
        build([("k", ARRAY, array(STRING, 2, number("little", "Q", 2**64 - 1) + bytes(99)))]),
        "string 0 of key 'k' needs 18446744073709551615 bytes",
    ),
    "cut string in array": (
        build([("k", ARRAY, array(STRING, 2, string("little", "abcdefgh") + b"abc"))]),
        "string 1 of key 'k' needs 8 bytes, but the file ends 3 bytes later",
    ),
    "alignment type": (
        build([("general.alignment", U64, 32)], ONE),
        "general.alignment is of type uint64; uint32 is needed",
    ),
    "alignment array": (
        build([("general.alignment", ARRAY, (U32, [32]))]),
        "general.alignment is of type array[uint32]; uint32 is needed",
    ),
    "alignment 0": (
        build([("general.alignment", U32, 0)]),
        "general.alignment is 0; a power of two up to 1048576",
    ),
    "alignment 24": (build([("general.alignment", U32, 24)]), "general.alignment is 24; a power of two"),
    "alignment huge": (
        build([("general.alignment", U32, 2**31)]),
        "general.alignment is 2147483648; a power of two",
    ),
    "tensor name empty": (build([], [("", (4,), 0, bytes(16))]), "offset 24: a tensor has an empty name"),
    "tensor name long": (
        build([], [("n" * 65536, (4,), 0, bytes(16))]),
        "a tensor's name is 65536 bytes long",
    ),
    "tensor name not UTF-8": (build([], [(b"\x80", (4,), 0, bytes(16))]), "a tensor's name is not UTF-8"),
    "tensor twice": (build([], [ONE[0], ONE[0]]), "tensor 't' is described twice"),
    "cut tensor": (
        build([], [("t", (1, 1, 1, 1), 0, bytes(4))])[:50],
        "offset 45: dimension 1 of tensor 't' needs 8 bytes, but the file ends 5 bytes later",
    ),
    "dimensions": (
        build([], [("t", (1, 1, 1, 1, 1), 0, bytes(4))]),
        "offset 33: tensor 't' has 5 dimensions; at most 4 are allowed",
    ),
    "dimension count": (
        build([], ONE, dimension_counts={"t": 2**32 - 1}),
        "tensor 't' has 4294967295 dimensions",
    ),
    "dimension 0": (build([], [("t", (4, 0), 0, b"")]), "offset 45: dimension 1 of tensor 't' is 0"),
    "dimension overflow": (
        build([], [("t", (2**32, 2**32), 0, b"")]),
        "offset 45: dimension 1 of tensor 't' is 4294967296: more than 9223372036854775807 elements",
    ),
    "dimension overflow to few": (
        build([], [("t", (2**63, 2, 2**63, 2**63), 0, bytes(64))]),
        "dimension 0 of tensor 't' is 9223372036854775808: more than 9223372036854775807 elements",
    ),
    "tensor type": (
        build([], [("t", (4,), 1000, bytes(16))]),
        "offset 45: tensor 't': unknown type number 1000; known:",
    ),
    "tensor type q4_2": (
        build([], [("t", (32,), 4, bytes(18))]),
        "tensor 't': type number 4 is q4_2, which was removed from GGUF",
    ),
    "tensor type q4_0_8_8": (build([], [("t", (32,), 33, bytes(18))]), "type number 33 is q4_0_8_8"),
    "row length": (
        build([], [("t", (48, 2), 2, bytes(54))]),
        "tensor 't' has rows of 48 elements; q4_0 needs a multiple of 32",
    ),
    "tensor unaligned": (
        build([], ONE, offsets={"t": 8}),
        "tensor 't' lies at offset 8 of the data, not a multiple of the alignment 32",
    ),
    "tensor cut": (
        build([], ONE)[:-1],
        "tensor 't' needs bytes 64 to 80, but the file has 79 (an incomplete download?)",
    ),
    "tensor beyond the end": (
        build([], ONE, offsets={"t": 2**64 - 32}),
        "tensor 't' needs bytes 18446744073709551648 to 18446744073709551664, but the file has 80",
    ),
    "tensors overlap": (
        build([], [("t", (16,), 0, bytes(64)), ("u", (4,), 0, bytes(16))], offsets={"u": 32}),
        "tensor 'u' at byte 128 overlaps tensor 't', which ends at byte 160",
    ),
    "tensors in one place": (build([], TWO, offsets={"u": 0}), "overlaps tensor 't'"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_defect(name: str) -> None:
    data, message = DEFECTS[name]
    with pytest.raises(FormatError, match=re.escape(message)) as caught:
        GGUFFile.from_bytes(data, "some.gguf")
    assert str(caught.value).startswith("some.gguf: at offset ")


@pytest.mark.parametrize("order", ["little", "big"])
def test_every_truncation_of_a_file_is_refused(order: str) -> None:
    keys = [("k", STRING, "v"), ("l", ARRAY, (STRING, ["a", "b"])), ("m", ARRAY, (I32, [1])), ("n", BOOL, 1)]
    data = build(keys, TWO, order=order)
    GGUFFile.from_bytes(data)
    for end in range(len(data)):
        with pytest.raises(FormatError):
            GGUFFile.from_bytes(data[:end])


@pytest.mark.parametrize(
    "data",
    [
        build(tensor_count=2**40) + bytes(1000),
        build([("k", ARRAY, array(F32, 2**40, bytes(1000)))]),
        build([("k", ARRAY, array(STRING, 2**40, bytes(1000)))]),
        build([("k", STRING, "v")])[:-9] + number("little", "Q", 2**40) + bytes(1000),
        build([], [("t", (2**40,), 0, b"")]),
        build([("general.alignment", U32, 2**31)], ONE),
    ],
)
def test_claims_allocate_nothing(data: bytes) -> None:
    with pytest.raises(FormatError):
        GGUFFile.from_bytes(data)
    tracemalloc.start()
    with pytest.raises(FormatError):
        GGUFFile.from_bytes(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 10


def test_paths(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such file; a GGUF file is needed"):
        GGUFFile.open(tmp_path / "none.gguf")
    with pytest.raises(NotFoundError, match="is a folder; a GGUF file is needed"):
        GGUFFile.open(tmp_path)
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(FormatError, match=r"empty\.gguf: the file is empty"):
        GGUFFile.open(tmp_path / "empty.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"GGUFoops")
    with pytest.raises(FormatError, match=r"bad\.gguf: at offset 4: GGUF version"):
        GGUFFile.open(tmp_path / "bad.gguf")


def split_keys(number_: int, count: int, total: int | None = 2) -> list:
    keys = [("split.no", U16, number_), ("split.count", U16, count)]
    return keys if total is None else [*keys, ("split.tensors.count", I32, total)]


def parts(folder: Path, *contents: bytes) -> Path:
    for index, content in enumerate(contents):
        (folder / f"m-{index + 1:05}-of-{len(contents):05}.gguf").write_bytes(content)
    return folder / f"m-00001-of-{len(contents):05}.gguf"


T, U = TWO[:1], TWO[1:]
SPLIT_DEFECTS = {
    "total": (
        (split_keys(0, 2, 3), T),
        (split_keys(1, 2), U),
        "split.tensors.count is 3, but the parts hold 2 tensors",
    ),
    "order": ((split_keys(1, 2), T), (split_keys(0, 2), U), "split.no is 1; 0 is needed in this place"),
    "same": ((split_keys(0, 2), T), (split_keys(0, 2), U), "split.no is 0; 1 is needed in this place"),
    "count": ((split_keys(0, 2), T), (split_keys(1, 3), U), "split.count is 3, but the model has 2 parts"),
    "name count": (
        (split_keys(0, 3), T),
        (split_keys(1, 3), U),
        "a part of a model split into 3: its name must end in",
    ),
    "twice": ((split_keys(0, 2), T), (split_keys(1, 2), T), "tensor 't' is also in"),
    "no number": (
        ([("split.count", U16, 2)], T),
        (split_keys(1, 2), U),
        "key 'split.no' is missing; an integer from 0",
    ),
    "no keys": (
        (split_keys(0, 2), T),
        ([], U),
        "key 'split.count' is missing; an integer from 0 to 99999 is needed",
    ),
    "text": (([("split.count", STRING, "2")], T), ([], U), "key 'split.count' is '2'; an integer"),
    "huge": (
        ([("split.count", U32, 2**32 - 1)], T),
        ([], U),
        "key 'split.count' is 4294967295; an integer from 0",
    ),
}


@pytest.mark.parametrize("name", SPLIT_DEFECTS)
def test_split_defect(tmp_path: Path, name: str) -> None:
    *contents, message = SPLIT_DEFECTS[name]
    path = parts(tmp_path, *(build(keys, tensors) for keys, tensors in contents))
    with pytest.raises(FormatError, match=re.escape(message)):
        GGUFFile.open(path)


def test_split_parts_that_are_missing_or_damaged(tmp_path: Path) -> None:
    path = parts(tmp_path, build(split_keys(0, 2), T), build(split_keys(1, 2), U))
    assert list(GGUFFile.open(path).tensors) == ["t", "u"]
    second = tmp_path / "m-00002-of-00002.gguf"
    second.write_bytes(second.read_bytes()[:-1])
    with pytest.raises(FormatError, match=r"m-00002-of-00002\.gguf: .*an incomplete download"):
        GGUFFile.open(path)
    second.unlink()
    with pytest.raises(
        NotFoundError, match=r"m-00002-of-00002\.gguf: no such file, but .* needs all 2 parts"
    ):
        GGUFFile.open(path)
    renamed = tmp_path / "renamed.gguf"
    path.rename(renamed)
    with pytest.raises(FormatError, match=r"its name must end in -00001-of-00002\.gguf"):
        GGUFFile.open(renamed)
    odd = tmp_path / "m-00009-of-00002.gguf"
    renamed.rename(odd)
    with pytest.raises(FormatError, match=re.escape("the name says part 9, but split.count is 2")):
        GGUFFile.open(odd)


def test_one_part_is_not_split(tmp_path: Path) -> None:
    path = tmp_path / "any name.gguf"
    path.write_bytes(build(split_keys(0, 1), TWO))
    assert list(GGUFFile.open(path).tensors) == ["t", "u"]
