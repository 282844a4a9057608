"""nybble.quantize on small models: every method into every format, what the report says, and what is refused.

Going on after a kill is in test_quantize_resume.py.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import nybble
from nybble.checkpoint.encodings import encoding
from nybble.checkpoint.encodings.affine import AffineFormat, affine_format
from nybble.convert.convert import convert
from nybble.convert.errors import ValueErrors
from nybble.convert.made import MadeTensor
from nybble.convert.report import Report
from nybble.convert.verify import verify
from nybble.errors import ConversionError, NotFoundError, NybbleError, UnsupportedError
from nybble.formats.gguf.write_checkpoint import write_gguf
from nybble.formats.huggingface.writer import write_huggingface_folder
from nybble.formats.output import OutputError
from nybble.loading import read_checkpoint
from nybble.quantize import layer_quantizer
from nybble.quantize import quantize as module
from nybble.quantize.calibrate import LayerProgress, calibrate
from nybble.quantize.importance import read_importance
from nybble.quantize.matrices import round_matrix
from nybble.quantize.quantize import CalibrationOptions, quantize
from nybble.quantize.recipe import METHODS
from support.affine_models import affine_tensor, permutation_tensor
from support.quantizable_models import CONFIGS, calibration_text, divergence, logits_of, quantizable_model
from support.random_checkpoints import largest_difference

UP, DOWN, Q, V, O = (  # noqa: E741
    f"model.layers.0.{name}_proj.weight"
    for name in ("mlp.up", "mlp.down", "self_attn.q", "self_attn.v", "self_attn.o")
)
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
NORM = "model.layers.0.input_layernorm.weight"

RESULTS = {
    "gguf": ("q4_0", {"to": "gguf"}),
    "awq": ("int4-awq", {}),
    "gptq": ("int4-gptq", {}),
    "compressed-tensors": ("int4-awq-gptq", {}),
    "onnx-cpu-int4": ("onnx-cpu-int4", {}),
    "onnx-dml-int4": ("onnx-dml-int4", {}),
}
"""What is written: recipe and options."""
QUICK = {("llama", "gguf"), ("phi3", "gptq"), ("gemma3", "awq"), ("qwen2", "onnx-dml-int4")}
"""Families and what is written of them, for every day."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of every family, ``<family>.gguf``, and a text."""
    folder = tmp_path_factory.mktemp("models")
    for family, config in CONFIGS.items():
        quantizable_model(folder / f"{family}.gguf", config)
    calibration_text(folder / "text.txt")
    return folder


@pytest.fixture(scope="module")
def llama(folder: Path) -> Path:
    return folder / "llama.gguf"


@pytest.fixture
def options(folder: Path) -> CalibrationOptions:
    return CalibrationOptions(text=[folder / "text.txt"], windows=16, window=64, precision="f32")


def target_of(folder: Path, result: str) -> Path:
    return folder / ("x.gguf" if result == "gguf" else "x")


def check_outcome(report: Report, target: Path, source: Path) -> None:
    """What is true of every result."""
    assert sorted(path.name for path in target.parent.iterdir() if "quantizing" in path.name) == []
    assert verify(target).ok
    assert report.relation == "lossy" and report.seconds > 0
    json.dumps(report.to_json())
    found, before = read_checkpoint(target), read_checkpoint(source)
    for row in report.tensors:
        blocks = encoding(row.target).block_size > 1
        assert (row.relation == "lossy") >= blocks
        assert (row.max_error > 0) >= blocks and (row.rms_error > 0) >= blocks, row
        assert 0 <= row.relative_error < (1 if blocks else 0.01)
        assert row.source == before.tensors[row.name].encoding.name
    kinds = {tensor.name: tensor.encoding.name for tensor in found.tensors.values()}
    for row in report.tensors:
        form = affine_format(row.target)
        if row.name in kinds and form is not None:  # zero points of 8 are none, where a format says so
            assert kinds[row.name].startswith(f"int{form.bits}_g{form.group_size}"), row


