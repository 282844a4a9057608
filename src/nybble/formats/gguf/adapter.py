"""GGUF files with a LoRA adapter, as llama.cpp reads them.

    general.type          "adapter"
    general.architecture  the base model's
    adapter.type          "lora"
    adapter.lora.alpha    f32; a pair's scale is alpha / rank, and 1 where alpha is 0 or absent
    X.lora_a, X.lora_b    A (rank, in_features) and B (out_features, rank) of the tensor X, which has its
                          GGUF name; of token_embd.weight A is transposed: (vocab_size, rank)

B's rows of q and k are permuted as those of the model are. Source: llama.cpp's
``convert_lora_to_gguf.py`` and ``src/llama-adapter.cpp``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from nybble.checkpoint.adapter import EMBEDDING, Adapter, LoraPair, interleaved_in_gguf, lora_pair
from nybble.checkpoint.apply_adapters import transposed
from nybble.checkpoint.encodings import encoding
from nybble.checkpoint.tensor import Tensor
from nybble.errors import ConversionError, FormatError, UnsupportedError
from nybble.formats.fields import Fields
from nybble.formats.gguf.names import LAYER_NAMES, canonical_name, gguf_name
from nybble.formats.gguf.reader import GGUFFile
from nybble.formats.gguf.writer import write_file

ALPHA = "adapter.lora.alpha"
_INVOCATION = "adapter.alora.invocation_tokens"


def is_gguf_adapter(metadata: Mapping[str, object]) -> bool:
    """Whether a file's metadata are an adapter's."""
    return metadata.get("general.type") == "adapter"


def read_gguf_adapter(path: str | os.PathLike[str], name: str | None = None) -> Adapter:
    """Opens a file; its matrices are views of it.

    Args:
        path: the file.
        name: the adapter's; None: the file's without its ending.

    Raises:
        NotFoundError: no such file.
        FormatError: it is damaged, a model, or its matrices do not belong together.
        UnsupportedError: another kind of adapter than LoRA, or for an architecture that is not known.
    """
    file = GGUFFile.open(path)
    try:
        return _adapter(file, name or Path(path).stem)
    except BaseException:
        file.close()
        raise


def _adapter(file: GGUFFile, name: str) -> Adapter:
    where = str(file.path)
    fields = Fields(file.metadata, where)
    if not is_gguf_adapter(file.metadata):
        raise FormatError(f"{where}: is a model and no adapter (general.type is not 'adapter')")
    kind = fields.string("adapter.type")
    if kind != "lora" or _INVOCATION in file.metadata:
        kind = "alora" if kind == "lora" else kind
        raise UnsupportedError(f"{where}: adapter.type is {kind[:40]!r}; plain lora alone is supported")
    architecture = fields.string("general.architecture")
    if architecture not in LAYER_NAMES:
        raise UnsupportedError(
            f"{where}: is for the architecture {architecture[:40]!r}; known: {', '.join(LAYER_NAMES)}"
        )
    alpha = fields.number(ALPHA, 0.0, minimum=-1e9, maximum=1e9)
    matrices: dict[str, dict[str, Tensor]] = {}
    for key in file.infos:
        base, _, end = key.rpartition(".")
        letter = {"lora_a": "A", "lora_b": "B"}.get(end)
        weight = canonical_name(architecture, base) if letter else None
        if letter is None or weight is None or not weight.endswith(".weight"):
            raise UnsupportedError(
                f"{where}: the tensor {key[:200]!r} is no matrix of LoRA; without it the answers would be"
                " wrong"
            )
        matrices.setdefault(weight, {})[letter] = file.tensors[key].changed(name=f"{weight}.{letter}")
    if not matrices:
        raise FormatError(f"{where}: holds no LoRA matrices")
    pairs: dict[str, LoraPair] = {}
    for weight, found in matrices.items():
        a = found.get("A")
        if weight == EMBEDDING and a is not None and len(a.shape) == 2:
            a = _turned(a)
        pair = lora_pair(where, weight, a, found.get("B"))
        pairs[weight] = replace(pair, scale=alpha / pair.rank if alpha else 1.0)
    return Adapter(
        name,
        pairs,
        architecture=architecture,
        interleaved=interleaved_in_gguf(architecture),
        metadata=dict(file.metadata),
        source=file.path,
    )


def _turned(a: Tensor) -> Tensor:
    """A of the embedding, which lies the other way round in these files."""
    if a.encoding.block_size > 1:
        values = np.ascontiguousarray(a.dequantize(), "<f4").reshape(-1).view(np.uint8)
        a = a.changed(encoding=encoding("f32"), data=values)
    return transposed(a)


# -- writing -----------------------------------------------------------------------------------------


def write_gguf_adapter(adapter: Adapter, path: Path) -> list[Path]:
    """Writes the file. A GGUF file has one alpha; where pairs need several, B is multiplied.

    Args:
        adapter: with its architecture, and q's and k's rows as GGUF has them there.
        path: the file.

    Raises:
        ValueError: no architecture, or another order of rows.
        UnsupportedError: GGUF has no name for a weight in this architecture.
        ConversionError: pairs with scales that no single alpha gives.
    """
    if adapter.architecture not in LAYER_NAMES:
        raise ValueError(f"adapter {adapter.name!r} has no architecture that GGUF knows")
    if adapter.has_rotated and adapter.interleaved != interleaved_in_gguf(adapter.architecture):
        raise ValueError(f"adapter {adapter.name!r} has q and k rows as transformers; with_rows changes that")
    metadata: dict[str, object] = {
        "general.architecture": "llama" if adapter.architecture == "mistral" else adapter.architecture,
        "general.type": "adapter",
        "adapter.type": "lora",
        "general.name": adapter.name,
        ALPHA: np.float32(_one_alpha(adapter)),
    }
    tensors: list[Tensor] = []
    for weight, pair in adapter.pairs.items():
        name = gguf_name(adapter.architecture, weight)
        a = transposed(pair.a) if weight == EMBEDDING else pair.a
        tensors += [a.changed(name=f"{name}.lora_a"), pair.b.changed(name=f"{name}.lora_b")]
    return write_file(path, metadata, tensors)


def _one_alpha(adapter: Adapter) -> float:
    """The alpha of all pairs, as float32."""
    alphas = {float(np.float32(pair.alpha)): name for name, pair in adapter.pairs.items()}
    if len(alphas) > 1:
        shown = ", ".join(f"{name}: {alpha:g}" for alpha, name in list(alphas.items())[:3])
        raise ConversionError(
            f"adapter {adapter.name!r} has {len(alphas)} different alphas ({shown}), and a GGUF file has one"
            " for all; allow loss to have B multiplied instead"
        )
    alpha = next(iter(alphas))
    if alpha == 0:
        raise ConversionError(
            f"adapter {adapter.name!r} has alpha 0 and changes nothing; llama.cpp would take it for absent"
        )
    return alpha


def with_one_alpha(adapter: Adapter) -> Adapter:
    """The adapter with a single alpha, in the others' B what that changes; exact where float32 is enough.

    A B that is multiplied becomes float32.
    """
    alphas = [float(np.float32(pair.alpha)) for pair in adapter.pairs.values()]
    alpha = max(set(alphas), key=alphas.count)
    pairs: dict[str, LoraPair] = {}
    for name, pair in adapter.pairs.items():
        if float(np.float32(pair.alpha)) != alpha:
            scale = alpha / pair.rank
            values = (pair.b.dequantize() * np.float32(pair.scale / scale)).astype("<f4")
            b = pair.b.changed(encoding=encoding("f32"), data=values.reshape(-1).view(np.uint8))
            pairs[name] = LoraPair(pair.a, b, scale)
        else:
            pairs[name] = pair
    return replace(adapter, pairs=pairs)
