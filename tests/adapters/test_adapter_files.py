"""PEFT folders and GGUF adapters: what is read, what is written, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np
import pytest

from nybble.checkpoint.adapter import Adapter
from nybble.errors import FormatError, NotFoundError, NybbleError, UnsupportedError
from nybble.formats.adapter import is_adapter, read_adapter
from nybble.formats.gguf.adapter import read_gguf_adapter, write_gguf_adapter
from nybble.formats.gguf.writer import write_file
from nybble.formats.huggingface.adapter import CONFIG, WEIGHTS, read_peft_adapter, write_peft_adapter
from nybble.formats.huggingface.adapter_patterns import Patterns
from nybble.formats.safetensors.writer import write_safetensors
from nybble.loading import read_checkpoint
from support.adapters import matrix, random_adapter
from support.conversions import model_file
from support.random_checkpoints import LLAMA

MODULE = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A PEFT folder of one pair of rank 4."""
    path = tmp_path / "pirate"
    path.mkdir()
    write_peft_adapter(random_adapter(LLAMA, only=("layers.0.self_attn.q_proj.weight",)), path)
    return path


def set_config(folder: Path, **changes: object) -> None:
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**values, **changes}))


def set_tensors(folder: Path, shapes: dict[str, tuple[int, int]]) -> None:
    random = np.random.default_rng(0)
    write_safetensors(
        {name: matrix(random, name, s, "f32", 1.0) for name, s in shapes.items()}, folder / WEIGHTS
    )


def scale(adapter: Adapter) -> float:
    (pair,) = adapter.pairs.values()
    return pair.scale


def test_names(folder: Path, tmp_path: Path) -> None:
    assert read_adapter(folder).name == "pirate"
    assert read_adapter(folder, "other").name == "other"
    assert read_adapter(folder / CONFIG).name == read_adapter(folder / WEIGHTS).name == "pirate"
    write_gguf_adapter(
        replace(random_adapter(LLAMA), architecture="llama", interleaved=True), tmp_path / "x.gguf"
    )
    found = read_adapter(tmp_path / "x.gguf")
    assert (found.name, found.architecture, found.interleaved) == ("x", "llama", True)
    assert found.parameters == sum(p.rank * (p.a.shape[1] + p.b.shape[0]) for p in found.pairs.values())


def test_what_is_an_adapter(folder: Path, tmp_path: Path) -> None:
    model = model_file(tmp_path / "model.gguf")
    write_gguf_adapter(
        replace(random_adapter(LLAMA), architecture="llama", interleaved=True), tmp_path / "x.gguf"
    )
    assert is_adapter(folder) and is_adapter(tmp_path / "x.gguf")
    assert not is_adapter(model) and not is_adapter(tmp_path) and not is_adapter(tmp_path / "nothing")
    for path in (model, tmp_path):
        with pytest.raises(NybbleError, match=r"no adapter|no LoRA adapter"):
            read_adapter(path)
    with pytest.raises(NotFoundError, match="no such file or folder"):
        read_adapter(tmp_path / "nothing")
    for path in (folder, tmp_path / "x.gguf"):
        with pytest.raises(UnsupportedError, match="is a LoRA adapter and no model"):
            read_checkpoint(path)


