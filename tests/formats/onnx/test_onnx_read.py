"""ONNX decoders as checkpoints: each exporter's tiny model against ONNX Runtime on the same file."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import nybble
from nybble import devices
from nybble.checkpoint.checkpoint import Checkpoint
from nybble.devices.base import BatchItem
from nybble.errors import FormatError, NotFoundError, UnsupportedError
from nybble.formats.onnx.read import METADATA_ACCURACY, read_onnx_checkpoint
from nybble.graph.rotary import rotary_frequencies
from nybble.loading import read_checkpoint

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

DATA = Path(__file__).parents[2] / "data" / "onnx"
MODELS = sorted(path.name for path in DATA.iterdir() if path.is_dir())
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def exact(path: Path, target: Path) -> Path:
    """The model without rounding of activations, and with caches that may be empty."""
    model = onnx.load(path)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name in ("accuracy_level", "sliding_window_cache"):
                attribute.i = 0
    onnx.save(model, target)
    return target


def runtime_logits(path: Path, config, ids: list[int]) -> np.ndarray:
    """ONNX Runtime's logits of a whole sequence, its own fusions left out."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feeds: dict[str, np.ndarray] = {}
    for value in session.get_inputs():
        if value.name == "input_ids":
            feeds[value.name] = np.array([ids])
        elif value.name == "attention_mask":
            feeds[value.name] = np.ones((1, len(ids)), np.int64)
        elif value.name == "position_ids":
            feeds[value.name] = np.arange(len(ids))[None]
        else:
            shape = (1, config.num_key_value_heads, 0, config.head_dim)
            feeds[value.name] = np.zeros(shape, TYPES[value.type])
    return session.run(["logits"], feeds)[0][0].astype(np.float32)


def our_logits(checkpoint: Checkpoint, ids: list[int]) -> np.ndarray:
    session = devices.compile(checkpoint, device="reference", context_length=64)
    return session.forward([BatchItem(session.new_sequence(), ids, "all")])


@pytest.mark.parametrize("name", MODELS)
def test_what_is_read_computes_what_the_file_computes(name, tmp_path):
    checkpoint = read_onnx_checkpoint(DATA / name)
    same = exact(DATA / name / "model.onnx", tmp_path / "model.onnx")
    half = any(tensor.encoding.name == "f16" for tensor in checkpoint.tensors.values())
    for length in (7, 40):  # windows are 9, LongRoPE switches after 16
        ids = np.random.default_rng(length).integers(3, 64, length).tolist()
        expected = runtime_logits(same, checkpoint.config, ids)
        actual = our_logits(checkpoint, ids)
        worst = np.abs(actual - expected).max() / np.abs(expected).max()
        # The builder rounds Gemma's sqrt(hidden_size) to two decimals; it is read as what it means.
        assert worst < (2e-2 if half else 2e-3 if name == "builder-gemma3-int4" else 2e-5)


EXPECTED = {
    "builder-llama-int4": ("llama", "default", 10000.0, None, True),
    "builder-llama-int8": ("llama", "default", 10000.0, None, False),
    "builder-llama-qdq": ("llama", "default", 10000.0, None, False),
    "builder-phi3-longrope-int4": ("phi3", "longrope", 10000.0, None, False),
    "builder-phi3-longrope-dml": ("phi3", "longrope", 10000.0, None, False),
    "builder-qwen2-fp32": ("qwen2", "default", 10000.0, None, False),
    "builder-gemma3-int4": ("gemma3", "default", 1000000.0, 9, True),
    "dynamo-phi3-longrope": ("phi3", "longrope", 10000.0, None, False),
    "optimum-gemma3": ("gemma3", "default", 1000000.0, 9, True),
    "optimum-llama": ("llama", "default", 10000.0, None, False),
    "optimum-mistral": ("mistral", "default", 10000.0, 9, False),
}


