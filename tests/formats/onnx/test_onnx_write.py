"""Written ONNX folders in ONNX Runtime against the reference device: every family, every target."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.config import ModelConfig
from nybble.checkpoint.encodings import encoding
from nybble.checkpoint.encodings.affine import affine_encoding
from nybble.devices.reference import compile_session
from nybble.errors import UnsupportedError
from nybble.formats.onnx.targets import TARGETS
from nybble.formats.onnx.write import CONFIG_KEY, DATA_FILE, onnx_folder_bytes, write_onnx_folder
from nybble.graph.onnx import written_encodings
from support.onnx_runs import as_written, onnx_families, quantized, run_steps, session
from support.random_checkpoints import random_checkpoint, relative_error, run, tokens, with_tensors

FAMILIES = onnx_families()
# float32 rounds to 2 ** -24; some hundred operations. float16 rounds values to 2 ** -12 of themselves, at
# each of some 20 places a layer. accuracy_level 4 rounds activations to int8 blocks of 32 (0.5 % each, see
# tests/devices/cpu/test_cpu_parity.py): 13 linears and what softmax makes of it.
TOLERANCES = {
    "onnx-cpu-fp32": 1e-5,
    "onnx-cpu-int4": 6e-2,
    "onnx-cuda-fp16": 6e-3,
    "onnx-cuda-int4": 6e-3,
    "onnx-dml-int4": 6e-3,
}
MICROSOFT_ONLY = {
    "GroupQueryAttention",
    "MatMulNBits",
    "GatherBlockQuantized",
    "SkipSimplifiedLayerNormalization",
    "RotaryEmbedding",
}


def written(checkpoint: Checkpoint, folder: Path, target: str) -> onnx.ModelProto:
    write_onnx_folder(checkpoint, folder, target=target, method="rtn")
    return onnx.load(folder / "model.onnx", load_external_data=False)


@pytest.mark.parametrize("target", TOLERANCES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits(family: str, target: str, tmp_path: Path) -> None:
    """A prompt at once, and in steps over the cache; the sequence stays on LongRoPE's short side."""
    checkpoint = random_checkpoint(FAMILIES[family])
    written(checkpoint, tmp_path, target)
    model, ids = session(tmp_path), tokens(30)
    expected = run(compile_session(as_written(checkpoint, target)), ids)
    for sizes in ((), (20, 1, 1, 7)):
        actual = run_steps(model, checkpoint.config, ids, sizes)
        assert relative_error(actual, expected) < TOLERANCES[target]


def test_activations_stay_float_at_accuracy_level_0(tmp_path: Path) -> None:
    """The same int4 weights without rounded activations: float32's error."""
    checkpoint = random_checkpoint(FAMILIES["gemma3"])
    target = replace(TARGETS["onnx-cpu-int4"], accuracy_level=0)
    write_onnx_folder(checkpoint, tmp_path, target=target)
    expected = run(compile_session(as_written(checkpoint, target.name)), tokens(30))
    actual = run_steps(session(tmp_path), checkpoint.config, tokens(30), (12, 1))
    assert relative_error(actual, expected) < TOLERANCES["onnx-cpu-fp32"]


@pytest.mark.parametrize("target", ["onnx-cpu-fp32", "onnx-dml-int4"])
@pytest.mark.parametrize("family", ["phi3-longrope", "phi3-longrope-window"])
@pytest.mark.parametrize("length", [40, 41, 60])
def test_longrope_switches_by_current_length(family: str, target: str, length: int, tmp_path: Path) -> None:
    """40 tokens are short, 41 are long; decode goes on with the same factors."""
    checkpoint = random_checkpoint(FAMILIES[family])
    written(checkpoint, tmp_path, target)
    ids = tokens(length)
    expected = run(compile_session(as_written(checkpoint, target)), ids)
    model = session(tmp_path)
    assert relative_error(run_steps(model, checkpoint.config, ids), expected) < TOLERANCES[target]
    more = [*ids, 5] if length > 40 else ids
    steps = (41, 10, 1) if length > 40 else (10, 1)
    expected = run(compile_session(as_written(checkpoint, target)), more)
    assert relative_error(run_steps(model, checkpoint.config, more, steps), expected) < TOLERANCES[target]


