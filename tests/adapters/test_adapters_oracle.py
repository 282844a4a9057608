"""LoRA against PEFT and transformers: files of both tools, logits applied and merged.

Needs torch, transformers and peft.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from nybble.checkpoint.apply_adapters import with_adapters  # noqa: E402
from nybble.checkpoint.forms import to_gguf_form  # noqa: E402
from nybble.checkpoint.merge_adapters import merge_adapters  # noqa: E402
from nybble.devices import reference  # noqa: E402
from nybble.devices.base import BatchItem  # noqa: E402
from nybble.formats.adapter import read_adapter  # noqa: E402
from nybble.formats.gguf.adapter import read_gguf_adapter, write_gguf_adapter  # noqa: E402
from nybble.formats.huggingface.adapter import read_peft_adapter, write_peft_adapter  # noqa: E402
from support.random_checkpoints import largest_difference  # noqa: E402
from support.random_models import checkpoint_of, oracle, random_model, tokens  # noqa: E402

# PEFT warns about transformers' names, and about what these tests mean to do.
pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FAMILIES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "llama": ({"num_key_value_heads": 2}, LINEARS),
    "qwen3": ({"head_dim": 16}, LINEARS),
    "phi3": ({}, ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
    "gemma3_text": ({"head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": 16}, LINEARS),
}


def peft_model(model: torch.nn.Module, folder: Path, seed: int, **config: Any) -> Any:
    """The model with a random adapter, saved to the folder."""
    options = {"r": 4, "lora_alpha": 16, "target_modules": LINEARS, "task_type": "CAUSAL_LM", **config}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            values = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(values * (0.3 if "_B" in name else 0.12))
    adapted.save_pretrained(folder)
    return adapted.eval()


def logits(checkpoint: Any, ids: list[int], weights: tuple[float, ...] = ()) -> np.ndarray:
    session = reference.compile_session(checkpoint)
    return session.forward([BatchItem(session.new_sequence(weights), ids, "all")])


@pytest.mark.parametrize("family", FAMILIES)
def test_applied_and_merged(family: str, tmp_path: Path) -> None:
    switches, targets = FAMILIES[family]
    model = random_model(family, **switches)
    base = checkpoint_of(model)
    ids = tokens(24)
    plain = oracle(model, ids)
    adapted = peft_model(model, tmp_path / "adapter", 1, target_modules=targets)
    expected = oracle(adapted, ids)
    assert largest_difference(expected, plain) > 0.05
    adapter = read_adapter(tmp_path / "adapter")
    with_it = with_adapters(base, [adapter])
    assert largest_difference(logits(with_it, ids), plain) < 1e-4
    assert np.array_equal(logits(with_it, ids, (0.0,)), logits(base, ids))
    assert largest_difference(logits(with_it, ids, (1.0,)), expected) < 1e-4
    for module in adapted.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= 0.5
    half = oracle(adapted, ids)
    assert largest_difference(logits(with_it, ids, (0.5,)), half) < 1e-4
    merged = merge_adapters(base, {adapter: 1.0})
    assert largest_difference(logits(merged, ids), expected) < 1e-4
    merged = merge_adapters(base, {adapter: 0.5}, encoding="f32")
    assert largest_difference(logits(merged, ids), half) < 1e-4
    # The same through GGUF: another order of q's and k's rows in some families.
    in_gguf = to_gguf_form(base)
    assert largest_difference(logits(with_adapters(in_gguf, [adapter]), ids, (1.0,)), expected) < 1e-4
    assert largest_difference(logits(merge_adapters(in_gguf, {adapter: 1.0}), ids), expected) < 1e-4


def test_two_adapters_at_once(tmp_path: Path) -> None:
    model = random_model("llama")
    base = checkpoint_of(model)
    ids = tokens(20)
    adapted = peft_model(model, tmp_path / "one", 1)
    other = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    adapted.add_adapter("two", other)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in adapted.named_parameters():
        if ".two." in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    adapted.save_pretrained(tmp_path / "both", selected_adapters=["two"])
    one, two = read_adapter(tmp_path / "one"), read_adapter(tmp_path / "both" / "two")
    both = with_adapters(base, [one, two])
    adapted.base_model.set_adapter(["default", "two"])
    expected = oracle(adapted, ids)
    assert largest_difference(logits(both, ids, (1.0, 1.0)), expected) < 1e-4
    assert largest_difference(logits(merge_adapters(base, {one: 1.0, two: 1.0}), ids), expected) < 1e-4
    for name, weights in (("default", (1.0, 0.0)), ("two", (0.0, 1.0))):
        adapted.set_adapter(name)
        assert largest_difference(logits(both, ids, weights), oracle(adapted, ids)) < 1e-4


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 7, "layers.1.mlp.up_proj": 2}},
        {"alpha_pattern": {"q_proj": 3, r"layers\.[12]\.mlp\.(up|down)_proj": 40}},
        {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"k_proj": 11}, "use_rslora": True},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": "all-linear"},
        {"layers_to_transform": [0, 2]},
        {"target_modules": ["embed_tokens", "q_proj"], "family": "gemma3_text"},
    ],
    ids=str,
)
def test_configs(config: dict[str, Any], tmp_path: Path) -> None:
    config = dict(config)
    family = config.pop("family", "llama")
    model = random_model(family, **FAMILIES[family][0], tie_word_embeddings=False)
    base = checkpoint_of(model)
    ids = tokens(12)
    plain = oracle(model, ids)
    adapted = peft_model(model, tmp_path / "adapter", 3, **config)
    expected = oracle(adapted, ids)
    assert largest_difference(expected, plain) > 0.01
    adapter = read_peft_adapter(tmp_path / "adapter")
    assert largest_difference(logits(with_adapters(base, [adapter]), ids, (1.0,)), expected) < 1e-4
    assert largest_difference(logits(merge_adapters(base, {adapter: 1.0}), ids), expected) < 1e-4


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_tied_embeddings(target: str, tmp_path: Path) -> None:
    """At run time PEFT changes one of the two uses of the matrix; so does merging here, which parts them."""
    model = random_model("llama", tie_word_embeddings=True)
    base = checkpoint_of(model)
    ids = tokens(12)
    adapted = peft_model(model, tmp_path / "adapter", 3, target_modules=[target])
    expected = oracle(adapted, ids)
    adapter = read_peft_adapter(tmp_path / "adapter")
    assert largest_difference(logits(with_adapters(base, [adapter]), ids, (1.0,)), expected) < 1e-4
    merged = merge_adapters(base, {adapter: 1.0})
    assert not merged.config.tie_word_embeddings
    assert largest_difference(logits(merged, ids), expected) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_written_folders_load_in_peft(family: str, tmp_path: Path) -> None:
    """PEFT to GGUF to PEFT: the same matrices, and the same logits in PEFT."""
    switches, targets = FAMILIES[family]
    model = random_model(family, **switches)
    config = checkpoint_of(model).config
    adapted = peft_model(
        model, tmp_path / "adapter", 1, target_modules=[*targets, "embed_tokens"], rank_pattern={"o_proj": 6},
        lora_alpha=16,
    )  # fmt: skip
    # Ranks that differ with one alpha: what a GGUF file can say.
    ids = tokens(12)
    expected = oracle(adapted, ids)
    first = read_peft_adapter(tmp_path / "adapter", "same")
    architecture = config.architecture
    in_gguf = first.with_rows(config, interleaved=architecture == "llama")
    write_gguf_adapter(replace(in_gguf, architecture=architecture), tmp_path / "same.gguf")
    back = read_gguf_adapter(tmp_path / "same.gguf").with_rows(config, interleaved=False)
    (tmp_path / "back").mkdir()
    write_peft_adapter(back, tmp_path / "back")
    again = read_peft_adapter(tmp_path / "back", "same")
    assert again.pairs.keys() == first.pairs.keys()
    for name, pair in first.pairs.items():
        other = again.pairs[name]
        assert pair.scale == other.scale
        for one, two in ((pair.a, other.a), (pair.b, other.b)):
            assert (one.shape, one.encoding) == (two.shape, two.encoding)
            assert np.array_equal(one.data, two.data), name
    fresh = random_model(family, **switches)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "back").eval()
    assert largest_difference(oracle(loaded, ids), expected) < 1e-6
