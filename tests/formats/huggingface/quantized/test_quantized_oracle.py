"""compressed-tensors and transformers against us: files of theirs that we read, files of ours that they load.

They hold no reader of AWQ and GPTQ (those need gptqmodel and a compiler); these packings are checked
against their layout in the other files here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
compressed_tensors = pytest.importorskip("compressed_tensors")

from compressed_tensors.compressors import BaseCompressor, ModelCompressor  # noqa: E402
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config  # noqa: E402
from compressed_tensors.quantization.utils import calculate_qparams  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from nybble.checkpoint.encodings.affine import AffineFormat  # noqa: E402
from nybble.devices import cpu, reference  # noqa: E402
from nybble.devices.base import BatchItem, Session  # noqa: E402
from nybble.formats.huggingface.checkpoint import read_huggingface_checkpoint  # noqa: E402
from nybble.formats.huggingface.writer import write_huggingface_folder  # noqa: E402
from support.affine_models import affine_checkpoint, affine_tensor  # noqa: E402
from support.random_checkpoints import FAMILIES  # noqa: E402
from support.random_models import SIZES, assert_close, oracle, random_model, tokens  # noqa: E402

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]

SCHEMES: dict[str, tuple[str, dict[str, object], dict[str, object] | None]] = {
    "int4-groups": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}, None),
    "int4-groups-asymmetric": (
        "pack-quantized",
        {"num_bits": 4, "strategy": "group", "group_size": 16, "symmetric": False},
        None,
    ),
    "int8-channels": ("pack-quantized", {"num_bits": 8, "strategy": "channel"}, None),
    "int8-channels-asymmetric": (
        "pack-quantized",
        {"num_bits": 8, "strategy": "channel", "symmetric": False},
        None,
    ),
    "int3-groups": ("pack-quantized", {"num_bits": 3, "strategy": "group", "group_size": 32}, None),
    "int2-channels": ("pack-quantized", {"num_bits": 2, "strategy": "channel"}, None),
    "w8a8": (
        "int-quantized",
        {"num_bits": 8, "strategy": "channel"},
        {"num_bits": 8, "strategy": "token", "dynamic": True},
    ),
    "naive-int4": ("naive-quantized", {"num_bits": 4, "strategy": "tensor"}, None),
}
"""Format, weights and activations of a scheme."""


def save_quantized(folder: Path, scheme: str, dtype: torch.dtype) -> None:
    """A random llama, quantized and saved by compressed-tensors and transformers."""
    kind, weights, activations = SCHEMES[scheme]
    model = random_model("llama").to(dtype)
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "format": kind}
    config = {"config_groups": {"group_0": group}, "ignore": ["lm_head"], "format": kind}
    apply_quantization_config(model, QuantizationConfig.model_validate(config))
    for module in model.modules():
        arguments = getattr(getattr(module, "quantization_scheme", None), "weights", None)
        if arguments is None:
            continue
        weight = module.weight.data
        size = arguments.group_size if arguments.strategy == "group" else weight.shape[1]
        rows = weight.reshape(weight.shape[0], -1, size)
        low, high = rows.amin(2), rows.amax(2)
        if arguments.strategy == "tensor":
            low, high = low.min().reshape(1), high.max().reshape(1)
        scale, zero_point = calculate_qparams(low, high, arguments)
        module.weight_scale.data.copy_(scale)
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data.copy_(zero_point)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)


def decompressed(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights as compressed-tensors' own decompressors make them, in the scales' dtype."""
    values = transformers.AutoConfig.from_pretrained(folder).quantization_config
    keys = ("config_groups", "format", "ignore")
    config = QuantizationConfig.model_validate({key: values[key] for key in keys})
    scheme = config.config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(config.format)
    file = load_file(folder / "model.safetensors")
    for name in file:
        if name.endswith(".weight_scale"):
            module = name.removesuffix(".weight_scale")
            pieces = {
                key.rpartition(".")[2]: value
                for key, value in file.items()
                if key.rpartition(".")[0] == module
            }
            yield f"{module}.weight", compressor.decompress(pieces, scheme)["weight"]


