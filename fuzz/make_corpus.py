"""Writes the seed files in fuzz/corpus/gguf: small and valid, each showing other parts of the format.

python fuzz/make_corpus.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from nybble.checkpoint.encodings import ENCODINGS  # noqa: E402
from support.gguf_bytes import build  # noqa: E402

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)


CORPUS = ROOT / "fuzz" / "corpus" / "gguf"

SCALARS = [
    ("general.architecture", STRING, "llama"),
    ("a.u8", U8, 200), ("a.i8", I8, -5), ("a.u16", U16, 60000), ("a.i16", I16, -5),
    ("a.u32", U32, 2**31), ("a.i32", I32, -5), ("a.f32", F32, 1.5), ("a.bool", BOOL, 1),
    ("a.u64", U64, 2**63), ("a.i64", I64, -5), ("a.f64", F64, 0.1), ("a.empty", STRING, ""),
    ("a.utf8", STRING, "жук ☃ 𝄞"),
]  # fmt: skip
ARRAYS = [
    ("b.u8", ARRAY, (U8, [1, 2, 3])),
    ("b.i16", ARRAY, (I16, [-1, 0, 1])),
    ("b.u32", ARRAY, (U32, [])),
    ("b.f32", ARRAY, (F32, [0.5, -0.5, 1e30])),
    ("b.bool", ARRAY, (BOOL, [1, 0, 1])),
    ("b.u64", ARRAY, (U64, [1, 2**64 - 1])),
    ("b.f64", ARRAY, (F64, [0.25])),
    ("b.strings", ARRAY, (STRING, ["", "a", "▁the", "<0x0A>", "long" * 20])),
]
NESTED = [
    ("c.two", ARRAY, (ARRAY, [(U32, [1, 2]), (U32, []), (STRING, ["x", "yz"])])),
    ("c.three", ARRAY, (ARRAY, [(ARRAY, [(I8, [-1]), (F32, [1.0])]), (ARRAY, [])])),
]
VOCABULARY = [
    ("tokenizer.ggml.model", STRING, "llama"),
    ("tokenizer.ggml.tokens", ARRAY, (STRING, [f"token{i}" for i in range(40)])),
    ("tokenizer.ggml.scores", ARRAY, (F32, [-float(i) for i in range(40)])),
    ("tokenizer.ggml.token_type", ARRAY, (I32, [1] * 40)),
    ("tokenizer.ggml.merges", ARRAY, (STRING, ["t o", "to k", "e n"])),
    ("tokenizer.ggml.bos_token_id", U32, 1),
]


def tensor(name: str, kind: str, shape: tuple[int, ...], seed: int = 0):
    row = ENCODINGS[kind]
    size = row.nbytes(int(np.prod(shape, dtype=np.int64)))
    return (
        name,
        shape,
        row.ggml_type,
        np.random.default_rng(seed).integers(0, 256, size, np.uint8).tobytes(),
    )


def every_type() -> list:
    return [
        tensor(f"blk.{i}.{kind}", kind, (row.block_size, 2))
        for i, (kind, row) in enumerate(ENCODINGS.items())
    ]


def files() -> dict[str, bytes]:
    few = [
        tensor("token_embd.weight", "q4_0", (32, 3)),
        tensor("blk.0.attn_norm.weight", "f32", (5,)),
        tensor("output.weight", "f16", (4, 2, 2, 1)),
        tensor("scalar", "f32", ()),
    ]
    split = [("split.no", U16, 0), ("split.count", U16, 1), ("split.tensors.count", I32, 1)]
    return {
        "empty": build(),
        "scalars": build(SCALARS),
        "arrays": build(SCALARS[:2] + ARRAYS),
        "nested": build(NESTED),
        "vocabulary": build(VOCABULARY),
        "tensors": build(SCALARS[:3], few),
        "types": build(SCALARS[:1], every_type()),
        "alignment": build([("general.alignment", U32, 8)], few, alignment=8),
        "wide_alignment": build([("general.alignment", U32, 256)], few[:2], alignment=256),
        "split": build(split, few[:1]),
        "version2": build(SCALARS + ARRAYS, few, version=2),
        "big_endian": build(SCALARS + ARRAYS + NESTED, few, order="big"),
        "big_endian2": build(SCALARS[:4] + VOCABULARY, few, order="big", version=2),
        "model": build(SCALARS + VOCABULARY + NESTED, [*few, tensor("k", "q4_k", (256, 1))]),
    }


def main() -> None:
    CORPUS.mkdir(parents=True, exist_ok=True)
    for name, content in files().items():
        (CORPUS / f"{name}.gguf").write_bytes(content)
        print(f"{name}.gguf: {len(content)} bytes")


if __name__ == "__main__":
    main()