# -- every method into every format ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "result"),
    [
        pytest.param(family, result, marks=[] if (family, result) in QUICK else [pytest.mark.slow])
        for family in CONFIGS
        for result in RESULTS
    ],
)
def test_methods(family: str, result: str, folder: Path, options: CalibrationOptions, tmp_path: Path) -> None:
    if result.startswith("onnx"):
        pytest.importorskip("onnx")
    recipe, more = RESULTS[result]
    source, target = folder / f"{family}.gguf", target_of(tmp_path, result)
    expected = logits_of(source)
    lost: dict[str, float] = {}
    for method in METHODS:
        report = quantize(
            source, target, recipe, method=method, calibration=options, overwrite=method != "rtn", **more
        )
        check_outcome(report, target, source)
        how = {row.name: row.how for row in report.tensors}[DOWN]
        assert ("gptq" in how) == ("gptq" in method) or how == "kept", how
        lost[method] = divergence(expected, logits_of(target))
    assert verify(target).manifest.recipe["recipe"] == recipe
    assert lost["rtn"] < 0.5 * divergence(expected, expected[::-1]), "answers of other tokens are not far"
    # Scales find large features, feedback uses correlations; these models have both. What all methods
    # round alike, such as the embedding, can be most of the loss.
    assert lost["awq"] < 1.1 * lost["rtn"]
    assert lost["gptq"] < 0.75 * lost["rtn"]
    assert lost["awq+gptq"] < 0.75 * lost["rtn"]


@pytest.mark.parametrize("result", RESULTS)
def test_the_results_run(result: str, folder: Path, options: CalibrationOptions, tmp_path: Path) -> None:
    if result.startswith("onnx"):
        pytest.importorskip("onnx")
    recipe, more = RESULTS[result]
    target = target_of(tmp_path, result)
    quantize(folder / "llama.gguf", target, recipe, calibration=options, **more)
    with nybble.load(target, precision="f32") as model:
        ids = [5, 9, 40, 7]
        assert isinstance(model.generate("a b", max_tokens=3), str)
        found = model.logits(ids)
    with nybble.load(target, device="reference") as model:
        assert largest_difference(found, model.logits(ids)) < 1e-4


# -- rounded to nearest ------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["q4_0", "q4_k_m", "q8_0", "iq4_nl", "iq2_xs", "mxfp4", "q2_k"])
def test_bytes_are_those_of_round_matrix(recipe: str, folder: Path, tmp_path: Path) -> None:
    source, target = folder / "gemma3.gguf", tmp_path / "x.gguf"  # rows of 256
    report = quantize(source, target, recipe)
    before, after = read_checkpoint(source), read_checkpoint(target)
    for row in report.tensors:
        values, kind = before.tensors[row.name].dequantize(), after.tensors[row.name].encoding
        assert kind.name == row.target
        if len(row.shape) == 1:
            assert row.relation == "exact" and row.how == "kept"
            continue
        expected = round_matrix(values, kind.name)
        assert np.array_equal(after.tensors[row.name].data, expected), row.name
        errors = ValueErrors.of(values, kind.dequantize(expected).reshape(values.shape))
        assert row.max_error == errors.max_error
        assert row.rms_error == pytest.approx(errors.rms_error, rel=1e-5)
        assert row.relative_error == pytest.approx(errors.relative_error, rel=1e-5)
        assert row.how == "quantized"


def test_integers_of_safetensors_are_those_of_round_matrix(folder: Path, tmp_path: Path) -> None:
    source, target = folder / "phi3.gguf", tmp_path / "x"
    quantize(source, target, "int4-awq", method="rtn")
    before, after = read_checkpoint(source), read_checkpoint(target)
    for name, tensor in after.tensors.items():
        if name.endswith("_proj.weight"):
            assert tensor.encoding.name == "int4_g64_f16_z"  # rows of 192 are no multiple of 128
            expected = round_matrix(before.tensors[name].dequantize(), tensor.encoding.name)
            assert np.array_equal(tensor.data, expected), name
        else:
            assert np.array_equal(tensor.data, before.tensors[name].data)
    config = json.loads((target / "config.json").read_bytes())["quantization_config"]
    assert (config["quant_method"], config["bits"], config["group_size"]) == ("awq", 4, 64)