def test_every_model_is_expected():
    assert set(EXPECTED) == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_config(name):
    config = read_onnx_checkpoint(DATA / name).config
    found = (
        config.architecture, config.rope.kind, config.rope.theta, config.sliding_window,
        config.tie_word_embeddings,
    )  # fmt: skip
    assert found == EXPECTED[name]
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (72, 32, 48)
    assert (config.num_hidden_layers, config.num_attention_heads) == (2, 2)
    assert (config.rms_norm_offset, config.rope.interleaved) == (0.0, False)
    if config.rope.kind == "longrope":
        rope = config.rope
        assert rope.original_max_position_embeddings == 16
        assert rope.short_factor == (1.0, 1.1, 1.2, 1.5, 1.7, 1.8, 2.0, 2.2)
        assert rotary_frequencies(rope, 64)[0] == pytest.approx(
            10000.0 ** -(np.arange(8) / 8) / [1.0, 3.0, 7.0, 20.0, 30.0, 31.0, 32.5, 40.0], rel=2e-3
        )
    if config.architecture == "gemma3":
        assert config.layer_types == ("sliding_attention", "full_attention")
        assert config.rope_local is not None and config.rope_local.theta == 10000.0
        assert config.query_key_norm and config.hidden_act == "gelu_pytorch_tanh"
        assert config.embedding_scale == pytest.approx(32**0.5, rel=1e-12)


def test_encodings_are_those_of_the_file():
    def names(name: str) -> set[str]:
        return {tensor.encoding.name for tensor in read_onnx_checkpoint(DATA / name).tensors.values()}

    # 48 columns in blocks of 32 are groups of 16: the padding is cut off.
    assert names("builder-llama-int4") == {"f32", "int4_g32_f32", "int4_g16_f32"}
    assert names("builder-llama-int8") == {"f32", "int8_g32_f32", "int8_g16_f32"}
    assert names("builder-llama-qdq") == {"f32", "int4_g16_f32_z"}
    assert names("builder-phi3-longrope-dml") == {"f16", "int4_g16_f16"}


def test_codes_and_scales_are_kept_bit_for_bit():
    from nybble.checkpoint.encodings.affine import affine_format, split

    model = onnx.load(DATA / "builder-llama-int4" / "model.onnx")
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    tensor = read_onnx_checkpoint(DATA / "builder-llama-int4").tensors[
        "model.layers.0.self_attn.k_proj.weight"
    ]
    form = affine_format(tensor.encoding.name)
    assert form is not None
    parts = split(tensor.data, 32, form)
    name = "model.layers.0.attn.qkv_proj.MatMul.weight"
    packed = stored[f"{name}_Q4"][32:48, 0]  # after two heads of q comes one of k
    assert (parts.codes[:, 0::2] == packed & 15).all() and (parts.codes[:, 1::2] == packed >> 4).all()
    assert (parts.scales.reshape(-1).view(np.float32) == stored[f"{name}_scales"][32:48].reshape(-1)).all()


def test_accuracy_level_is_kept_in_the_metadata():
    checkpoint = read_onnx_checkpoint(DATA / "builder-llama-int4")
    assert checkpoint.metadata[METADATA_ACCURACY] == [4]
    assert checkpoint.metadata["onnx.genai_config"]["model"]["type"] == "llama"
    assert checkpoint.format == "onnx"


def test_a_file_a_folder_and_the_general_reader_give_the_same():
    folder = DATA / "builder-llama-int8"
    assert read_checkpoint(folder).config == read_checkpoint(folder / "model.onnx").config
    assert read_checkpoint(folder).config == read_onnx_checkpoint(folder).config


def test_it_runs_on_the_cpu():
    folder = DATA / "builder-llama-int4"
    model = nybble.load(folder, device="cpu", threads=1)
    expected = our_logits(read_onnx_checkpoint(folder), [5, 6, 7])
    np.testing.assert_allclose(model.logits([5, 6, 7]), expected, rtol=0, atol=0.05 * np.abs(expected).max())


# -- what is not recognised -----------------------------------------------------------------------------


def changed(tmp_path: Path, change, name: str = "builder-llama-int4") -> Path:
    """A copy of a model after ``change(model)``."""
    shutil.copytree(DATA / name, tmp_path / "model")
    path = tmp_path / "model" / "model.onnx"
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)
    return path.parent


def node_of(model, operator: str):
    return next(node for node in model.graph.node if node.op_type == operator)


