"""Adapters merged by ``nybble convert``, and adapters converted themselves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nybble.checkpoint.adapter import Adapter, LoraPair
from nybble.checkpoint.apply_adapters import with_adapters
from nybble.checkpoint.config import ModelConfig
from nybble.checkpoint.merge_adapters import merge_adapters
from nybble.convert.convert import convert
from nybble.convert.manifest import read_manifest
from nybble.convert.verify import verify
from nybble.devices import reference
from nybble.devices.base import BatchItem
from nybble.errors import ConversionError, UnsupportedError
from nybble.formats.adapter import read_adapter
from nybble.formats.gguf.adapter import write_gguf_adapter
from nybble.formats.huggingface.adapter import CONFIG, write_peft_adapter
from nybble.formats.output import OutputError
from nybble.loading import read_checkpoint
from support.adapters import random_adapter
from support.conversions import WIDE, logits, model_file
from support.random_checkpoints import FAMILIES, largest_difference, relative_error, tokens

ALL = ("proj.weight", "lm_head.weight", "embed_tokens.weight")


def peft_folder(path: Path, adapter: Adapter) -> Path:
    path.mkdir()
    write_peft_adapter(adapter, path)
    return path


def merged_logits(model: Path, adapter: Path | Adapter, weight: float = 1.0) -> np.ndarray:
    """Of the adapter applied at run time."""
    read = adapter if isinstance(adapter, Adapter) else read_adapter(adapter)
    session = reference.compile_session(with_adapters(read_checkpoint(model), [read]))
    return session.forward([BatchItem(session.new_sequence((weight,)), tokens(12), "all")])


def same_matrices(one: Adapter, other: Adapter) -> bool:
    return one.pairs.keys() == other.pairs.keys() and all(
        a.encoding == b.encoding and a.shape == b.shape and np.array_equal(a.data, b.data)
        for name in one.pairs
        for a, b in (
            (one.pairs[name].a, other.pairs[name].a),
            (one.pairs[name].b, other.pairs[name].b),
        )
    )


# -- merging -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["gguf", "safetensors", "onnx"])
def test_merged_into_plain_weights(to: str, tmp_path: Path) -> None:
    source = model_file(tmp_path / "model.gguf", weights="f32", embeddings="f32")
    folder = peft_folder(tmp_path / "a", random_adapter(WIDE, only=ALL))
    output = tmp_path / ("out.gguf" if to == "gguf" else "out")
    report = convert(source, output, to=to, adapters={str(folder): 0.5})
    assert report.relation == "exact"
    how = {tensor.name: tensor.how for tensor in report.tensors}
    assert how["model.layers.0.self_attn.o_proj.weight"].startswith("adapters merged")
    assert "merged" not in how["model.norm.weight"]
    assert largest_difference(logits(output), merged_logits(source, folder, 0.5)) < 1e-4
    assert largest_difference(logits(output), logits(source)) > 0.02
    assert verify(output).ok
    manifest = read_manifest(output / "nybble.json" if output.is_dir() else tmp_path / "out.gguf.nybble.json")
    assert manifest.recipe["adapters"] == {"a": 0.5}
    assert [item.name for item in manifest.inputs] == [
        "model.gguf", "a/adapter_config.json", "a/adapter_model.safetensors",
    ]  # fmt: skip
    again = tmp_path / ("again.gguf" if to == "gguf" else "again")
    convert(source, again, to=to, adapters=[(folder, 0.5)])
    if to == "gguf":
        assert again.read_bytes() == output.read_bytes()


def test_quantized_weights_need_a_word(tmp_path: Path) -> None:
    source = model_file(tmp_path / "model.gguf", weights="q4_0", embeddings="q8_0")
    folder = peft_folder(tmp_path / "a", random_adapter(WIDE))
    expected = merged_logits(source, folder)
    with pytest.raises(ConversionError, match=r"quantized weights \(q4_0\).* in 14 tensors: model.layers.0"):
        convert(source, tmp_path / "x.gguf", to="gguf", adapters=[folder])
    assert not (tmp_path / "x.gguf").exists()
    exact = convert(source, tmp_path / "f32.gguf", to="gguf", adapters=[folder], encoding="f32")
    assert exact.relation == "exact"
    assert largest_difference(logits(tmp_path / "f32.gguf"), expected) < 1e-4
    report = convert(source, tmp_path / "q4.gguf", to="gguf", adapters=[folder], allow_lossy=True)
    merged = [tensor for tensor in report.tensors if tensor.name.endswith("proj.weight")]
    assert {(t.source, t.target, t.relation) for t in merged} == {("q4_0", "q4_0", "lossy")}
    assert all(0.01 < tensor.relative_error < 0.2 for tensor in merged)
    assert relative_error(logits(tmp_path / "q4.gguf"), expected) < 0.4
    report = convert(source, tmp_path / "q8.gguf", to="gguf", adapters=[folder], encodings={"*proj*": "q8_0"})
    assert {t.target for t in report.tensors if t.name.endswith("proj.weight")} == {"q8_0"}
    assert report.relation == "lossy"
    assert relative_error(logits(tmp_path / "q8.gguf"), expected) < 0.05


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_plain_weights_keep_their_type_and_the_report_tells_what_is_rounded(
    kind: str, tmp_path: Path
) -> None:
    source = model_file(tmp_path / "model.gguf", weights=kind)
    folder = peft_folder(tmp_path / "a", random_adapter(WIDE, only=("q_proj.weight",)))
    for to, name in (("gguf", "x.gguf"), ("safetensors", "x")):
        report = convert(source, tmp_path / name, to=to, adapters=[folder])
        rows = {tensor.name: tensor for tensor in report.tensors}
        changed = rows["model.layers.1.self_attn.q_proj.weight"]
        assert (changed.source, changed.target, changed.relation) == (kind, kind, "lossy")
        assert 0 < changed.relative_error < 0.003 and changed.how.startswith("adapters merged")
        assert rows["model.layers.1.self_attn.k_proj.weight"].relation == "exact"
        assert largest_difference(logits(tmp_path / name), merged_logits(source, folder)) < 0.03
        session = reference.compile_session(
            merge_adapters(read_checkpoint(source), {read_adapter(folder): 1.0})
        )
        ours = session.forward([BatchItem(session.new_sequence(), tokens(12), "all")])
        assert largest_difference(logits(tmp_path / name), ours) < 1e-5


def test_a_restored_gguf_has_no_old_blocks(tmp_path: Path) -> None:
    """The record of a safetensors folder's GGUF blocks is not used for what an adapter changes."""
    source = model_file(tmp_path / "model.gguf", weights="q4_0")
    convert(source, tmp_path / "folder", to="safetensors", encoding="f32")
    convert(source, tmp_path / "kept", to="safetensors")
    adapter = random_adapter(WIDE, only=("q_proj.weight",))
    folder = peft_folder(tmp_path / "a", adapter)
    expected = merged_logits(source, folder)
    for place in ("folder", "kept"):
        output = tmp_path / f"{place}.gguf"
        options = {} if place == "folder" else {"encodings": {"*q_proj*": "f32"}}
        convert(tmp_path / place, output, to="gguf", adapters=[folder], **options)
        assert largest_difference(logits(output), expected) < 1e-4


