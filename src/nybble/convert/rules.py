"""What each format can hold: which encodings of which tensor, and what comes closest where it cannot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from nybble.checkpoint.config import ModelConfig
from nybble.checkpoint.encodings import ENCODINGS, Encoding, encoding
from nybble.checkpoint.encodings.affine import affine_format
from nybble.checkpoint.forms import FormName
from nybble.checkpoint.tensor import Tensor
from nybble.convert.relation import INTEGERS, PLAIN_FLOATS
from nybble.convert.transcode.ggml_blocks import BLOCK_TYPES

EMBEDDING = "model.embed_tokens.weight"
OUTPUT = "lm_head.weight"


def output_name(config: ModelConfig) -> str:
    """The name of the matrix of the logits: the embedding's, where the two are one."""
    return EMBEDDING if config.tie_word_embeddings else OUTPUT


class Rules(Protocol):
    """What the plan asks about a target."""

    @property
    def form(self) -> FormName:
        """The conventions that its writer wants."""
        ...

    @property
    def name(self) -> str:
        """The target as a person calls it."""
        ...

    @property
    def prescribes(self) -> bool:
        """Whether to name this target is to agree to what its required encodings lose."""
        ...

    def required(self, tensor: Tensor) -> str | None:
        """The encoding that the target needs this tensor to have, or None where there is a choice."""
        ...

    def holds(self, tensor: Tensor, row: Encoding) -> bool:
        """Whether the target can hold the tensor in an encoding."""
        ...

    def exact(self, tensor: Tensor) -> Sequence[str]:
        """Encodings to try, in this order, where the tensor's own cannot stay; used only if exact."""
        ...

    def nearest(self, tensor: Tensor) -> str:
        """What ``--allow-lossy`` makes of a tensor that has no exact place."""
        ...


def bits_of(row: Encoding) -> float:
    """Bits of a weight; of affine groups those of the codes alone."""
    form = affine_format(row.name)
    return form.bits if form is not None else row.bits_per_weight


def is_matrix(tensor: Tensor) -> bool:
    """Whether it is a weight of two dimensions, and no vector or index."""
    return len(tensor.shape) == 2 and tensor.encoding.name not in INTEGERS


def is_linear(tensor: Tensor) -> bool:
    """Whether it is the matrix of a layer, and neither the embedding nor the output matrix."""
    return is_matrix(tensor) and tensor.name not in (EMBEDDING, OUTPUT)


def is_block(row: Encoding) -> bool:
    """Whether it has scales: everything but plain numbers."""
    return row.block_size > 1


@dataclass(frozen=True)
class GGUFRules:
    """llama.cpp wants vectors in f32; a matrix may have any of GGUF's encodings."""

    form: FormName = "gguf"
    name: str = "gguf"
    prescribes: bool = False

    def required(self, tensor: Tensor) -> str | None:
        return None if is_matrix(tensor) else "f32"

    def holds(self, tensor: Tensor, row: Encoding) -> bool:
        if not is_matrix(tensor):
            return row.name == "f32"
        return row.ggml_type is not None and row.name not in (*INTEGERS, "f64", "q8_1", "q8_k")

    def exact(self, tensor: Tensor) -> Sequence[str]:
        if affine_format(tensor.encoding.name) is None:
            return ("f32",)
        return ("q4_0", "q4_1", "q4_k", "q5_0", "q5_1", "q5_k", "q8_0")

    def nearest(self, tensor: Tensor) -> str:
        if tensor.shape[-1] % 32:
            return "f16"
        return "q4_1" if bits_of(tensor.encoding) <= 4 else "q8_0"


@dataclass(frozen=True)
class SafetensorsRules:
    """Plain numbers, or affine groups as one of the packings that transformers knows.

    ``quantization`` None: plain, unless the tensors are affine already. Embeddings, output matrices
    and vectors are plain always.
    """

    quantization: str | None = None
    form: FormName = "huggingface"
    name: str = "safetensors"
    prescribes: bool = False

    def required(self, tensor: Tensor) -> str | None:
        return None

    def holds(self, tensor: Tensor, row: Encoding) -> bool:
        form = affine_format(row.name)
        if form is not None:
            return is_linear(tensor) and not form.has_minimum  # no packing has minima
        return row.name in (*PLAIN_FLOATS, *INTEGERS, "f64")

    def exact(self, tensor: Tensor) -> Sequence[str]:
        if self.quantization is None or not is_linear(tensor):
            return ("bf16", "f16", "f32")
        return affine_candidates(tensor)

    def nearest(self, tensor: Tensor) -> str:
        if self.quantization is None or not is_linear(tensor):
            return "f32"
        bits = 4 if bits_of(tensor.encoding) < 5.5 or self.quantization == "awq" else 8
        group = 128 if tensor.shape[-1] % 128 == 0 else 32
        return f"int{bits}_g{group}_f16{'_z' if self.quantization == 'awq' else ''}"


def affine_candidates(tensor: Tensor, scales: Sequence[str] = ("f16", "f32")) -> tuple[str, ...]:
    """Affine encodings that may hold GGUF's blocks exactly, the smallest first.

    Those with minima are for blocks that have them, and come after integer zero points: more programs
    know these.
    """
    if not is_block(tensor.encoding) or affine_format(tensor.encoding.name) is not None:
        return ()
    group = 16 if tensor.encoding.name in _GROUPS_OF_16 else 32
    block = BLOCK_TYPES.get(tensor.encoding.name)
    least = int(bits_of(tensor.encoding)) if block is None else block.highest.bit_length()
    widths = [bits for bits in (4, 8) if bits >= least]
    kinds = ("", "_z", "_m") if tensor.encoding.name in _MINIMA else ("", "_z")
    return tuple(f"int{bits}_g{group}_{scale}{kind}" for bits in widths for scale in scales for kind in kinds)


def affine_nearest(tensor: Tensor, scale: str) -> tuple[str, ...]:
    """Affine encodings that come near GGUF's blocks, the first the nearest: of no fewer bits, as mixes
    have their better types for a reason."""
    name = tensor.encoding.name
    bits = 4 if bits_of(tensor.encoding) < 5.5 else 8
    zero = "" if name in _SYMMETRIC else "_z"
    groups = (16, 32) if name in _GROUPS_OF_16 else (32, 16)
    return tuple(f"int{bits}_g{group}_{scale}{zero}" for group in groups)


_GROUPS_OF_16 = ("q2_k", "q3_k", "q6_k")
_MINIMA = ("q4_1", "q5_1", "q4_k", "q5_k")
_SYMMETRIC = ("q4_0", "q5_0", "q8_0", "q3_k", "q6_k")
_AFFINE = tuple(
    f"int{bits}_g{group}_{scale}{zero}"
    for bits in (4, 8)
    for group in (32, 128)
    for scale in ("f16", "f32")
    for zero in ("", "_z")
)


def known_encodings(rules: Rules, tensor: Tensor) -> list[str]:
    """Names that ``--encoding`` may have for the tensor: those that can be made; of affine ones the usual."""
    rows = [
        *(row for row in ENCODINGS.values() if row.name not in (*INTEGERS, "f64")),
        *map(encoding, _AFFINE),
    ]
    return [
        row.name
        for row in rows
        if row.quantize is not None
        and rules.holds(tensor, row)
        and not (tensor.shape and tensor.shape[-1] % row.block_size)
    ]
