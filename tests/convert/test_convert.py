"""Conversions of small models: same logits, same bytes on the way back, and nothing lost unasked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import nybble
from nybble.convert.convert import convert
from nybble.convert.report import Report
from nybble.convert.verify import verify
from nybble.errors import ConversionError, NybbleError, UnsupportedError
from nybble.formats.output import OutputError
from nybble.loading import read_checkpoint
from support.conversions import WIDE, logits, model_file
from support.random_checkpoints import FAMILIES, largest_difference

GGUF_FAMILIES = sorted(set(FAMILIES) - {"llama-gguf", "llama-scales", "llama-biases"})


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return model_file(tmp_path / "model.gguf")


def test_what_llama_cpp_does_otherwise_is_noted(tmp_path: Path) -> None:
    source = model_file(tmp_path / "model.gguf", FAMILIES["mistral-window"])
    [note] = convert(source, tmp_path / "copy.gguf", to="gguf").notes
    assert note.startswith("llama.cpp ignores the sliding window of 7")


# -- there and back ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weights", ["q4_0", "q4_1", "q5_0", "q8_0", "q4_k", "q5_k", "q6_k", "q2_k", "q3_k", "f16"]
)
def test_gguf_comes_back_from_safetensors_as_the_same_file(weights: str, tmp_path: Path) -> None:
    source = model_file(tmp_path / "model.gguf", weights=weights)
    there = convert(source, tmp_path / "folder", to="safetensors")
    assert there.relation == "exact"
    back = convert(tmp_path / "folder", tmp_path / "back.gguf", to="gguf")
    assert back.relation == "exact"
    assert (tmp_path / "back.gguf").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("family", GGUF_FAMILIES)
def test_every_family_computes_the_same_and_comes_back(family: str, tmp_path: Path) -> None:
    config = FAMILIES[family]
    if family == "smollm3":
        config = replace(config, num_hidden_layers=4, rope_layers=(True, True, True, False))
    source = model_file(tmp_path / "model.gguf", config, weights="f32", embeddings="f16")
    expected = logits(source)
    report = convert(source, tmp_path / "folder", to="safetensors")
    assert report.relation == "exact"
    assert largest_difference(logits(tmp_path / "folder"), expected) < 1e-5
    convert(tmp_path / "folder", tmp_path / "back.gguf", to="gguf")
    assert (tmp_path / "back.gguf").read_bytes() == source.read_bytes()


@pytest.mark.parametrize(
    ("weights", "there"),
    [
        ("q4_0", "int4_g32_f32"),
        ("q8_0", "int8_g32_f32"),
        ("q4_1", "int4_g32_f32_m"),
        ("q5_1", "int8_g32_f32_m"),
        ("q4_k", "int4_g32_f32_m"),
        ("q5_k", "int8_g32_f32_m"),
    ],
)
@pytest.mark.parametrize("to", ["onnx", "onnx-portable"])
def test_gguf_comes_back_from_onnx(weights: str, there: str, to: str, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    config = WIDE if weights.endswith("_k") else FAMILIES["llama"]
    source = model_file(tmp_path / "model.gguf", config, weights=weights)
    report = convert(source, tmp_path / "onnx", to=to)
    assert report.relation == "exact"
    assert {t.target for t in report.tensors if ".q_proj." in t.name} == {there}
    assert largest_difference(logits(tmp_path / "onnx"), logits(source)) < 1e-5
    convert(tmp_path / "onnx", tmp_path / "back.gguf", to="gguf")
    one, other = read_checkpoint(source), read_checkpoint(tmp_path / "back.gguf")
    for name, tensor in one.tensors.items():
        assert other.tensors[name].encoding == tensor.encoding, name
        if weights.endswith("_k"):  # random sub-scales have several forms; a quantizer's have one
            assert np.array_equal(other.tensors[name].dequantize(), tensor.dequantize()), name
        else:
            assert np.array_equal(other.tensors[name].data, tensor.data), name


def test_gguf_through_an_affine_folder(source: Path, tmp_path: Path) -> None:
    """q4_0 is int4 in groups of 32: a quantized Hugging Face folder holds it as it is."""
    report = convert(source, tmp_path / "folder", to="safetensors", quantization="compressed-tensors")
    assert report.relation == "exact"
    assert {t.target for t in report.tensors if ".mlp." in t.name} == {"int4_g32_f16"}
    content = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert content["quantization_config"]["quant_method"] == "compressed-tensors"
    assert largest_difference(logits(tmp_path / "folder"), logits(source)) < 1e-5
    convert(tmp_path / "folder", tmp_path / "back.gguf", to="gguf")
    assert (tmp_path / "back.gguf").read_bytes() == source.read_bytes()


def test_blocks_come_back_also_where_an_encoding_is_named(tmp_path: Path) -> None:
    source = model_file(tmp_path / "model.gguf", weights="q6_k")
    convert(source, tmp_path / "folder", to="safetensors")
    for named in ({"lm_head.weight": "f16"}, {"*_proj.weight": "q6_k"}):
        report = convert(tmp_path / "folder", tmp_path / "x.gguf", to="gguf", overwrite=True, encodings=named)
        kinds = {tensor.target for tensor in report.tensors if "_proj" in tensor.name}
        assert kinds == {"q6_k"}
        other = read_checkpoint(tmp_path / "x.gguf")
        for name, tensor in read_checkpoint(source).tensors.items():
            if "_proj" in name:
                assert np.array_equal(other.tensors[name].data, tensor.data), name


def test_huggingface_keys_come_back_from_gguf(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "one", to="safetensors", encoding="f16", allow_lossy=True)
    path = tmp_path / "one" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "initializer_range": 0.25, "my_key": "x"}))
    convert(tmp_path / "one", tmp_path / "two.gguf", to="gguf")
    convert(tmp_path / "two.gguf", tmp_path / "three", to="safetensors")
    content = json.loads((tmp_path / "three" / "config.json").read_text())
    assert (content["initializer_range"], content["my_key"]) == (0.25, "x")


def test_changed_weights_are_not_taken_for_the_old_ones(tmp_path: Path) -> None:
    source = model_file(tmp_path / "model.gguf", weights="q6_k")
    convert(source, tmp_path / "folder", to="safetensors")
    weights = tmp_path / "folder" / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-4:] = np.float32(0.123).tobytes()
    weights.write_bytes(changed)
    before = read_checkpoint(tmp_path / "folder")
    report = convert(tmp_path / "folder", tmp_path / "back.gguf", to="gguf")
    assert report.relation == "exact"
    kinds = {tensor.target for tensor in report.tensors}
    assert "q6_k" in kinds and "f32" in kinds
    assert largest_difference(logits(tmp_path / "back.gguf"), logits(before)) < 1e-5


def test_minima_find_gguf_again_without_a_manifest(tmp_path: Path) -> None:
    """What a folder's weights are is enough: no other program's GGUF encodings are asked for."""
    pytest.importorskip("onnx")
    for weights in ("q4_1", "q4_k", "q5_k"):
        source = model_file(tmp_path / f"{weights}.gguf", WIDE, weights=weights)
        convert(source, tmp_path / weights, to="onnx")
        (tmp_path / weights / "nybble.json").unlink()
        report = convert(tmp_path / weights, tmp_path / f"{weights}-back.gguf", to="gguf")
        assert report.relation == "exact"
        assert {t.target for t in report.tensors if ".q_proj." in t.name} == {weights}


def test_minima_have_no_place_in_quantized_folders(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    source = model_file(tmp_path / "model.gguf", weights="q4_1")
    convert(source, tmp_path / "onnx", to="onnx")
    with pytest.raises(ConversionError, match="14 of 21 tensors") as caught:
        convert(tmp_path / "onnx", tmp_path / "out", to="safetensors", quantization="compressed-tensors")
    assert "int4_g32_f32_m" in str(caught.value)
    report = convert(tmp_path / "onnx", tmp_path / "out", to="safetensors")
    assert report.relation == "exact"  # as float32
    with pytest.raises(ConversionError, match="cannot hold it as int4_g32_f16_m"):
        convert(source, tmp_path / "x", to="safetensors", encoding="int4_g32_f16_m")


# -- encodings -----------------------------------------------------------------------------------------


def targets(report: Report) -> dict[str, str]:
    return {tensor.name: tensor.target for tensor in report.tensors}


def test_an_encoding_for_all_matrices_and_patterns_before_it(source: Path, tmp_path: Path) -> None:
    report = convert(
        source,
        tmp_path / "x.gguf",
        to="gguf",
        encoding="q5_0",
        encodings={"*.layers.0.mlp.*": "q8_0", "*.mlp.up_proj.*": "f16"},
    )
    found = targets(report)
    assert found["model.layers.0.mlp.up_proj.weight"] == "q8_0"
    assert found["model.layers.1.mlp.up_proj.weight"] == "f16"
    assert found["model.layers.1.mlp.down_proj.weight"] == "q5_0"
    assert found["model.embed_tokens.weight"] == "q5_0"
    assert found["model.norm.weight"] == "f32"
    written = read_checkpoint(tmp_path / "x.gguf")
    assert {name: tensor.encoding.name for name, tensor in written.tensors.items()} == found


def test_errors_in_the_report_are_those_of_the_values(source: Path, tmp_path: Path) -> None:
    report = convert(source, tmp_path / "x.gguf", to="gguf", encoding="q5_1")
    assert report.relation == "lossy"
    one, other = read_checkpoint(source), read_checkpoint(tmp_path / "x.gguf")
    for tensor in report.tensors:
        difference = other.tensors[tensor.name].dequantize() - one.tensors[tensor.name].dequantize()
        assert tensor.max_error == pytest.approx(np.abs(difference).max(), rel=1e-5)
        assert tensor.relation == ("exact" if tensor.max_error == 0 else "lossy")
        assert tensor.bits_per_weight == 8 * tensor.nbytes / difference.size


def test_plain_numbers_are_as_small_as_is_exact(tmp_path: Path) -> None:
    half = model_file(tmp_path / "model.gguf", weights="f16", embeddings="f16")
    report = convert(half, tmp_path / "one", to="safetensors")
    assert set(targets(report).values()) == {"f16", "f32"}
    blocks = model_file(tmp_path / "blocks.gguf", weights="q4_1", embeddings="f16")
    assert (
        targets(convert(blocks, tmp_path / "two", to="safetensors"))["model.layers.0.mlp.up_proj.weight"]
        == "f32"
    )


def test_what_is_not_exact_is_listed_with_the_choices(tmp_path: Path) -> None:
    source = model_file(tmp_path / "model.gguf", weights="q4_1")
    with pytest.raises(ConversionError) as caught:
        convert(source, tmp_path / "out", to="safetensors", quantization="gptq")
    text = str(caught.value)
    assert "14 of 21 tensors" in text and "q4_1" in text and "minimum" in text
    assert "--allow-lossy" in text and "--encoding f32" in text
    assert not (tmp_path / "out").exists() and sorted(p.name for p in tmp_path.iterdir()) == ["model.gguf"]
    report = convert(source, tmp_path / "out", to="safetensors", quantization="gptq", allow_lossy=True)
    lossy = [tensor for tensor in report.tensors if tensor.relation == "lossy"]
    assert len(lossy) == 14 and all(0 < tensor.relative_error < 0.2 for tensor in lossy)


def test_an_encoding_without_a_quantizer_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="no quantizer for iq1_s"):
        convert(source, tmp_path / "x.gguf", to="gguf", encoding="iq1_s", allow_lossy=True)


def test_an_encoding_that_the_format_cannot_hold_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="safetensors cannot hold it as q8_0"):
        convert(source, tmp_path / "x", to="safetensors", encoding="q8_0")
    with pytest.raises(ConversionError, match="gguf cannot hold a vector as f16"):
        convert(source, tmp_path / "x.gguf", to="gguf", encodings={"*norm*": "f16"})
    with pytest.raises(ConversionError, match="matches 'nothing'"):
        convert(source, tmp_path / "x.gguf", to="gguf", encodings={"nothing": "f16"})
    with pytest.raises(UnsupportedError, match="unknown encoding"):
        convert(source, tmp_path / "x.gguf", to="gguf", encoding="q99")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "pickle"}, "known: gguf, safetensors, onnx"),
        ({"to": "gguf", "quantization": "awq"}, "for safetensors"),
        ({"to": "safetensors", "quantization": "best"}, "awq, gptq, compressed-tensors"),
        ({"to": "gguf", "method": "rtn"}, "for ONNX"),
        ({"to": "onnx-cpu-int4", "method": "magic"}, "known: rtn"),
        ({"to": "onnx", "split_bytes": 5}, "split"),
        ({"to": "gguf", "split_bytes": 0}, "split"),
    ],
)
def test_options_that_do_not_go_together(
    options: dict[str, object], message: str, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        convert(source, tmp_path / "out", **options)  # type: ignore[arg-type]


def test_an_awq_target_takes_no_rounding_unasked(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    for weights in ("f16", "q4_k"):
        source = model_file(tmp_path / f"{weights}.gguf", WIDE, weights=weights)
        with pytest.raises(ConversionError, match="rtn"):
            convert(source, tmp_path / "out", to="onnx-dml-int4")
        report = convert(source, tmp_path / weights, to="onnx-dml-int4", method="rtn")
        assert {t.target[:4] for t in report.tensors if t.name.endswith("_proj.weight")} == {"int4"}


def test_what_a_format_cannot_say_is_an_error_that_names_it(tmp_path: Path) -> None:
    source = model_file(
        tmp_path / "model.gguf", replace(FAMILIES["llama-scales"], hidden_act="silu"), weights="f16"
    )
    with pytest.raises(ConversionError, match=r"safetensors cannot hold this model: .*logit_scale"):
        convert(source, tmp_path / "folder", to="safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


# -- outputs -------------------------------------------------------------------------------------------


def test_the_same_input_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        convert(source, tmp_path / name, to="safetensors")
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert "nybble.json" in files
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    text = (tmp_path / "one" / "nybble.json").read_text()
    assert str(tmp_path) not in text


def test_a_split_model_is_a_folder(source: Path, tmp_path: Path) -> None:
    report = convert(source, tmp_path / "parts", to="gguf", split_bytes=500_000)
    names = sorted(path.name for path in (tmp_path / "parts").iterdir())
    assert len(names) > 2 and names[0].startswith("model-00001-of-") and names[-1] == "nybble.json"
    assert [path.name for path in report.files] == names
    assert verify(tmp_path / "parts").ok
    first = tmp_path / "parts" / names[0]
    assert np.array_equal(logits(first), logits(source))
    convert(first, tmp_path / "whole.gguf", to="gguf")
    assert np.array_equal(logits(tmp_path / "whole.gguf"), logits(source))


def test_an_output_is_not_overwritten_unasked(source: Path, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists"):
        convert(source, tmp_path / "x.gguf", to="gguf")
    assert (tmp_path / "x.gguf").read_bytes() == b"mine"
    convert(source, tmp_path / "x.gguf", to="gguf", overwrite=True)
    assert verify(tmp_path / "x.gguf").ok


def test_the_source_is_never_written_over(source: Path, tmp_path: Path) -> None:
    before = source.read_bytes()
    with pytest.raises(OutputError, match="would be read"):
        convert(source, source, to="gguf", overwrite=True)
    with pytest.raises(OutputError, match="would be read"):
        convert(source, tmp_path, to="safetensors", overwrite=True)
    assert source.read_bytes() == before


def test_only_outputs_of_nybble_are_replaced(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    convert(source, folder, to="safetensors", overwrite=True)  # it was empty
    convert(source, folder, to="safetensors", overwrite=True)
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match=r"has thesis\.txt"):
        convert(source, folder, to="safetensors", overwrite=True)
    (folder / "nybble.json").unlink()
    with pytest.raises(OutputError, match="no manifest"):
        convert(source, folder, to="safetensors", overwrite=True)
    with pytest.raises(OutputError, match="is a folder"):
        convert(source, folder, to="gguf", overwrite=True)
    assert (folder / "thesis.txt").read_text() == "years of work"
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        convert(source, tmp_path / "file", to="safetensors", overwrite=True)


def test_a_full_disk_is_noticed_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OutputError, match="free"):
        convert(source, tmp_path / "x.gguf", to="gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_a_disk_that_fills_up_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nybble.formats.gguf import write_checkpoint

    real = write_checkpoint.write_file

    def full(path: Path, *arguments: object, **options: object) -> None:
        real(path, *arguments, **options)  # type: ignore[arg-type]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write_checkpoint, "write_file", full)
    with pytest.raises(OutputError, match="No space left"):
        convert(source, tmp_path / "x.gguf", to="gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_progress_ends_with_everything_done(source: Path, tmp_path: Path) -> None:
    seen = []
    convert(source, tmp_path / "x.gguf", to="gguf", encoding="f32", progress=seen.append)
    ends = [transfer for transfer in seen if transfer.finished]
    assert [transfer.action for transfer in ends] == ["checking", "converting", "checking"]
    assert all(transfer.done == transfer.total for transfer in ends)


def test_the_function_is_in_the_package(source: Path, tmp_path: Path) -> None:
    report = nybble.convert(source, tmp_path / "x.gguf", to="gguf")
    assert report.to_json()["relation"] == "exact"
    json.dumps(report.to_json(), allow_nan=False)
    assert report.parameters == sum(tensor.parameters for tensor in report.tensors)
    assert "nybble.convert" in repr(nybble.convert)
    with pytest.raises(NybbleError):
        nybble.convert(tmp_path / "nowhere.gguf", tmp_path / "y.gguf", to="gguf")


def test_groups_of_the_report(tmp_path: Path) -> None:
    source = model_file(tmp_path / "model.gguf", WIDE, weights="q4_1")
    report = convert(source, tmp_path / "x.gguf", to="gguf", encoding="q8_0")
    groups = report.groups()
    assert sum(group.tensors for group in groups) == len(report.tensors)
    assert [len(row) for row in report.rows()] == [len(report.HEADER)] * len(groups)
    assert len(list(report.tensor_rows())) == len(report.tensors)