def test_a_weight_of_0_changes_nothing(tmp_path: Path) -> None:
    source = model_file(tmp_path / "model.gguf")
    folder = peft_folder(tmp_path / "a", random_adapter(WIDE))
    convert(source, tmp_path / "x.gguf", to="gguf", adapters={str(folder): 0})
    assert (tmp_path / "x.gguf").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("changed", ["lm_head.weight", "model.embed_tokens.weight"])
def test_tied_matrices_part(changed: str, tmp_path: Path) -> None:
    config = replace(WIDE, tie_word_embeddings=True)
    source = model_file(tmp_path / "model.gguf", config, weights="f32", embeddings="f32")
    row = random_adapter(replace(WIDE, tie_word_embeddings=False), only=(changed,))
    folder = peft_folder(tmp_path / "a", row)
    expected = merged_logits(source, folder)
    assert "llama.cpp" in convert(folder, tmp_path / "a.gguf", to="gguf", base=source).notes[0]
    assert np.array_equal(merged_logits(source, tmp_path / "a.gguf"), expected)
    for to, name in (("gguf", "x.gguf"), ("safetensors", "x")):
        convert(source, tmp_path / name, to=to, adapters=[folder])
        assert largest_difference(logits(tmp_path / name), expected) < 1e-4
        assert not read_checkpoint(tmp_path / name).config.tie_word_embeddings