@pytest.mark.parametrize("recipe", ["int4-awq", "int4-rtn"])
def test_blocks_of_gguf_that_stay_become_floats_in_safetensors(
    recipe: str, llama: Path, tmp_path: Path
) -> None:
    quantize(llama, tmp_path / "q8_0.gguf", "q8_0")
    report = quantize(tmp_path / "q8_0.gguf", tmp_path / "x", recipe, method="rtn", to="safetensors")
    assert any(f'--tensor-encoding "{EMBEDDING}=f16"' in note for note in report.notes)
    before, after = read_checkpoint(tmp_path / "q8_0.gguf").tensors, read_checkpoint(tmp_path / "x").tensors
    assert before[EMBEDDING].encoding.name == "q8_0" and affine_format(after[UP].encoding.name) is not None
    assert np.allclose(after[EMBEDDING].dequantize(), before[EMBEDDING].dequantize(), rtol=2**-8)


@pytest.mark.parametrize("recipe", ["int8", "int4-awq-gptq"])
def test_the_packing_is_not_that_of_the_source(recipe: str, folder: Path, tmp_path: Path) -> None:
    quantize(folder / "phi3.gguf", tmp_path / "awq", "int4-awq", method="rtn")
    keep = {"*.0.self_attn.o_proj.weight": "keep", "*.1.self_attn.o_proj.weight": "f32"}
    quantize(tmp_path / "awq", tmp_path / "x", recipe, method="rtn", to="safetensors", encodings=keep)
    config = json.loads((tmp_path / "x" / "config.json").read_bytes())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    before, after = read_checkpoint(tmp_path / "awq").tensors, read_checkpoint(tmp_path / "x").tensors
    assert after[O].encoding == before[O].encoding and np.array_equal(after[O].data, before[O].data)
    assert after[O.replace("layers.0", "layers.1")].encoding.name == "f32"


def test_the_source_may_be_of_any_format(llama: Path, tmp_path: Path) -> None:
    convert(llama, tmp_path / "folder", to="safetensors")
    quantize(llama, tmp_path / "a.gguf", "q4_0")
    quantize(tmp_path / "folder", tmp_path / "b.gguf", "q4_0")
    one, other = (read_checkpoint(tmp_path / name).tensors for name in ("a.gguf", "b.gguf"))
    assert set(one) == set(other)
    for name in one:  # the rows of q and k among them, which lie in another order in the folder
        assert np.array_equal(one[name].data, other[name].data), name


def test_an_importance_matrix(llama: Path, folder: Path, tmp_path: Path) -> None:
    importance, target = tmp_path / "imatrix.gguf", tmp_path / "x.gguf"
    calibrate(llama, importance, text=[folder / "text.txt"], windows=8, window=64)
    report = quantize(llama, target, "q4_0", importance=importance)
    before, after = read_checkpoint(llama), read_checkpoint(target)
    weights = read_importance(importance, "llama")
    for row in report.tensors:
        if len(row.shape) == 2:
            values = before.tensors[row.name].dequantize()
            found = weights.weights(row.name)
            assert (found is None) == (row.name == EMBEDDING)
            expected = round_matrix(values, row.target, importance=found)
            assert np.array_equal(after.tensors[row.name].data, expected), row.name
            assert row.how == ("quantized" if found is None else "quantized, weighted")
    manifest = verify(target).manifest
    assert [item.name for item in manifest.inputs] == ["llama.gguf", "imatrix.gguf"]
    assert manifest.recipe["importance"] == manifest.inputs[1].sha256
    expected_logits = logits_of(llama)
    weighted = divergence(expected_logits, logits_of(target))
    quantize(llama, target, "q4_0", overwrite=True)
    assert weighted < divergence(expected_logits, logits_of(target))


def test_an_importance_matrix_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    importance = tmp_path / "imatrix.gguf"
    calibrate(folder / "gemma3.gguf", importance, text=[folder / "text.txt"], windows=2, window=32)
    with pytest.raises(UnsupportedError, match="it was made from another model"):
        quantize(folder / "llama.gguf", tmp_path / "x.gguf", "q4_0", importance=importance)
    assert not (tmp_path / "x.gguf").exists()


