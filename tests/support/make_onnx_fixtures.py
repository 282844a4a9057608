"""Makes tests/data/onnxruntime/: tiny random decoders as onnxruntime-genai's model builder writes them.

    OMP_NUM_THREADS=1 python tests/support/make_onnx_fixtures.py [NAME ...]

Needs torch, transformers and onnxruntime-genai (0.18 made what is there). The weights are random with
a fixed seed, so the files say nothing and belong to nobody.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import tokenizers
import torch
import transformers

OUTPUT = Path(__file__).parents[1] / "data" / "onnxruntime"
VOCABULARY = 98  # no width of a layer: the builder takes such a one for the output matrix
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip
TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}{% endfor %}<s>"
LONGROPE = {
    "num_key_value_heads": 2,
    "original_max_position_embeddings": 16,
    "rope_parameters": {
        "rope_type": "longrope", "type": "longrope", "rope_theta": 10000.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0 + 0.05 * i for i in range(8)], "long_factor": [1.5 + 0.4 * i for i in range(8)],
        "factor": 4.0,
    },
}  # fmt: skip
FIXTURES = {
    "llama-int4-cpu": ("llama", {}, "int4", "cpu", ["int4_block_size=32"]),
    "phi3-longrope-int4-cpu": ("phi3", LONGROPE, "int4", "cpu", ["int4_block_size=32"]),
    "phi3-longrope-int4-dml": ("phi3", LONGROPE, "int4", "dml", ["int4_block_size=32"]),
    "phi3-longrope-fp32-cpu": ("phi3", LONGROPE, "fp32", "cpu", []),
}
STORED = ("llama-int4-cpu", "phi3-longrope-int4-cpu", "phi3-longrope-int4-dml")


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token a byte of printable ASCII, and three special ones."""
    names = ["<pad>", "<s>", "</s>"] + [chr(code) for code in range(33, 33 + VOCABULARY - 4)] + ["Ġ"]
    model = tokenizers.models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<pad>")
    fast = tokenizers.Tokenizer(model)
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = tokenizers.decoders.ByteLevel()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    made.chat_template = TEMPLATE
    return made


def build(name: str, output: Path) -> transformers.PreTrainedModel:
    """Write the folder of one fixture; returns the model in it, float32."""
    family, switches, precision, provider, extra = FIXTURES[name]
    torch.manual_seed(7)
    config = transformers.AutoConfig.for_model(family, **{**SIZES, **switches})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", folder]
        command += ["-o", str(output), "-p", precision, "-e", provider, "-c", folder + "/cache"]
        command += ["--extra_options", *extra] if extra else []
        subprocess.run(command, check=True, capture_output=True)
    return model


def main() -> None:
    torch.set_num_threads(1)
    for name in sys.argv[1:] or STORED:
        build(name, OUTPUT / name)


if __name__ == "__main__":
    main()
