"""Adapter: LoRA's low-rank changes of a model's weights, whatever file they came from.

The change of a weight W (out_features, in_features) is ``scale * (B @ A)``, A (rank, in_features) and
B (out_features, rank); a weight of its own multiplies it when it is applied (arXiv:2106.09685). That of
the embedding (vocab_size, hidden_size), which is looked up and not multiplied, is ``(B @ A).T`` with
A (rank, vocab_size) and B (hidden_size, rank), as PEFT has it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from nybble.checkpoint.config import ModelConfig
from nybble.checkpoint.forms import INTERLEAVED_IN_GGUF, permuted, row_order
from nybble.checkpoint.tensor import Tensor
from nybble.errors import FormatError, UnsupportedError

EMBEDDING = "model.embed_tokens.weight"
OUTPUT = "lm_head.weight"
MAX_RANK = 65536
_ROTATED = re.compile(r"model\.layers\.\d+\.self_attn\.([qk])_proj\.weight")
_SHOWN = 3  # names in a message


@dataclass(frozen=True)
class LoraPair:
    """The two matrices of one weight."""

    a: Tensor
    """(rank, in_features); of the embedding (rank, vocab_size)."""
    b: Tensor
    """(out_features, rank); of the embedding (hidden_size, rank)."""
    scale: float
    """alpha / rank, or alpha / sqrt(rank) where the adapter was trained with rsLoRA."""

    @property
    def rank(self) -> int:
        """Rows of A and columns of B."""
        return self.a.shape[0]

    @property
    def alpha(self) -> float:
        """The alpha that gives this scale as alpha / rank."""
        return self.scale * self.rank


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter as data. ``pairs`` by the canonical name of the weight that they change."""

    name: str
    pairs: Mapping[str, LoraPair]
    architecture: str = ""
    """The base model's, where the file says it; empty: unknown."""
    interleaved: bool = False
    """How the rows of B of q and k lie; see ``RopeConfig.interleaved``."""
    metadata: Mapping[str, object] = field(default_factory=dict)
    """``peft.config``, or the flat GGUF keys."""
    source: Path | None = None

    @property
    def parameters(self) -> int:
        """Number of values."""
        return sum(
            tensor.shape[0] * tensor.shape[1] for pair in self.pairs.values() for tensor in (pair.a, pair.b)
        )

    @property
    def nbytes(self) -> int:
        """Encoded size of all matrices."""
        return sum(pair.a.nbytes + pair.b.nbytes for pair in self.pairs.values())

    def with_rows(self, config: ModelConfig, *, interleaved: bool) -> Adapter:
        """The adapter with the rows of q and k in the given order; ``config`` is the base model's.

        Raises:
            UnsupportedError: a B of q or k has another number of rows than the config says.
        """
        if interleaved == self.interleaved:
            return self
        pairs: dict[str, LoraPair] = {}
        for name, pair in self.pairs.items():
            match = _ROTATED.fullmatch(name)
            if match is not None:
                heads = config.num_attention_heads if match[1] == "q" else config.num_key_value_heads
                rows = heads * config.head_dim
                if pair.b.shape[0] != rows:
                    raise _does_not_fit(self, f"{name}: B has {pair.b.shape[0]} rows, the model {rows}")
                order = row_order(rows, config.head_dim, config.rope.rotary_dim, interleaved=interleaved)
                pairs[name] = replace(pair, b=permuted(pair.b, order))
            else:
                pairs[name] = pair
        return replace(self, pairs=pairs, interleaved=interleaved)

    @property
    def has_rotated(self) -> bool:
        """Whether the order of q's and k's rows matters."""
        return any(_ROTATED.fullmatch(name) for name in self.pairs)


def lora_pair(where: str, name: str, a: Tensor | None, b: Tensor | None) -> LoraPair:
    """A pair whose shapes belong together, with scale 1.

    Raises:
        FormatError: one of the two is missing, is no matrix, or their ranks differ.
    """
    if a is None or b is None:
        raise FormatError(f"{where}: {name} has matrix {'B' if a is None else 'A'} alone")
    for letter, tensor in (("A", a), ("B", b)):
        if len(tensor.shape) != 2 or min(tensor.shape) < 1:
            raise FormatError(f"{where}: {letter} of {name} has the shape {tensor.shape}; a matrix is needed")
    if a.shape[0] != b.shape[1] or a.shape[0] > MAX_RANK:
        raise FormatError(
            f"{where}: A of {name} has rank {a.shape[0]} and B {b.shape[1]}; one rank up to {MAX_RANK} is"
            " needed"
        )
    return LoraPair(a, b, 1.0)


def interleaved_in_gguf(architecture: str) -> bool:
    """Whether GGUF files of an architecture have q and k rows permuted."""
    return architecture in INTERLEAVED_IN_GGUF


def fitted(adapter: Adapter, config: ModelConfig, tensors: Mapping[str, Tensor]) -> Adapter:
    """The adapter in the form of a model, once everything in it was found to belong to that model.

    Raises:
        UnsupportedError: it is for another architecture, or changes a weight that the model does not
            have, or of another shape; the message names it.
    """
    known = {"mistral": "llama"}
    own, base = (known.get(name, name) for name in (adapter.architecture, config.architecture))
    if own and own != base:
        raise _does_not_fit(adapter, f"it is for the architecture {own!r}, and the model is {base!r}")
    missing = [name for name in adapter.pairs if name not in tensors and not _is_tied_output(name, config)]
    if missing:
        shown = ", ".join(missing[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
        raise _does_not_fit(adapter, f"the model lacks {len(missing)} of its weights: {shown}")
    for name, pair in adapter.pairs.items():
        shape = tensors[EMBEDDING if name not in tensors else name].shape
        has = (pair.b.shape[0], pair.a.shape[1])
        if (has[::-1] if name == EMBEDDING else has) != shape:
            raise _does_not_fit(
                adapter, f"{name} is {shape} in the model, and B {pair.b.shape} times A {pair.a.shape}"
            )
    return adapter.with_rows(config, interleaved=config.rope.interleaved)


def _is_tied_output(name: str, config: ModelConfig) -> bool:
    return name == OUTPUT and config.tie_word_embeddings


def _does_not_fit(adapter: Adapter, problem: str) -> UnsupportedError:
    return UnsupportedError(f"adapter {adapter.name!r} does not fit the model: {problem}")