# -- calibrated --------------------------------------------------------------------------------------------


def test_threads_do_not_change_the_bytes(llama: Path, options: CalibrationOptions, tmp_path: Path) -> None:
    for method in ("awq", "awq+gptq"):
        for threads in (1, 2):
            quantize(
                llama, tmp_path / f"{threads}.gguf", "q4_0", method=method, calibration=options,
                threads=threads, overwrite=True,
            )  # fmt: skip
        assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "2.gguf").read_bytes()


@pytest.mark.parametrize("family", CONFIGS)
def test_folded_scales_leave_the_function(
    family: str, folder: Path, options: CalibrationOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AWQ without its rounding."""
    noted: list[str] = []

    def unrounded(self: object, tensor: nybble.checkpoint.tensor.Tensor, *rest: object, **more: object):  # type: ignore[no-untyped-def, name-defined]
        noted.append(tensor.name)
        return {tensor.name: MadeTensor(tensor, "as it was", ValueErrors())}

    monkeypatch.setattr(layer_quantizer.LayerQuantizer, "_rounded", unrounded)
    source, target = folder / f"{family}.gguf", tmp_path / "x.gguf"
    named = {EMBEDDING: "keep"}
    report = quantize(source, target, "q4_0", method="awq", calibration=options, encodings=named)
    assert noted and {row.target for row in report.tensors} == {"f32"}
    before, after = read_checkpoint(source), read_checkpoint(target)
    changed = [
        name for name, old in before.tensors.items() if not np.array_equal(old.data, after.tensors[name].data)
    ]
    assert NORM in changed and len(changed) > 6
    assert all(
        how.endswith("by scales (awq)") for row in report.tensors for how in [row.how] if row.name == NORM
    )
    assert largest_difference(logits_of(target), logits_of(source)) < 2e-5


def test_norms_with_an_offset_that_scales_changed_go_into_safetensors(
    folder: Path, options: CalibrationOptions, tmp_path: Path
) -> None:
    """One is subtracted from them, which is not exact for every float32."""
    source = folder / "gemma3.gguf"
    report = quantize(source, tmp_path / "x", "int4-awq", calibration=options)
    rows = {row.name: row for row in report.tensors}
    assert rows[NORM].how == "divided by scales (awq), 1 subtracted"
    assert rows[NORM].relation == "lossy" and rows[NORM].max_error < 1e-6
    assert divergence(logits_of(source), logits_of(tmp_path / "x")) < 0.05


def test_some_matrices_stay_float(llama: Path, options: CalibrationOptions, tmp_path: Path) -> None:
    named = {"*.gate_proj.weight": "f16", Q: "keep", OUTPUT: "keep", EMBEDDING: "keep"}
    for method in ("awq", "gptq", "awq+gptq"):
        report = quantize(
            llama,
            tmp_path / "x.gguf",
            "q8_0",
            method=method,
            encodings=named,
            calibration=options,
            overwrite=True,
        )
        kinds = {row.name: row.target for row in report.tensors}
        assert kinds[UP.replace("up", "gate")] == "f16"
        assert kinds[Q] == kinds[OUTPUT] == kinds[EMBEDDING] == kinds[NORM] == "f32"
        assert kinds[V] == kinds[UP] == "q8_0"
        assert divergence(logits_of(llama), logits_of(tmp_path / "x.gguf")) < 2e-3


def test_the_manifest_says_what_was_calibrated_on(
    llama: Path, options: CalibrationOptions, tmp_path: Path
) -> None:
    quantize(llama, tmp_path / "x.gguf", "q4_0", method="gptq", calibration=replace(options, seed=3))
    recipe = verify(tmp_path / "x.gguf").manifest.recipe
    assert (recipe["recipe"], recipe["method"]) == ("q4_0", "gptq")
    assert recipe["calibration"] == {
        "text": ["text.txt"], "windows": 16, "window": 64, "seed": 3, "precision": "f32",
    }  # fmt: skip
    quantize(llama, tmp_path / "y.gguf", "q4_0")
    recipe = verify(tmp_path / "y.gguf").manifest.recipe
    assert recipe["method"] == "rtn" and "calibration" not in recipe and "importance" not in recipe


@pytest.mark.parametrize("method", METHODS)
def test_progress(method: str, llama: Path, options: CalibrationOptions, tmp_path: Path) -> None:
    seen: list[LayerProgress] = []
    quantize(llama, tmp_path / "x.gguf", "q4_0", method=method, calibration=options, progress=seen.append)
    fractions = [item.fraction for item in seen]
    assert fractions == sorted(fractions) and 0 < fractions[0] < 0.5 and fractions[-1] == 1.0
    assert {item.layer for item in seen} == {0, 1, 2} and {item.num_layers for item in seen} == {2}
    assert all(item.seconds_left is None or item.seconds_left >= 0 for item in seen)


# -- what the caller says of tensors -------------------------------------------------------------------


def test_encodings_by_pattern(llama: Path, tmp_path: Path) -> None:
    named = {
        "*.layers.1.mlp.*": "q8_0",
        "*.mlp.*": "q5_1",
        V: "keep",
        OUTPUT: "f16",
    }
    report = quantize(llama, tmp_path / "x.gguf", "q4_0", encodings=named)
    kinds = {row.name: row.target for row in report.tensors}
    assert {kind for name, kind in kinds.items() if "layers.1.mlp" in name} == {"q8_0"}
    assert {kind for name, kind in kinds.items() if "layers.0.mlp" in name} == {"q5_1"}
    assert (kinds[V], kinds[Q], kinds[EMBEDDING], kinds[OUTPUT]) == ("f32", "q4_0", "q4_0", "f16")
    found = read_checkpoint(tmp_path / "x.gguf").tensors
    assert {name: tensor.encoding.name for name, tensor in found.items()} == kinds


def test_a_recipe_of_ones_own(llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'encoding = "q5_0"\n[[rules]]\ntensors = ["*.o_proj.weight"]\nlayers = "first-1"\nencoding = "q8_0"\n'
    )
    report = quantize(llama, tmp_path / "folder", str(path), to=None, split_bytes=50_000)
    kinds = {row.name: row.target for row in report.tensors}
    assert (kinds[O], kinds[O.replace("0", "1")]) == ("q8_0", "q5_0")
    assert verify(tmp_path / "folder").manifest.recipe["recipe"] == "mine"
    assert len(list((tmp_path / "folder").glob("*.gguf"))) > 1 and verify(tmp_path / "folder").ok


def test_a_recipe_for_one_format_in_another(llama: Path, options: CalibrationOptions, tmp_path: Path) -> None:
    report = quantize(llama, tmp_path / "x.gguf", "int4-gptq", calibration=options)
    assert report.to == "gguf"
    kinds = {row.name: row.target for row in report.tensors}
    assert kinds[UP] == "q4_0" and kinds[EMBEDDING] == "f32"


# -- sources that are quantized --------------------------------------------------------------------------


def test_a_source_that_is_quantized_is_noted(llama: Path, tmp_path: Path) -> None:
    quantize(llama, tmp_path / "q8.gguf", "q8_0")
    report = quantize(
        tmp_path / "q8.gguf", tmp_path / "x.gguf", "q4_0", encodings={V: "keep", EMBEDDING: "q8_0"}
    )
    assert report.notes == (
        "13 matrices of the source were quantized already: they are rounded a second time",
    )
    rows = {row.name: row for row in report.tensors}
    assert (rows[V].relation, rows[V].target, rows[EMBEDDING].relation) == ("exact", "q8_0", "exact")
    values = read_checkpoint(tmp_path / "q8.gguf").tensors[UP].dequantize()
    assert np.array_equal(read_checkpoint(tmp_path / "x.gguf").tensors[UP].data, round_matrix(values, "q4_0"))


@pytest.fixture
def sorted_columns(llama: Path, tmp_path: Path) -> Path:
    """A GPTQ folder with act-order."""
    checkpoint = read_checkpoint(llama)
    form = AffineFormat(4, 64, "f16", False)
    tensors = {}
    for seed, (name, tensor) in enumerate(checkpoint.tensors.items()):
        tensors[name] = tensor
        if name.endswith("_proj.weight"):
            rows, columns = tensor.shape
            tensors[name] = affine_tensor(name, form, (rows, columns), seed)
            other = name.removesuffix("weight") + "input_permutation"
            tensors[other] = permutation_tensor(other, columns, seed)
    folder = tmp_path / "act-order"
    folder.mkdir()
    config = replace(checkpoint.config, rope=replace(checkpoint.config.rope, interleaved=False))
    write_huggingface_folder(replace(checkpoint, config=config, tensors=tensors), folder, quantization="gptq")
    return folder


@pytest.mark.parametrize("result", ["gguf", "awq", "gptq", "onnx-cpu-int4"])
@pytest.mark.parametrize("method", ["rtn", "awq+gptq"])
def test_a_source_with_act_order(
    result: str, method: str, sorted_columns: Path, options: CalibrationOptions, tmp_path: Path
) -> None:
    if result.startswith("onnx"):
        pytest.importorskip("onnx")
    names = read_checkpoint(sorted_columns).tensors
    assert any(name.endswith("input_permutation") for name in names)
    expected = logits_of(sorted_columns)
    recipe, more = RESULTS[result]
    target = target_of(tmp_path, result)
    encodings = {"*_proj.weight": "q8_0"} if result == "gguf" else {"*_proj.weight": "int8_g64_f16"}
    if result == "awq":
        encodings = {}
    report = quantize(
        sorted_columns, target, recipe, method=method, calibration=options, encodings=encodings, **more
    )
    assert "14 matrices have their columns back in the order of the inputs (GPTQ's act-order)" in report.notes
    assert not any(name.endswith("input_permutation") for name in read_checkpoint(target).tensors)
    found = divergence(expected, logits_of(target))
    assert found < (0.3 if result == "awq" else 0.05), found


def test_a_matrix_that_stays_is_in_the_order_of_the_inputs(sorted_columns: Path, tmp_path: Path) -> None:
    report = quantize(
        sorted_columns, tmp_path / "x.gguf", "q8_0", encodings={UP: "keep", EMBEDDING: "keep", OUTPUT: "keep"}
    )
    row = {row.name: row for row in report.tensors}[UP]
    assert row.target == "f32" and "columns in the order of the inputs" in row.how
    assert divergence(logits_of(sorted_columns), logits_of(tmp_path / "x.gguf")) < 1e-3


# -- refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"recipe": "q4_x"}, NotFoundError, r"unknown recipe 'q4_x'; known: bf16, "),
        ({"recipe": "none.toml"}, NotFoundError, r"none\.toml: no such recipe"),
        ({"method": "best"}, UnsupportedError, r"unknown method 'best'; known: rtn, awq, gptq, awq\+gptq"),
        ({"to": "ggml"}, UnsupportedError, r"unknown target 'ggml'; known: gguf, safetensors, onnx, "),
        ({"quantization": "awq"}, UnsupportedError, "--quantization is for safetensors, not gguf"),
        ({"to": "safetensors", "quantization": "hqq"}, UnsupportedError, "unknown quantization 'hqq'"),
        (
            {"encodings": {"*.norm.x": "q8_0"}},
            ConversionError,
            r"no tensor's name matches '\*\.norm\.x'; names are",
        ),
        ({"encodings": {"*.v_proj.weight": "q9_9"}}, UnsupportedError, "q9_9"),
        ({"encodings": {"*.v_proj.weight": "iq1_s"}}, UnsupportedError, "there is no quantizer for iq1_s"),
        ({"encodings": {"*.v_proj.weight": "q6_k"}}, UnsupportedError, r"v_proj.weight: rows of 128 .* q6_k"),
        (
            {"encodings": {"*norm.weight": "q8_0"}},
            UnsupportedError,
            r"norm\.weight: gguf cannot hold it as q8_0",
        ),
        (
            {"encodings": {"*norm.weight": "f16"}},
            UnsupportedError,
            r"norm\.weight: gguf cannot hold it as f16",
        ),
        ({"to": "safetensors"}, UnsupportedError, r"safetensors cannot hold it as q4_0"),
        (
            {"recipe": "int8", "to": "safetensors", "encodings": {EMBEDDING: "int8_g64_f16"}},
            UnsupportedError,
            r"model\.embed_tokens\.weight: safetensors cannot hold it as int8_g64_f16",
        ),
        (
            {"recipe": "int4-awq", "to": "safetensors", "encodings": {"*.v_proj.weight": "int8_g64_f16"}},
            UnsupportedError,
            r"v_proj\.weight \(int8_g64_f16\): AWQ has 4 bits only",
        ),
        (
            {"recipe": "int4-gptq", "to": "safetensors", "encodings": {"*.v_proj.weight": "int8_g64_f16"}},
            UnsupportedError,
            r"v_proj\.weight \(int8_g64_f16\): GPTQ has one width for all weights",
        ),
        ({"importance": "nothing.gguf"}, NotFoundError, r"nothing\.gguf"),
        ({"method": "awq", "calibration": CalibrationOptions(text=["no.txt"])}, NotFoundError, r"no\.txt"),
        (
            {"method": "awq", "calibration": CalibrationOptions(window=9999)},
            UnsupportedError,
            "windows of 9999",
        ),
        ({"split_bytes": 0}, UnsupportedError, "--split-bytes is a positive number"),
    ],
)
def test_what_cannot_be_done(
    options: dict[str, object],
    error: type[Exception],
    message: str,
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def begun(*_: object) -> None:
        raise AssertionError("it was refused after work had begun")

    monkeypatch.setattr(module, "run", begun)
    with pytest.raises(error, match=message):
        quantize(llama, tmp_path / "x.gguf", **{"recipe": "q4_0", **options})  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_exists(llama: Path, tmp_path: Path) -> None:
    target = tmp_path / "x.gguf"
    target.write_text("mine")
    with pytest.raises(OutputError, match=r"x\.gguf exists; name another output"):
        quantize(llama, target, "q4_0")
    assert target.read_text() == "mine" and list(tmp_path.iterdir()) == [target]
    quantize(llama, target, "q4_0", overwrite=True)
    assert verify(target).ok


def test_the_source_is_not_overwritten(llama: Path) -> None:
    before = llama.read_bytes()
    with pytest.raises(OutputError):
        quantize(llama, llama, "q4_0", overwrite=True)
    assert llama.read_bytes() == before


def test_a_source_without_a_tokenizer(llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "plain.gguf"
    write_gguf(replace(read_checkpoint(llama), tokenizer=None, metadata={}), source)
    with pytest.raises(UnsupportedError, match="the model has no tokenizer, which a calibration needs"):
        quantize(source, tmp_path / "x.gguf", "q4_0", method="gptq")
    quantize(source, tmp_path / "x.gguf", "q4_0")


@pytest.mark.parametrize("recipe", ["q4_0", "int4-rtn", "int4-awq", "int4-gptq"])
def test_weights_that_are_not_finite(
    recipe: str, llama: Path, options: CalibrationOptions, tmp_path: Path
) -> None:
    checkpoint = read_checkpoint(llama)
    values = checkpoint.tensors[UP].dequantize()
    values[3, 5] = np.nan
    broken = checkpoint.tensors[UP].changed(data=values.reshape(-1).view(np.uint8))
    source = tmp_path / "broken.gguf"
    write_gguf(replace(checkpoint, tensors={**checkpoint.tensors, UP: broken}), source)
    calibrated = recipe in ("int4-awq", "int4-gptq")
    message = rf"the input of {DOWN} is not finite" if calibrated else rf"{UP}: .*nan"
    with pytest.raises(NybbleError, match=message):
        quantize(source, tmp_path / "x.gguf", recipe, calibration=options)
    assert not (tmp_path / "x.gguf").exists()