def test_an_encoding_without_a_quantizer() -> None:
    from support.random_checkpoints import random_checkpoint

    base = random_checkpoint(WIDE, weights="iq1_s")
    adapter = random_adapter(WIDE)
    with pytest.raises(ConversionError, match="quantized weights"):
        merge_adapters(base, {adapter: 1.0})
    with pytest.raises(ConversionError, match="cannot quantize it to iq1_s"):
        merge_adapters(base, {adapter: 1.0}, encoding="own")


# -- adapters ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2", "qwen3", "smollm3", "gemma2", "gemma3"])
def test_there_and_back(family: str, kind: str, tmp_path: Path) -> None:
    config: ModelConfig = FAMILIES[family]
    if family == "smollm3":
        config = replace(config, num_hidden_layers=4, rope_layers=(True, True, True, False))
    source = model_file(tmp_path / "model.gguf", config, weights="f32", embeddings="f32")
    first = peft_folder(tmp_path / "a", random_adapter(config, only=ALL, kind=kind))
    report = convert(first, tmp_path / "a.gguf", to="gguf", base=source)
    assert report.relation == "exact" and verify(tmp_path / "a.gguf").ok
    permuted = {tensor.name for tensor in report.tensors if tensor.how == "rows permuted"}
    layers = range(config.num_hidden_layers)
    expected = {f"model.layers.{i}.self_attn.{n}_proj.lora_B.weight" for i in layers for n in "qk"}
    assert permuted == (expected if family in ("llama", "smollm3") else set())
    needed = {"base": source} if family in ("llama", "smollm3") else {}
    report = convert(tmp_path / "a.gguf", tmp_path / "back", to="safetensors", **needed)
    assert report.relation == "exact" and verify(tmp_path / "back").ok
    one, other, between = (read_adapter(tmp_path / name) for name in ("a", "back", "a.gguf"))
    assert same_matrices(one, other)
    assert [pair.scale for pair in one.pairs.values()] == [pair.scale for pair in other.pairs.values()]
    # All three mean the same, whichever form the model has.
    assert largest_difference(merged_logits(source, between), merged_logits(source, one)) < 1e-6
    convert(source, tmp_path / "folder", to="safetensors")
    assert largest_difference(merged_logits(tmp_path / "folder", between), merged_logits(source, one)) < 1e-4


def test_a_base_is_asked_for(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "a", random_adapter(WIDE))
    with pytest.raises(ConversionError, match=r"does not say which architecture.*--base"):
        convert(folder, tmp_path / "a.gguf", to="gguf")
    row = replace(random_adapter(WIDE), architecture="llama").with_rows(WIDE, interleaved=True)
    write_gguf_adapter(row, tmp_path / "b.gguf")
    with pytest.raises(ConversionError, match=r"q or k, whose rows have another order.*--base"):
        convert(tmp_path / "b.gguf", tmp_path / "b", to="safetensors")
    assert not (tmp_path / "a.gguf").exists() and not (tmp_path / "b").exists()
    other = model_file(tmp_path / "other.gguf", FAMILIES["llama"], weights="f32", embeddings="f32")
    with pytest.raises(UnsupportedError, match="does not fit the model"):
        convert(folder, tmp_path / "a.gguf", to="gguf", base=other)
    without = replace(random_adapter(WIDE, only=("o_proj.weight",)), architecture="llama", interleaved=True)
    write_gguf_adapter(without, tmp_path / "c.gguf")
    assert convert(tmp_path / "c.gguf", tmp_path / "c", to="safetensors").relation == "exact"


def test_several_alphas(tmp_path: Path) -> None:
    """A GGUF file has one alpha; the others go into B, exactly where they differ by a power of two."""
    source = model_file(tmp_path / "model.gguf", weights="f32", embeddings="f32")
    row = random_adapter(WIDE, rank=4, alpha=8)
    names = list(row.pairs)
    pairs = dict(row.pairs)
    pairs[names[0]] = replace(pairs[names[0]], scale=8.0)
    pairs[names[1]] = replace(pairs[names[1]], scale=0.7)
    folder = peft_folder(tmp_path / "a", replace(row, pairs=pairs))
    assert json.loads((folder / CONFIG).read_text())["alpha_pattern"] == {
        names[0].removesuffix(".weight"): 32,
        names[1].removesuffix(".weight"): pytest.approx(2.8),
    }
    with pytest.raises(ConversionError, match="3 different alphas"):
        convert(folder, tmp_path / "a.gguf", to="gguf", base=source)
    report = convert(folder, tmp_path / "a.gguf", to="gguf", base=source, allow_lossy=True)
    how = {tensor.name: (tensor.relation, tensor.how) for tensor in report.tensors}
    assert "multiplied by 4" in how[f"{names[0].removesuffix('.weight')}.lora_B.weight"][1]
    assert how[f"{names[0].removesuffix('.weight')}.lora_B.weight"][0] == "exact"
    assert how[f"{names[1].removesuffix('.weight')}.lora_B.weight"][0] == "lossy"
    assert report.relation == "lossy"
    got, expected = merged_logits(source, tmp_path / "a.gguf"), merged_logits(source, folder)
    assert largest_difference(got, expected) < 1e-5


