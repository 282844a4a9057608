"""Makes Phi-3-mini-shaped GGUF files with random weights, for speed and memory measurements.

The shapes and the mix of encodings are those of the real model as llama.cpp's quantize tool makes
it; only the number of layers is chosen (8 by default: 1.1 B parameters). Random bytes are valid
blocks; scales are chosen so that activations stay sane. Loads in llama.cpp too.

    python bench/make_models.py VOCABULARY.gguf OUTPUT.gguf --mix q4_k_m --layers 8

VOCABULARY is llama.cpp's ``models/ggml-vocab-phi-3.gguf`` (metadata only): tokenizer and config.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

HIDDEN, INTERMEDIATE, VOCABULARY = 3072, 8192, 32064
SLIDING_WINDOW = 2047
STANDARD_DEVIATION = 0.02  # of the weights: about 1 / sqrt(HIDDEN)


def more_bits(layer: int, layers: int) -> bool:
    """Layers whose ffn_down gets more bits in a _K_M mix (llama.cpp's ``use_more_bits``)."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def q4_0_mix(name: str, layer: int, layers: int) -> Type:
    return Type.Q6_K if name == "output" else Type.Q4_0


def q4_k_m_mix(name: str, layer: int, layers: int) -> Type:
    if name == "output" or (name == "ffn_down" and more_bits(layer, layers)):
        return Type.Q6_K
    return Type.Q5_K if name == "attn_qkv" else Type.Q4_K


def q8_0_mix(name: str, layer: int, layers: int) -> Type:
    return Type.Q8_0


MIXES: dict[str, tuple[Callable[[str, int, int], Type], int]] = {
    "q4_0": (q4_0_mix, 2),
    "q4_k_m": (q4_k_m_mix, 15),
    "q8_0": (q8_0_mix, 7),
}
"""Encoding of each matrix, and ``general.file_type``."""

SCALES: dict[Type, dict[int, float]] = {
    # Byte offset of each f16 scale in a block: its value in units of STANDARD_DEVIATION. The
    # offsets of a K block's minimum are chosen so that the mean is near 0.
    Type.Q4_0: {0: 1 / 4.6},
    Type.Q8_0: {0: 1 / 74.0},
    Type.Q6_K: {208: 1 / (74.0 * 18.5)},
    Type.Q4_K: {0: 1 / 255.0, 2: 7.5 / 255.0},
    Type.Q5_K: {0: 1 / 520.0, 2: 15.5 / 520.0},
}


def random_rows(random: np.random.Generator, encoding: Type, rows: int, columns: int) -> np.ndarray:
    """(rows, bytes of a row) uint8 of valid blocks."""
    block, size = gguf.GGML_QUANT_SIZES[encoding]
    data = random.integers(0, 2**64, (rows * columns // block * size + 7) // 8, np.uint64).view(np.uint8)
    blocks = data[: rows * columns // block * size].reshape(-1, size)
    jitter = random.uniform(0.7, 1.3, len(blocks))
    for offset, value in SCALES[encoding].items():
        scale = (jitter * value * STANDARD_DEVIATION).astype(np.float16)
        blocks[:, offset : offset + 2] = scale.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


def matrices(layers: int) -> Iterator[tuple[str, str, int, int, int]]:
    """Name, kind, layer, rows and columns of every matrix, in the order of the file."""
    yield "token_embd", "token_embd", 0, VOCABULARY, HIDDEN
    yield "output", "output", 0, VOCABULARY, HIDDEN
    for layer in range(layers):
        for kind, rows, columns in (
            ("attn_qkv", 3 * HIDDEN, HIDDEN),
            ("attn_output", HIDDEN, HIDDEN),
            ("ffn_up", 2 * INTERMEDIATE, HIDDEN),
            ("ffn_down", HIDDEN, INTERMEDIATE),
        ):
            yield f"blk.{layer}.{kind}", kind, layer, rows, columns


def make_phi3(vocabulary: Path, output: Path, mix: str, layers: int, seed: int = 0) -> None:
    """Writes the file; one tensor at a time is in memory."""
    choose, file_type = MIXES[mix]
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(output, "phi3")
    replaced = {
        "phi3.block_count": layers,
        "general.file_type": file_type,
        "general.name": f"Random Phi-3-mini shapes, {layers} layers, {mix}",
    }
    for key, field in gguf.GGUFReader(vocabulary).fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        value = replaced.get(key, field.contents())
        writer.add_key_value(key, value, field.types[0], field.types[1] if len(field.types) > 1 else None)
    writer.add_sliding_window(SLIDING_WINDOW)
    norms = ["output_norm", *(f"blk.{i}.{kind}" for i in range(layers) for kind in ("attn_norm", "ffn_norm"))]
    for name in norms:
        writer.add_tensor_info(f"{name}.weight", (HIDDEN,), np.dtype(np.float32), 4 * HIDDEN)
    for name, kind, layer, rows, columns in matrices(layers):
        encoding = choose(kind, layer, layers)
        block, size = gguf.GGML_QUANT_SIZES[encoding]
        shape = (rows, columns // block * size)
        writer.add_tensor_info(f"{name}.weight", shape, np.dtype(np.uint8), rows * shape[1], encoding)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _ in norms:
        writer.write_tensor_data(random.uniform(0.8, 1.2, HIDDEN).astype(np.float32))
    for _, kind, layer, rows, columns in matrices(layers):
        writer.write_tensor_data(random_rows(random, choose(kind, layer, layers), rows, columns))
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a Phi-3-mini-shaped GGUF file with random weights.")
    parser.add_argument("vocabulary", type=Path, help="ggml-vocab-phi-3.gguf")
    parser.add_argument("output", type=Path)
    parser.add_argument("--mix", choices=MIXES, default="q4_0")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make_phi3(arguments.vocabulary, arguments.output, arguments.mix, arguments.layers, arguments.seed)


if __name__ == "__main__":
    main()