def test_an_unknown_operator_is_named_with_what_to_do(tmp_path):
    def change(model):
        node = node_of(model, "Sigmoid")
        node.op_type = "HardSigmoid"

    with pytest.raises(UnsupportedError, match=r"HardSigmoid '/model/layers.0.*device=\"onnxruntime:cpu\""):
        read_onnx_checkpoint(changed(tmp_path, change))


def test_another_activation_is_not_taken_for_a_known_one(tmp_path):
    def change(model):
        node_of(model, "Sigmoid").op_type = "Tanh"

    with pytest.raises(UnsupportedError, match="run the model as it is"):
        read_onnx_checkpoint(changed(tmp_path, change))


def test_an_unknown_attribute_is_refused(tmp_path):
    def change(model):
        node_of(model, "GroupQueryAttention").attribute.append(onnx.helper.make_attribute("twist", 1))

    with pytest.raises(UnsupportedError, match=r"GroupQueryAttention.*unknown attributes twist"):
        read_onnx_checkpoint(changed(tmp_path, change))


def test_layers_that_differ_are_refused(tmp_path):
    def change(model):
        for attribute in node_of(model, "GroupQueryAttention").attribute:
            if attribute.name == "scale":
                attribute.f = 0.5

    with pytest.raises(UnsupportedError, match=r"layer 1.*has scale"):
        read_onnx_checkpoint(changed(tmp_path, change))


def test_a_skipped_residual_is_refused(tmp_path):
    def change(model):
        node = node_of(model, "SkipSimplifiedLayerNormalization")
        node.input[0], node.input[1] = node.input[1], node.input[1]

    with pytest.raises(UnsupportedError, match="run the model as it is"):
        read_onnx_checkpoint(changed(tmp_path, change))


def test_positions_that_are_not_the_sequence_are_refused(tmp_path):
    def change(model):
        node = node_of(model, "Sub")  # lengths of the caches
        node.op_type = "Add"

    with pytest.raises(UnsupportedError, match="lengths other than"):
        read_onnx_checkpoint(changed(tmp_path, change))


def test_rotary_tables_that_are_none_are_refused(tmp_path):
    def change(model):
        for tensor in model.graph.initializer:
            if tensor.name == "sin_cache":
                values = np.array(onnx.numpy_helper.to_array(tensor))
                values[5:] *= 0.5
                tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))

    with pytest.raises(UnsupportedError, match="rotary tables"):
        read_onnx_checkpoint(changed(tmp_path, change))


def test_odd_frequencies_are_kept_as_they_are(tmp_path):
    """Tables that no known scaling makes become divisors of the frequencies."""
    inverse = np.array([0.9, 0.5, 0.2, 0.11, 0.07, 0.05, 0.02, 0.003])
    angles = np.arange(64)[:, None] * inverse

    def change(model):
        for tensor in model.graph.initializer:
            values = {"cos_cache": np.cos(angles), "sin_cache": np.sin(angles)}.get(tensor.name)
            if values is not None:
                tensor.CopyFrom(onnx.numpy_helper.from_array(1.25 * values.astype(np.float32), tensor.name))

    rope = read_onnx_checkpoint(changed(tmp_path, change)).config.rope
    frequencies, factor = rotary_frequencies(rope, 1)
    assert frequencies == pytest.approx(inverse, rel=1e-5)
    assert factor == pytest.approx(1.25, rel=1e-5)


def test_an_upper_window_of_a_mask_is_refused(tmp_path):
    """Masks that are neither causal nor a window are not taken for one."""

    def change(model):
        node_of(model, "LessOrEqual").op_type = "GreaterOrEqual"

    with pytest.raises(UnsupportedError, match="mask"):
        read_onnx_checkpoint(changed(tmp_path, change, "optimum-llama"))


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(NotFoundError):
        read_onnx_checkpoint(tmp_path / "missing.onnx")
    path = tmp_path / "model.onnx"
    path.write_bytes(b"something else")
    with pytest.raises(FormatError, match="not an ONNX model"):
        read_onnx_checkpoint(path)
    path.write_bytes(b"")
    with pytest.raises(FormatError, match="no graph"):
        read_onnx_checkpoint(path)


def test_without_the_package_the_message_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UnsupportedError, match=r"nybble\[onnx\]"):
        read_onnx_checkpoint(DATA / "optimum-llama")