def test_encodings(tmp_path: Path) -> None:
    source = model_file(tmp_path / "model.gguf", weights="f32", embeddings="f32")
    folder = peft_folder(tmp_path / "a", random_adapter(WIDE, rank=32))
    report = convert(folder, tmp_path / "a.gguf", to="gguf", base=source, encoding="q8_0")
    assert report.relation == "lossy" and {tensor.target for tensor in report.tensors} == {"q8_0"}
    assert all(0 < tensor.relative_error < 0.02 for tensor in report.tensors)
    got, expected = merged_logits(source, tmp_path / "a.gguf"), merged_logits(source, folder)
    assert relative_error(got, expected) < 0.02
    with pytest.raises(ConversionError, match="q8_0, which PEFT folders cannot hold"):
        convert(tmp_path / "a.gguf", tmp_path / "b", to="safetensors", base=source)
    report = convert(tmp_path / "a.gguf", tmp_path / "b", to="safetensors", base=source, encoding="f32")
    assert report.relation == "exact"
    odd = peft_folder(tmp_path / "odd", random_adapter(WIDE, rank=5))
    with pytest.raises(ConversionError, match="rows of 5 elements do not fit q8_0"):
        convert(odd, tmp_path / "odd.gguf", to="gguf", base=source, encoding="q8_0")


def test_refusals(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "a", random_adapter(WIDE))
    source = model_file(tmp_path / "model.gguf")
    with pytest.raises(UnsupportedError, match="gguf or safetensors, not as onnx"):
        convert(folder, tmp_path / "x", to="onnx", base=source)
    for option in ({"encodings": {"*": "f16"}}, {"split_bytes": 1000}, {"adapters": [folder]}):
        with pytest.raises(UnsupportedError, match="alone are for adapters"):
            convert(folder, tmp_path / "x.gguf", to="gguf", base=source, **option)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "notes.txt").write_text("mine")
    write_gguf_adapter(
        replace(random_adapter(WIDE, only=("o_proj.weight",)), architecture="llama"), tmp_path / "c.gguf"
    )
    with pytest.raises(OutputError, match="is not replaced"):
        convert(tmp_path / "c.gguf", tmp_path / "own", to="safetensors", overwrite=True)
    with pytest.raises(OutputError, match="exists"):
        convert(folder, tmp_path / "model.gguf", to="gguf", base=source)
    with pytest.raises(OutputError, match="is the model that would be read"):
        convert(tmp_path / "c.gguf", tmp_path / "c.gguf", to="gguf", overwrite=True)
    zero = Adapter("zero", {n: LoraPair(p.a, p.b, 0.0) for n, p in random_adapter(WIDE).pairs.items()})
    with pytest.raises(ConversionError, match="alpha 0"):
        convert(peft_folder(tmp_path / "zero", zero), tmp_path / "z.gguf", to="gguf", base=source)


def test_products_do_not_depend_on_the_order_of_sums() -> None:
    """Every partial sum is exact, so that any order of the ranks gives the same bits."""
    from nybble.checkpoint.merge_adapters import _Product

    random = np.random.default_rng(0)
    for rank in (1, 3, 16, 17, 300):
        left = random.standard_normal((40, rank)).astype(np.float32) * np.float64(1.7)
        left *= 10.0 ** random.integers(-6, 6, (40, 1))
        right = random.standard_normal((rank, 50)).astype(np.float32).astype(np.float64)
        right[0] *= 1e-9
        right[:, 3] = 0
        results = []
        for _ in range(4):
            order = random.permutation(rank)
            total = np.zeros((30, 50))
            _Product(left[:, order], right[order]).add_to(total, 10)
            results.append(total)
        assert all(np.array_equal(results[0], other) for other in results)
        size = np.abs(left[10:]) @ np.abs(right)
        assert (np.abs(results[0] - left[10:] @ right) <= 1e-10 * size + 1e-300).all()
        assert not results[0][:, 3].any()