def test_batch(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(FAMILIES["phi3"])
    written(checkpoint, tmp_path, "onnx-cpu-fp32")
    expected = run(compile_session(checkpoint), tokens(20))
    actual = run_steps(session(tmp_path), checkpoint.config, tokens(20), (18, 1, 1), batch=3)
    assert relative_error(actual, expected) < TOLERANCES["onnx-cpu-fp32"]


@pytest.mark.parametrize("target", TOLERANCES)
@pytest.mark.parametrize("family", ["llama", "phi3-longrope", "qwen3", "gemma3", "smollm3", "qwen2"])
def test_nodes(family: str, target: str, tmp_path: Path) -> None:
    """What the graph is made of: one attention a layer, fused norms, and MatMulNBits for int4."""
    config = FAMILIES[family]
    model = written(random_checkpoint(config), tmp_path, target)
    names = [node.op_type for node in model.graph.node]
    layers = config.num_hidden_layers
    dml = target == "onnx-dml-int4"
    linears = 7 if dml else 5  # q, k and v are one
    matmul = "MatMulNBits" if target.endswith("int4") else "MatMul"
    assert names.count("GroupQueryAttention") == layers
    assert names.count(matmul) == linears * layers + 1
    fused = not dml or family == "gemma3"  # DirectML's norms are float32, Gemma's stream is that already
    assert names.count("SkipSimplifiedLayerNormalization") == (2 * layers if fused else 0)
    assert names.count("If") == (family == "phi3-longrope" and not dml)
    rotated = sum(config.layer_rope(layer) is not None for layer in range(layers))
    assert names.count("RotaryEmbedding") == (2 * rotated if dml else 0)
    if target.endswith("int4") and config.tie_word_embeddings:
        assert names.count("GatherBlockQuantized") == 1
    has_positions = any(item.name == "position_ids" for item in model.graph.input)
    assert has_positions == dml
    kind = onnx.TensorProto.FLOAT if "cpu" in target else onnx.TensorProto.FLOAT16
    for item in (*model.graph.input, *model.graph.output):
        expected = (
            onnx.TensorProto.INT64 if item.name in ("input_ids", "attention_mask", "position_ids") else kind
        )
        assert item.type.tensor_type.elem_type == expected, item.name
    for node in model.graph.node:
        assert (node.domain == "com.microsoft") == (node.op_type in MICROSOFT_ONLY), node.op_type
        if node.op_type == "MatMulNBits":
            attributes = {item.name: item.i for item in node.attribute}
            assert attributes["block_size"] == 32 and attributes["bits"] == 4
            assert attributes.get("accuracy_level", 0) == (4 if target == "onnx-cpu-int4" else 0)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_directml_norms_are_float32(family: str, tmp_path: Path) -> None:
    """DirectML keeps the mean of squares in the input's type, and float16 ends at 65504."""
    model = written(random_checkpoint(FAMILIES[family]), tmp_path, "onnx-dml-int4")
    types = {item.name: item.data_type for item in model.graph.initializer}
    norms = [node for node in model.graph.node if node.op_type.endswith("SimplifiedLayerNormalization")]
    per_layer = {"llama": 2, "qwen3": 4, "gemma3": 6}[family]
    assert len(norms) == per_layer * FAMILIES[family].num_hidden_layers + 1
    for node in norms:
        weight = node.input[2 if node.op_type.startswith("Skip") else 1]
        assert types[weight] == onnx.TensorProto.FLOAT, node.name


@pytest.mark.parametrize(
    "kind",
    ["int4_g32_f16", "int4_g32_f16_z", "int4_g16_f32_z", "int8_g32_f16", "int8_g64_f32_z", "int4_g64_bf16"],
)
def test_integers_are_packed_exactly(kind: str, tmp_path: Path) -> None:
    """Codes, scales and zero points of a checkpoint come back bit for bit from the file."""
    config = replace(FAMILIES["phi3"], tie_word_embeddings=True, intermediate_size=128)
    checkpoint = quantized(random_checkpoint(config), kind)
    target = replace(TARGETS["onnx-cpu-int4"], accuracy_level=0)
    write_onnx_folder(checkpoint, tmp_path, target=target)
    model = onnx.load(tmp_path / "model.onnx")
    found = {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer}
    bits = int(kind[3])
    stem = "model.layers.1.mlp.down_proj.MatMul.weight"
    tensor = checkpoint.tensors["model.layers.1.mlp.down_proj.weight"]
    codes = found[f"{stem}_Q{bits}"]
    values = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:2], -1) if bits == 4 else codes
    zeros = np.full(codes.shape[:2], 2 ** (bits - 1))
    if kind.endswith("_z"):
        packed = found[f"{stem}_zero_points"]
        zeros = (
            np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1) if bits == 4 else packed
        )
        zeros = zeros[:, : codes.shape[1]]
    scales = found[f"{stem}_scales"]
    back = (values.astype(np.float32) - zeros[..., None]) * scales[..., None]
    np.testing.assert_array_equal(back.reshape(tensor.shape), tensor.dequantize())
    expected = run(compile_session(checkpoint), tokens(12))
    assert relative_error(run_steps(session(tmp_path), config, tokens(12)), expected) < 1e-5