# -- PEFT ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 2.0),
        ({"lora_alpha": 1}, 0.25),
        ({"use_rslora": True}, 4.0),
        ({"alpha_pattern": {"q_proj": 2}}, 0.5),
        ({"alpha_pattern": {"proj": 2}}, 2.0),
        ({"alpha_pattern": {"k_proj": 2, "layers.0.self_attn.q_proj": 6}}, 1.5),
        ({"alpha_pattern": {r"layers\.[01]\..*_proj": 6, "q_proj": 2}}, 1.5),
        ({"alpha_pattern": {"q_proj": 2, r"layers\.[01]\..*_proj": 6}}, 0.5),
        ({"alpha_pattern": {r"model\.layers\.(0|1)\.(self_attn|mlp)\.(?:q|k)_proj": 12}}, 3.0),
        ({"alpha_pattern": None, "modules_to_save": [], "use_dora": False, "layer_replication": None}, 2.0),
    ],
    ids=str,
)
def test_scales(folder: Path, changes: dict[str, object], expected: float) -> None:
    set_config(folder, **changes)
    assert scale(read_peft_adapter(folder)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"use_dora": True}, "use_dora: DoRA"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"lora_bias": True}, "a bias of B"),
        ({"modules_to_save": ["lm_head"]}, "modules that are saved whole"),
        ({"fan_in_fan_out": True}, "transposed"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed base weights"),
        ({"trainable_token_indices": [1]}, "single trained tokens"),
        ({"alora_invocation_tokens": [1]}, "aLoRA"),
        ({"target_parameters": ["experts.down"]}, "no linear layers"),
    ],
    ids=str,
)
def test_more_than_lora_is_refused(folder: Path, changes: dict[str, object], message: str) -> None:
    set_config(folder, **changes)
    with pytest.raises(UnsupportedError, match=message):
        read_peft_adapter(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_alpha": "x"},
        {"lora_alpha": 1e300},
        {"lora_alpha": [1]},
        {"use_rslora": "yes"},
        {"alpha_pattern": ["q_proj"]},
        {"alpha_pattern": {"q_proj": "1"}},
        {"alpha_pattern": {"q_proj": True}},
        {"peft_type": 3},
        {"bias": 3},
    ],
    ids=str,
)
def test_bad_values(folder: Path, changes: dict[str, object]) -> None:
    set_config(folder, **changes)
    with pytest.raises(FormatError, match=r"adapter_config\.json"):
        read_peft_adapter(folder)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "no LoRA matrices"),
        ({f"{MODULE}.lora_A.weight": (4, 64)}, "has matrix A alone"),
        ({f"{MODULE}.lora_B.weight": (64, 4)}, "has matrix B alone"),
        ({f"{MODULE}.lora_A.weight": (4, 64), f"{MODULE}.lora_B.weight": (64, 5)}, "rank 4 and B 5"),
        ({f"{MODULE}.lora_A.weight": (4, 64), f"{MODULE}.lora_A.default.weight": (4, 64)}, "twice"),
        ({f"{MODULE}.weight": (64, 64)}, "is no matrix of LoRA"),
        ({f"{MODULE}.lora_magnitude_vector": (64, 1)}, "is no matrix of LoRA"),
        ({f"{MODULE}.lora_embedding_A": (4, 64)}, "not supported for this kind"),
        ({"base_model.model.model.embed_tokens.lora_A.weight": (4, 64)}, "not supported for this kind"),
        ({"x" * 300 + ".lora_A.weight": (4, 64)}, "is no matrix of LoRA"),
    ],
    ids=str,
)
def test_bad_tensors(folder: Path, tensors: dict[str, tuple[int, int]], message: str) -> None:
    set_tensors(folder, tensors)
    with pytest.raises((FormatError, UnsupportedError), match=message):
        read_peft_adapter(folder)


def test_other_prefixes(folder: Path) -> None:
    """Adapters of models of text and images, of old PEFT, and base matrices that PEFT saves beside."""
    end = "layers.0.self_attn.q_proj"
    for begin in (
        "base_model.model.model.language_model.",
        "base_model.model.language_model.model.",
        "model.",
    ):
        for letter in (".weight", ".default.weight"):
            set_tensors(
                folder,
                {
                    f"{begin}{end}.lora_A{letter}": (4, 64),
                    f"{begin}{end}.lora_B{letter}": (64, 4),
                    "base_model.model.lm_head.base_layer.weight": (101, 64),
                },
            )
            assert list(read_peft_adapter(folder).pairs) == [f"model.{end}.weight"]


def test_missing_and_damaged_files(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(UnsupportedError, match="pickle"):
        read_peft_adapter(folder)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(NotFoundError, match=r"adapter_model\.safetensors: no such file"):
        read_peft_adapter(folder)
    (folder / WEIGHTS).write_bytes(b"nothing of value")
    with pytest.raises(FormatError):
        read_peft_adapter(folder)
    (folder / CONFIG).write_text("[]")
    with pytest.raises(FormatError, match="must hold an object"):
        read_peft_adapter(folder)


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "(a|a)*b",
        "(a|b){9}",
        "(x)(x)(x)(x)",
        ".*.*.*.*",
        "(?=a)",
        r"(a)\1",
        "(",
        "[",
        "a+" + "b" * 500,
    ],
)
def test_expensive_patterns_are_refused(pattern: str) -> None:
    with pytest.raises(UnsupportedError, match=r"x: the pattern .* is too complicated"):
        Patterns([pattern], "x")


def test_patterns_take_little_time() -> None:
    begin = perf_counter()
    worst = Patterns([r"\w*\w*\w*!", "(a|aa|aaa)(a|aa|aaa)(a|aa|aaa)!"] * 50, "x")
    plain = Patterns([f"layers.{i}.q_proj" for i in range(20000)], "x")
    for _ in range(3):
        assert worst.first("a" * 200) is None
        assert plain.first("model.layers.19999.q_proj") == "layers.19999.q_proj"
    assert perf_counter() - begin < 60
    with pytest.raises(UnsupportedError, match="more than 100 regular expressions"):
        Patterns([f"q_proj{i}?" for i in range(101)], "x")


# -- GGUF ------------------------------------------------------------------------------------------------

KEYS = {
    "general.architecture": "qwen2", "general.type": "adapter", "adapter.type": "lora",
    "adapter.lora.alpha": np.float32(8),
}  # fmt: skip


def gguf(
    path: Path, keys: dict[str, object] | None = None, tensors: dict[str, tuple[int, int]] | None = None
) -> Path:
    random = np.random.default_rng(0)
    name = "blk.0.attn_q.weight"
    shapes = {f"{name}.lora_a": (4, 64), f"{name}.lora_b": (64, 4)} if tensors is None else tensors
    values = {key: value for key, value in {**KEYS, **(keys or {})}.items() if value is not None}
    write_file(path, values, [matrix(random, n, s, "f32", 1.0) for n, s in shapes.items()])
    return path


