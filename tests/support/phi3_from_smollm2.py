"""Makes a speaking Phi-3 from SmolLM2: the same encoded weights under the phi3 architecture.

q, k and v rows are concatenated to attn_qkv and gate and up to ffn_up, block for block; q and k
rows are put back into the order that phi3 files have. Nothing is decoded, so the logits are
SmolLM2's. Needs the ``gguf`` package.

    python tests/support/phi3_from_smollm2.py SMOLLM2.gguf OUTPUT.gguf [--sliding-window N]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf
import numpy as np

DROPPED = ("GGUF.", "general.architecture", "llama.vocab_size")


def unpermuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undoes the row order of llama files: (heads, head_dim/2, 2) back to (heads, 2, head_dim/2)."""
    count, size = rows.shape
    return rows.reshape(heads, count // heads // 2, 2, size).swapaxes(1, 2).reshape(count, size)


def make_phi3(source: Path, output: Path, sliding_window: int | None = None) -> None:
    """Writes the file."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(output, "phi3")
    for key, field in reader.fields.items():
        if key.startswith(DROPPED):
            continue
        sub_type = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(key.replace("llama.", "phi3.", 1), field.contents(), field.types[0], sub_type)
    if sliding_window is not None:
        writer.add_sliding_window(sliding_window)
    heads = reader.fields["llama.attention.head_count"].contents()
    key_heads = reader.fields["llama.attention.head_count_kv"].contents()
    layers = reader.fields["llama.block_count"].contents()
    tensors = {tensor.name.removesuffix(".weight"): tensor for tensor in reader.tensors}

    def fuse(name: str, parts: list[tuple[str, int]]) -> None:
        kinds = {tensors[part].tensor_type for part, _ in parts}
        if len(kinds) != 1:
            raise ValueError(f"{name}: its parts have different encodings {kinds}")
        rows = [unpermuted(tensors[p].data, n) if n else tensors[p].data for p, n in parts]
        writer.add_tensor(f"{name}.weight", np.concatenate(rows), raw_dtype=kinds.pop())

    for layer in range(layers):
        p = f"blk.{layer}"
        fuse(f"{p}.attn_qkv", [(f"{p}.attn_q", heads), (f"{p}.attn_k", key_heads), (f"{p}.attn_v", 0)])
        fuse(f"{p}.ffn_up", [(f"{p}.ffn_gate", 0), (f"{p}.ffn_up", 0)])
    fused = ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up")
    for name, tensor in tensors.items():
        if name.rpartition(".")[2] not in fused:
            writer.add_tensor(f"{name}.weight", tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a Phi-3 GGUF file from SmolLM2's.")
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--sliding-window", type=int)
    arguments = parser.parse_args()
    make_phi3(arguments.source, arguments.output, arguments.sliding_window)


if __name__ == "__main__":
    main()