def test_groups_that_are_no_power_of_two_are_cut(tmp_path: Path) -> None:
    """A scale a row of 96: three blocks of 32 with the same scale."""
    checkpoint = random_checkpoint(FAMILIES["llama"])
    name = "model.layers.0.mlp.down_proj.weight"
    tensor = checkpoint.tensors[name]
    row = affine_encoding(8, 96, "f32")
    assert row.quantize is not None
    checkpoint = with_tensors(
        checkpoint, {name: tensor.changed(encoding=row, data=row.quantize(tensor.dequantize()))}
    )
    write_onnx_folder(checkpoint, tmp_path, target="onnx-cpu-fp32")
    expected = run(compile_session(checkpoint), tokens(12))
    assert relative_error(run_steps(session(tmp_path), checkpoint.config, tokens(12)), expected) < 1e-5


def test_act_order(tmp_path: Path) -> None:
    """Columns in another order: the input is gathered."""
    checkpoint = random_checkpoint(FAMILIES["llama"])
    random = np.random.default_rng(3)
    changed = {}
    for name in ("model.layers.1.mlp.down_proj", "model.layers.0.self_attn.o_proj"):
        tensor = checkpoint.tensors[f"{name}.weight"]
        order = random.permutation(tensor.shape[1]).astype("<i4")
        values = np.ascontiguousarray(tensor.dequantize()[:, order])
        changed[f"{name}.weight"] = tensor.changed(data=values.reshape(-1).view(np.uint8))
        permutation = f"{name}.input_permutation"
        changed[permutation] = tensor.changed(
            name=permutation, shape=order.shape, encoding=encoding("i32"), data=order.view(np.uint8)
        )
    ordered = with_tensors(checkpoint, changed)
    model = written(ordered, tmp_path, "onnx-cpu-fp32")
    assert [node.op_type for node in model.graph.node].count("Gather") == 4  # two more than without
    expected = run(compile_session(checkpoint), tokens(12))
    assert relative_error(run_steps(session(tmp_path), checkpoint.config, tokens(12)), expected) < 1e-5


def test_other_forms_and_encodings_are_refused(tmp_path: Path) -> None:
    llama = random_checkpoint(FAMILIES["llama"])
    offset = replace(llama, config=replace(llama.config, rms_norm_offset=1.0))
    with pytest.raises(ValueError, match="offset"):
        write_onnx_folder(offset, tmp_path / "a", target="onnx-cpu-fp32")
    turned = replace(llama, config=replace(llama.config, rope=replace(llama.config.rope, interleaved=True)))
    with pytest.raises(ValueError, match="ONNX form"):
        write_onnx_folder(turned, tmp_path / "b", target="onnx-cpu-fp32")
    ggml = random_checkpoint(FAMILIES["llama"], weights="q4_0")
    with pytest.raises(ValueError, match=r"q_proj.weight is q4_0, which ONNX cannot hold"):
        write_onnx_folder(ggml, tmp_path / "c", target="onnx-cpu-int4")
    with pytest.raises(ValueError, match=r"q_proj.weight is f32, but onnx-dml-int4 wants .* 'rtn'"):
        write_onnx_folder(llama, tmp_path / "d", target="onnx-dml-int4")
    dynamic = replace(llama.config.rope, kind="dynamic", factor=2.0, original_max_position_embeddings=64)
    with pytest.raises(UnsupportedError, match="dynamic"):
        config = replace(llama.config, rope=dynamic)
        write_onnx_folder(replace(llama, config=config), tmp_path / "e", target="onnx-cpu-fp32")
    with pytest.raises(UnsupportedError, match="onnx-cpu-int4"):
        write_onnx_folder(llama, tmp_path / "f", target="onnx-cpu")
    with pytest.raises(UnsupportedError, match="multiple of 16"):
        small = random_checkpoint(
            replace(FAMILIES["llama"], head_dim=24, rope=replace(llama.config.rope, rotary_dim=24))
        )
        write_onnx_folder(small, tmp_path / "g", target="onnx-cpu-fp32")
    assert not list(tmp_path.iterdir())


def test_dml_takes_int4_weights_as_they_are(tmp_path: Path) -> None:
    """An AWQ checkpoint: int4 linears, float16 embedding and output matrix."""
    checkpoint = quantized(random_checkpoint(FAMILIES["llama"]), "int4_g32_f16_z", layers_only=True)
    write_onnx_folder(checkpoint, tmp_path, target="onnx-dml-int4")
    expected = run(compile_session(checkpoint), tokens(12))
    actual = run_steps(session(tmp_path), checkpoint.config, tokens(12), (8, 1))
    assert relative_error(actual, expected) < TOLERANCES["onnx-dml-int4"]


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(FAMILIES["llama"])
    name = "model.layers.0.mlp.up_proj.weight"
    values = checkpoint.tensors[name].dequantize()
    values[3, 4] = 1e5
    changed = checkpoint.tensors[name].changed(data=values.reshape(-1).view(np.uint8))
    with pytest.raises(ValueError, match=r"up_proj.weight: 100000 does not fit in float16"):
        write_onnx_folder(with_tensors(checkpoint, {name: changed}), tmp_path, target="onnx-cuda-fp16")


