"""What llama.cpp does otherwise with a model that GGUF and nybble can express: for reports.

Found by comparing logits with llama.cpp (llama-cpp-python 0.3.36) on small models of every family.
"""

from __future__ import annotations

from nybble.checkpoint.config import ModelConfig
from nybble.formats.gguf.write_config import WRITTEN_AS, attention_scale_is_default

_GEMMA = ("gemma2", "gemma3")


def llama_cpp_notes(config: ModelConfig) -> list[str]:
    """Sentences about what llama.cpp ignores or does not load; empty for all usual models.

    ``config`` is in GGUF form.
    """
    architecture = WRITTEN_AS.get(config.architecture, config.architecture)
    gemma = architecture in _GEMMA
    rope = config.rope
    window = next((w for layer in range(config.num_hidden_layers) if (w := config.layer_window(layer))), None)
    scales = {
        "attention.scale": not attention_scale_is_default(config),
        "embedding_scale": config.embedding_scale != 1 and not gemma,
        "logit_scale": config.logit_scale != 1,
        "residual_scale": config.residual_scale != 1,
    }
    caps = architecture == "gemma2" and not (config.attention_softcap and config.logit_softcap)
    notes = {
        f"llama.cpp ignores {' and '.join(name for name, used in scales.items() if used)}"
        f" in {architecture} files and will answer otherwise": any(scales.values()),
        f"llama.cpp ignores the sliding window of {window} in {architecture} files: there every token"
        " sees everything before it": window is not None and not gemma,
        "llama.cpp expects a sliding window and both soft caps in gemma2 files": caps
        or (architecture == "gemma2" and window is None),
        "llama.cpp ignores the attention's soft cap in gemma3 files": architecture == "gemma3"
        and config.attention_softcap is not None,
        f"llama.cpp does not load {architecture} files with rope_freqs.weight": architecture != "llama"
        and bool(rope.frequency_factors),
        f"llama.cpp does not load {architecture} files that rotate a part of each head": rope.rotary_dim
        != config.head_dim
        and architecture not in ("phi3", *_GEMMA),
        "llama.cpp chooses longrope's factors by the context that it is given, not by the length of the"
        " text: give it no more context than you need": rope.kind == "longrope" and architecture == "phi3",
        f"llama.cpp does not load {architecture} files with longrope's factors": rope.kind == "longrope"
        and architecture != "phi3",
    }
    return [note for note, holds in notes.items() if holds]