@pytest.mark.parametrize(
    ("alpha", "expected"), [(np.float32(8), 2.0), (np.float32(0), 1.0), (None, 1.0), (np.float32(1), 0.25)]
)
def test_alpha_of_gguf(alpha: object, expected: float, tmp_path: Path) -> None:
    assert scale(read_gguf_adapter(gguf(tmp_path / "x.gguf", {"adapter.lora.alpha": alpha}))) == expected


@pytest.mark.parametrize(
    ("keys", "tensors", "message"),
    [
        ({"general.type": "model"}, None, "is a model and no adapter"),
        ({"general.type": None}, None, "is a model and no adapter"),
        ({"adapter.type": "control_vector"}, None, "adapter.type is 'control_vector'"),
        ({"adapter.type": None}, None, "adapter.type is missing"),
        ({"adapter.alora.invocation_tokens": np.array([1], np.uint32)}, None, "adapter.type is 'alora'"),
        ({"general.architecture": "mamba"}, None, "architecture 'mamba'"),
        ({"general.architecture": 7}, None, "general.architecture must be text"),
        ({"adapter.lora.alpha": np.float32("nan")}, None, "adapter.lora.alpha"),
        ({"adapter.lora.alpha": "8"}, None, "adapter.lora.alpha must be a number"),
        ({}, {}, "no LoRA matrices"),
        ({}, {"blk.0.attn_q.weight.lora_a": (4, 64)}, "has matrix A alone"),
        ({}, {"blk.0.attn_norm.weight": (1, 64)}, "is no matrix of LoRA"),
        ({}, {"blk.0.attn_q.bias.lora_a": (1, 64)}, "is no matrix of LoRA"),
        ({}, {"rope_freqs.weight.lora_a": (1, 64)}, "is no matrix of LoRA"),
        ({}, {"blk.0.other.weight.lora_a": (1, 64)}, "does not belong"),
        (
            {},
            {"blk.0.attn_q.weight.lora_a": (4, 64), "blk.0.attn_q.weight.lora_b": (64, 3)},
            "rank 4 and B 3",
        ),
    ],
    ids=str,
)
def test_bad_gguf(
    keys: dict[str, object], tensors: dict[str, tuple[int, int]] | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises((FormatError, UnsupportedError), match=message):
        read_gguf_adapter(gguf(tmp_path / "x.gguf", keys, tensors))


def test_writers_want_their_form(tmp_path: Path) -> None:
    row = random_adapter(LLAMA)
    with pytest.raises(ValueError, match="no architecture"):
        write_gguf_adapter(row, tmp_path / "x.gguf")
    with pytest.raises(ValueError, match="rows as transformers"):
        write_gguf_adapter(replace(row, architecture="llama"), tmp_path / "x.gguf")
    with pytest.raises(ValueError, match="rows as GGUF"):
        write_peft_adapter(row.with_rows(LLAMA, interleaved=True), tmp_path)
    with pytest.raises(ValueError, match="no dtype for q8_0"):
        write_peft_adapter(random_adapter(LLAMA, rank=32, kind="q8_0"), tmp_path)


def test_truncated_files_give_our_errors(folder: Path, tmp_path: Path) -> None:
    data = gguf(tmp_path / "x.gguf").read_bytes()
    for end in range(0, len(data) - 1, 97):
        (tmp_path / "cut.gguf").write_bytes(data[:end])
        with pytest.raises(NybbleError):
            read_adapter(tmp_path / "cut.gguf")
    data = (folder / WEIGHTS).read_bytes()
    for end in range(0, len(data) - 1, 97):
        (folder / WEIGHTS).write_bytes(data[:end])
        with pytest.raises(NybbleError):
            read_adapter(folder)


def test_random_damage_gives_our_errors(folder: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    whole = gguf(tmp_path / "x.gguf").read_bytes()
    files = [(tmp_path / "x.gguf", whole, whole.index(b"blk.0") + 200)]
    files += [(folder / name, (folder / name).read_bytes(), 700) for name in (CONFIG, WEIGHTS)]
    refused = 0
    for path, data, end in files:
        for _ in range(700):
            damaged = bytearray(data)
            for place in random.integers(0, min(end, len(data)), random.integers(1, 4)):
                damaged[place] = random.choice(
                    [0, 1, 0x22, 0x2C, 0x30, 0x39, 0x7D, 0xFF, random.integers(256)]
                )
            path.write_bytes(damaged)
            try:
                adapter = read_adapter(path)
            except NybbleError:
                refused += 1
            else:
                assert all(pair.a.data.size and pair.b.data.size for pair in adapter.pairs.values())
        path.write_bytes(data)
        read_adapter(path)
    assert refused > 500