def test_same_checkpoint_same_bytes(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(FAMILIES["gemma3"])
    for name in ("a", "b"):
        written(checkpoint, tmp_path / name, "onnx-cuda-int4")
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert {"model.onnx", DATA_FILE, "genai_config.json"} == names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    size = sum(path.stat().st_size for path in (tmp_path / "a").iterdir())
    assert size <= onnx_folder_bytes(checkpoint, "onnx-cuda-int4") <= size + (9 << 20)


def test_offsets_and_progress(tmp_path: Path) -> None:
    """Data is aligned, in order, and progress ends at the file's size."""
    checkpoint = random_checkpoint(FAMILIES["qwen2"])
    seen: list[tuple[int, int]] = []
    write_onnx_folder(
        checkpoint, tmp_path, target="onnx-cpu-int4", progress=lambda done, total: seen.append((done, total))
    )
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    places = {}
    for item in model.graph.initializer:
        where = {entry.key: entry.value for entry in item.external_data}
        assert where["location"] == DATA_FILE and int(where["offset"]) % 64 == 0
        places[item.name] = (int(where["offset"]), int(where["length"]))
    assert places["model.embed_tokens.weight_Q4"] == places["lm_head.MatMul.weight_Q4"]
    assert seen == sorted(seen) and seen[-1] == ((tmp_path / DATA_FILE).stat().st_size,) * 2


def test_config_and_genai_config(tmp_path: Path) -> None:
    checkpoint = replace(
        random_checkpoint(FAMILIES["gemma3"]),
        metadata={
            "huggingface.generation_config": {"eos_token_id": [7, 9], "bos_token_id": 3, "temperature": 0.6}
        },
    )
    model = written(checkpoint, tmp_path, "onnx-dml-int4")
    props = {item.key: item.value for item in model.metadata_props}
    assert json.loads(props[CONFIG_KEY])["rope_local"]["theta"] == 10000.0
    assert ModelConfig.__dataclass_fields__.keys() - json.loads(props[CONFIG_KEY]).keys() == {"extra"}
    genai = json.loads((tmp_path / "genai_config.json").read_text())
    decoder = genai["model"]["decoder"]
    assert genai["model"]["type"] == "gemma3_text"
    assert (genai["model"]["eos_token_id"], genai["model"]["bos_token_id"]) == ([7, 9], 3)
    assert genai["search"]["temperature"] == 0.6
    assert decoder["session_options"]["provider_options"] == [{"dml": {"enable_graph_capture": "1"}}]
    assert decoder["inputs"]["position_ids"] == "position_ids"
    assert decoder["head_size"] == 32 and decoder["num_hidden_layers"] == 4


def test_written_encodings(tmp_path: Path) -> None:
    """What the converter asks: the encodings are those that the file has."""
    plain = random_checkpoint(FAMILIES["llama"], embeddings="f16")
    found = written_encodings(plain, TARGETS["onnx-cpu-int4"])
    assert found["model.embed_tokens.weight"].name == "f16"
    assert found["lm_head.weight"].name == "int4_g32_f32"
    assert len(found) == 2 + 7 * plain.config.num_hidden_layers
    tied = random_checkpoint(FAMILIES["qwen2"])
    found = written_encodings(tied, TARGETS["onnx-cuda-int4"])
    assert {row.name for row in found.values()} == {"int4_g32_f16"}
    found = written_encodings(quantized(tied, "int8_g32_f32_z"), TARGETS["onnx-cuda-fp16"])
    assert {row.name for row in found.values()} == {"int8_g32_f16_z"}


def test_half_precision_embedding_keeps_its_bytes(tmp_path: Path) -> None:
    for kind in ("f16", "bf16"):
        checkpoint = random_checkpoint(FAMILIES["llama"], embeddings=kind)
        model = written(checkpoint, tmp_path / kind, "onnx-cpu-int4")
        stored = next(item for item in model.graph.initializer if item.name == "model.embed_tokens.weight")
        where = {entry.key: entry.value for entry in stored.external_data}
        begin = int(where["offset"])
        data = (tmp_path / kind / DATA_FILE).read_bytes()[begin : begin + int(where["length"])]
        assert data == checkpoint.tensors["model.embed_tokens.weight"].data.tobytes()
        expected = run(compile_session(as_written(checkpoint, "onnx-cpu-int4")), tokens(9))
        actual = run_steps(session(tmp_path / kind), checkpoint.config, tokens(9))
        assert relative_error(actual, expected) < TOLERANCES["onnx-cpu-int4"]
