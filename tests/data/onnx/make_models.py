"""Makes the ONNX models of this folder: tiny, random, as each exporter writes them.

    python tests/data/onnx/make_models.py builder   # torch, transformers 5, onnxruntime-genai 0.18
    python tests/data/onnx/make_models.py dynamo    # torch 2.13, transformers 5, onnxscript 0.7
    python tests/data/onnx/make_models.py optimum   # torch, transformers 4.57, optimum-onnx 0.1

The models that are there were made with these versions. Weights are random with a fixed seed.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import onnx
import torch
import transformers

HERE = Path(__file__).parent
SIZES: dict[str, Any] = {
    "vocab_size": 72,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LONGROPE = {
    "rope_type": "longrope",
    "type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.5, 1.7, 1.8, 2.0, 2.2],
    "long_factor": [1.0, 3.0, 7.0, 20.0, 30.0, 31.0, 32.5, 40.0],
    "original_max_position_embeddings": 16,
}
GEMMA3 = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 9, "sliding_window_pattern": 2}


def random_model(model_type: str, **switches: Any) -> torch.nn.Module:
    """A model with large random weights."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **{**SIZES, **switches})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(0, 1.5 / parameter.shape[1] ** 0.5)
        else:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of single bytes, which the exporters want to copy."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:61]
    vocabulary = {text: at for at, text in enumerate(["<unk>", "<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)


def keep(name: str, source: Path) -> None:
    """The model as one file, and its genai_config.json."""
    target = HERE / name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    model = onnx.load(source / "model.onnx")
    for node in (*model.graph.node, *model.graph.value_info):
        node.ClearField("metadata_props")  # stack traces
        node.ClearField("doc_string")
    del model.graph.value_info[:]
    onnx.save(model, target / "model.onnx")
    if (source / "genai_config.json").exists():
        shutil.copy(source / "genai_config.json", target)
    print(name, (target / "model.onnx").stat().st_size)


def builder() -> None:
    """onnxruntime-genai's model builder."""
    import onnxruntime_genai.models.builder as genai

    jobs: list[tuple[str, str, dict[str, Any], str, str, list[str]]] = [
        (
            "builder-llama-int4",
            "llama",
            {"tie_word_embeddings": True},
            "int4",
            "cpu",
            ["shared_embeddings=true"],
        ),
        ("builder-llama-int8", "llama", {}, "int8", "cpu", []),
        (
            "builder-llama-qdq",
            "llama",
            {},
            "int4",
            "cpu",
            ["use_qdq=true", "is_symmetric=false", "block_size=16"],
        ),
        (
            "builder-phi3-longrope-int4",
            "phi3",
            {"num_key_value_heads": 2, "original_max_position_embeddings": 16, "rope_parameters": LONGROPE},
            "int4",
            "cpu",
            [],
        ),
        (
            "builder-phi3-longrope-dml",
            "phi3",
            {"num_key_value_heads": 2, "original_max_position_embeddings": 16, "rope_parameters": LONGROPE},
            "int4",
            "dml",
            ["block_size=16"],
        ),
        ("builder-qwen2-fp32", "qwen2", {}, "fp32", "cpu", []),
        ("builder-gemma3-int4", "gemma3_text", GEMMA3, "int4", "cpu", []),
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name, kind, switches, precision, provider, options in jobs:
            source, target = Path(folder, name, "hf"), Path(folder, name, "onnx")
            random_model(kind, **switches).save_pretrained(source)
            save_tokenizer(source)
            extra = genai.parse_extra_options(
                None, str(source), str(target), precision, provider, folder, options
            )
            config = extra["hf_details"]["hf_config"]
            if "full_attention" in config.rope_parameters:  # as transformers 4 had it
                config.rope_local_base_freq = config.rope_parameters["sliding_attention"]["rope_theta"]
                config.rope_theta = config.rope_parameters["full_attention"]["rope_theta"]
                config.rope_parameters = dict(config.rope_parameters["full_attention"])
            genai.create_model(None, str(source), str(target), precision, provider, folder, **extra)
            keep(name, target)


class Cached(torch.nn.Module):
    """A model whose cache is inputs and outputs."""

    def __init__(self, model: torch.nn.Module, layers: int) -> None:
        super().__init__()
        self.model = model
        self.layers = layers

    def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, *past: Any) -> Any:
        cache = transformers.DynamicCache()
        for layer in range(self.layers):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        found = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        kept = [part for layer in found.past_key_values.layers for part in (layer.keys, layer.values)]
        return (found.logits, *kept)


def dynamo() -> None:
    """torch.onnx.export of today."""
    switches = {"num_key_value_heads": 2, "original_max_position_embeddings": 16, "rope_parameters": LONGROPE}
    model = random_model("phi3", **switches)
    layers, past, tokens = 2, 2, 3
    arguments = (
        torch.randint(3, 60, (1, tokens)),
        torch.ones(1, tokens + past, dtype=torch.long),
        torch.arange(past, past + tokens)[None],
        *(torch.randn(1, 2, past, 16) for _ in range(2 * layers)),
    )
    names = [f"{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]
    grows = torch.export.Dim.DYNAMIC
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        torch.onnx.export(
            Cached(model, layers),
            arguments,
            str(Path(folder, "model.onnx")),
            input_names=[
                "input_ids",
                "attention_mask",
                "position_ids",
                *(f"past_key_values.{n}" for n in names),
            ],
            output_names=["logits", *(f"present.{n}" for n in names)],
            dynamic_shapes=({1: grows}, {1: grows}, {1: grows}, tuple({2: grows} for _ in names)),
            dynamo=True,
            external_data=False,
        )
        keep("dynamo-phi3-longrope", Path(folder))


def optimum() -> None:
    """optimum's exporter."""
    from optimum.exporters.onnx import main_export

    jobs: list[tuple[str, str, dict[str, Any]]] = [
        ("optimum-llama", "llama", {}),
        ("optimum-gemma3", "gemma3_text", GEMMA3),
        ("optimum-mistral", "mistral", {"sliding_window": 9}),
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name, kind, switches in jobs:
            source, target = Path(folder, name, "hf"), Path(folder, name, "onnx")
            random_model(kind, **switches).save_pretrained(source)
            save_tokenizer(source)
            main_export(str(source), output=target, task="text-generation-with-past", do_validation=False)
            keep(name, target)


if __name__ == "__main__":
    {"builder": builder, "dynamo": dynamo, "optimum": optimum}[sys.argv[1]]()
    print(json.dumps({"torch": torch.__version__, "transformers": transformers.__version__}))