def load(folder: Path) -> torch.nn.Module:
    """The model with its weights decompressed; activations stay float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        quantization_config=transformers.CompressedTensorsConfig(dequantize=True),
    )
    return model.eval()


def logits(session: Session, ids: list[int]) -> np.ndarray:
    return session.forward([BatchItem(session.new_sequence(), ids, "all")])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_of_their_files(scheme: str, dtype: torch.dtype, tmp_path: Path) -> None:
    save_quantized(tmp_path, scheme, dtype)
    ours = read_huggingface_checkpoint(tmp_path)
    count = 0
    for name, expected in decompressed(tmp_path):
        tensor = ours.tensors[name]
        assert expected.dtype == dtype
        # Theirs are rounded to the scale's dtype once; ours are the exact products.
        rounded = torch.from_numpy(tensor.dequantize()).to(dtype)
        assert torch.equal(rounded, expected), name
        count += 1
    assert count == 7 * SIZES["num_hidden_layers"]
    bits = SCHEMES[scheme][1]["num_bits"]
    kind = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    names = {t.encoding.name for n, t in ours.tensors.items() if n.endswith("proj.weight")}
    assert all(name.startswith(f"int{bits}_g") and kind in name.split("_") for name in names), names


@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_of_their_files(scheme: str, tmp_path: Path) -> None:
    save_quantized(tmp_path, scheme, torch.float32)
    ids = tokens(24)
    expected = oracle(load(tmp_path), ids)
    checkpoint = read_huggingface_checkpoint(tmp_path)
    assert_close(logits(reference.compile_session(checkpoint), ids), expected)
    assert_close(logits(cpu.compile_session(checkpoint, precision="f32"), ids), expected)


@pytest.mark.parametrize("scheme", ["int4-groups", "int8-channels-asymmetric"])
def test_their_files_written_again_are_theirs(scheme: str, tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    save_quantized(theirs, scheme, torch.bfloat16)
    ours.mkdir()
    write_huggingface_folder(read_huggingface_checkpoint(theirs), ours)
    one, two = load_file(theirs / "model.safetensors"), load_file(ours / "model.safetensors")
    assert set(one) == set(two)
    for name, value in one.items():
        assert value.dtype == two[name].dtype and torch.equal(value, two[name]), name


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3"])
@pytest.mark.parametrize(
    "form",
    [
        AffineFormat(4, 32, "f32", False),
        AffineFormat(4, 8, "f32", True),
        AffineFormat(8, 0, "f32", False),
        AffineFormat(3, 16, "f32", True),
    ],
)
def test_our_files_in_transformers(form: AffineFormat, family: str, tmp_path: Path) -> None:
    config = FAMILIES[family]
    checkpoint = affine_checkpoint(form, config)
    write_huggingface_folder(checkpoint, tmp_path)
    model = load(tmp_path)
    state = model.state_dict()
    for name, tensor in checkpoint.tensors.items():
        np.testing.assert_array_equal(state[name].numpy(), tensor.dequantize(), err_msg=name)
    ids = [token % config.vocab_size for token in tokens(24)]
    assert_close(logits(reference.compile_session(checkpoint), ids), oracle(model, ids))


def test_our_symmetric_files_stay_packed_in_transformers(tmp_path: Path) -> None:
    """Without ``dequantize`` their linears hold the packed words and unpack them when they run."""
    checkpoint = affine_checkpoint(AffineFormat(4, 32, "f32", False))
    write_huggingface_folder(checkpoint, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    assert "model.layers.0.mlp.up_proj.weight_packed" in model.state_dict()
    ids = tokens(24)
    assert_close(logits(reference.compile_session(checkpoint), ids), oracle(model, ids))


def test_mixed_widths_in_transformers(tmp_path: Path) -> None:
    """Each module's decompressed values, by the group that the written config gives it."""
    checkpoint = affine_checkpoint(AffineFormat(4, 32, "f32", False))
    down = "model.layers.1.mlp.down_proj.weight"
    mixed = affine_tensor(down, AffineFormat(8, 96, "f32", False), (64, 96))
    checkpoint.tensors = {**checkpoint.tensors, down: mixed}
    write_huggingface_folder(checkpoint, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = tokens(24)
    assert_close(logits(reference.compile_session(checkpoint), ids), oracle(model, ids))


def test_our_quantized_embedding_in_transformers(tmp_path: Path) -> None:
    form = AffineFormat(8, 32, "f32", False)
    checkpoint = affine_checkpoint(form)
    name = "model.embed_tokens.weight"
    rows, columns = checkpoint.tensors[name].shape
    embedding = affine_tensor(name, form, (rows, columns))
    checkpoint.tensors = {**checkpoint.tensors, name: embedding}
    write_huggingface_folder(checkpoint, tmp_path)
    model = load(tmp_path)
    np.testing.assert_array_equal(model.state_dict()[name].numpy(), embedding.dequantize())
    ids = tokens(24)
    assert_close(logits(reference.compile_session(checkpoint), ids), oracle(model, ids))
