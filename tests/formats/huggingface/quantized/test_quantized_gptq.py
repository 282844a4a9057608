"""GPTQ against its layout, read bit by bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from nybble.checkpoint.encodings.affine import AffineFormat
from nybble.checkpoint.tensor import Tensor
from nybble.errors import FormatError, UnsupportedError
from nybble.formats.huggingface.quantized import pack_quantized, quantized_tensors
from support.affine_models import affine_checkpoint, plain_tensor
from support.random_checkpoints import LLAMA

CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
K, N, G = 96, 32, 32
NAME = "a.q_proj"


def words(shape: tuple[int, ...], seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(-(2**31), 2**31, shape, dtype=np.int32)


def file_of(bits: int = 4) -> dict[str, np.ndarray]:
    scales = np.random.default_rng(1).uniform(0.01, 0.1, (K // G, N)).astype(np.float16)
    return {
        "qweight": words((K * bits // 32, N)),
        "qzeros": words((K // G, N * bits // 32)),
        "scales": scales,
        "g_idx": (np.arange(K) // G).astype(np.int32),
    }


def tensors(file: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {f"{NAME}.{piece}": plain_tensor(f"{NAME}.{piece}", array) for piece, array in file.items()}


def bits_at(column: np.ndarray, bits: int, index: int) -> int:
    number = sum(int(word) % 2**32 << (32 * i) for i, word in enumerate(column))
    return (number >> (bits * index)) % 2**bits


def expected_values(file: dict[str, np.ndarray], bits: int, add: int) -> np.ndarray:
    """(N, K), from the layout alone."""
    result = np.zeros((N, K), np.float32)
    for n in range(N):
        for k in range(K):
            g = int(file["g_idx"][k])
            code = bits_at(file["qweight"][:, n], bits, k)
            zero = bits_at(file["qzeros"][g], bits, n) + add
            result[n, k] = np.float32(code - zero) * np.float32(file["scales"][g, n])
    return result


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_layout(bits: int, version: str) -> None:
    file = file_of(bits)
    result = quantized_tensors(tensors(file), CONFIG | {"bits": bits, "checkpoint_format": version})
    assert list(result) == [f"{NAME}.weight"]
    weight = result[f"{NAME}.weight"]
    assert (weight.shape, weight.encoding.name) == ((N, K), f"int{bits}_g32_f16_z")
    expected = expected_values(file, bits, add=int(version == "gptq"))
    np.testing.assert_array_equal(weight.dequantize(), expected)


def test_layout_of_8_bits() -> None:
    file = file_of(8)
    config = CONFIG | {"bits": 8}
    weight = quantized_tensors(tensors(file), config | {"checkpoint_format": "gptq_v2"})[f"{NAME}.weight"]
    np.testing.assert_array_equal(weight.dequantize(), expected_values(file, 8, add=0))
    file["qzeros"][0, 0] = 0x7F7F7FFF
    with pytest.raises(FormatError, match=r"a.q_proj.qzeros: has a zero point of 256"):
        quantized_tensors(tensors(file), config)


def test_symmetric_needs_no_zero_points() -> None:
    file = file_of() | {"qzeros": np.full((3, 4), 0x77777777, np.int32)}
    assert quantized_tensors(tensors(file), CONFIG)[f"{NAME}.weight"].encoding.name == "int4_g32_f16"
    v2 = CONFIG | {"checkpoint_format": "gptq_v2"}
    assert quantized_tensors(tensors(file), v2)[f"{NAME}.weight"].encoding.name == "int4_g32_f16_z"


def test_without_g_idx_and_with_whole_rows() -> None:
    file = {piece: array for piece, array in file_of().items() if piece != "g_idx"}
    file |= {"qzeros": file["qzeros"][:1], "scales": file["scales"][:1]}
    weight = quantized_tensors(tensors(file), CONFIG | {"group_size": -1})[f"{NAME}.weight"]
    assert weight.encoding.name == "int4_g96_f16_z"


@pytest.mark.parametrize("static_groups", [False, True])
def test_act_order(static_groups: bool) -> None:
    file = file_of()
    order = np.random.default_rng(9).permutation(K)
    file["g_idx"] = (order // G if not static_groups else np.arange(K) // G).astype(np.int32)
    result = quantized_tensors(tensors(file), CONFIG | {"desc_act": True, "static_groups": static_groups})
    values = result[f"{NAME}.weight"].dequantize()
    if static_groups:  # the order was used while quantizing and is forgotten
        assert list(result) == [f"{NAME}.weight"]
    else:
        permutation = result[f"{NAME}.input_permutation"]
        assert (permutation.encoding.name, permutation.shape) == ("i32", (K,))
        restored = np.empty_like(values)
        restored[:, permutation.data.view("<i4")] = values
        values = restored
    np.testing.assert_array_equal(values, expected_values(file, 4, add=1))


def test_words_of_gptqmodel_are_carried() -> None:
    """It writes zero points less one word by word: 0 borrows from its neighbour, and adding gives it back."""
    zeros = np.random.default_rng(5).integers(0, 16, (3, N))
    packed = np.zeros((3, N // 8), np.int64)
    for n in range(N):
        packed[:, n // 8] |= zeros[:, n] << (4 * (n % 8))
    stored = ((packed - 0x11111111) % 2**32).astype(np.uint32).view(np.int32)
    file = file_of() | {"qzeros": stored}
    config = CONFIG | {"meta": {"quantizer": ["optimum:1.2", "gptqmodel:1.4"]}}
    weight = quantized_tensors(tensors(file), config)[f"{NAME}.weight"]
    plain = file | {"qzeros": packed.astype(np.uint32).view(np.int32)}
    np.testing.assert_array_equal(weight.dequantize(), expected_values(plain, 4, add=0))


def test_dynamic_widths() -> None:
    file = file_of(8)
    rules = {"-:.*down.*": {}, "+:.*k_proj": {"bits": 2}, r"a\.q_proj$": {"bits": 8, "group_size": 32}}
    config = CONFIG | {"dynamic": rules, "checkpoint_format": "gptq_v2", "group_size": 64}
    assert quantized_tensors(tensors(file), config)[f"{NAME}.weight"].encoding.name == "int8_g32_f16_z"


@pytest.mark.parametrize("pattern", ["(a+)+$", "a" * 2000, ".*.*.*.*.*.*.*.*", "(x*){9}"])
def test_patterns_that_never_end_are_refused(pattern: str) -> None:
    with pytest.raises(UnsupportedError, match="too complex"):
        quantized_tensors(tensors(file_of()), CONFIG | {"dynamic": {pattern: {"bits": 2}}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qzeros": None}, "a.q_proj.qzeros: is missing"),
        ({"qweight": None}, "a.q_proj.qweight: is missing"),
        ({"qweight": words((13, N))}, r"a.q_proj.qweight: shape \(13, 32\) does not fit 4 bits"),
        ({"qweight": words((12, 30))}, r"a.q_proj.qweight: shape \(12, 30\) does not fit 4 bits"),
        (
            {"scales": np.ones((2, N), np.float16)},
            r"a.q_proj.scales: .*\(3, 32\), found f16 of shape \(2, 32\)",
        ),
        ({"scales": np.ones((3, N), np.int32)}, "a.q_proj.scales: expected f16 or bf16 or f32"),
        ({"g_idx": np.zeros(95, np.int32)}, r"a.q_proj.g_idx: expected .*\(96,\)"),
        ({"g_idx": np.zeros(K, np.int32)}, "a.q_proj.g_idx: gives group 0 96 columns instead of 32"),
        ({"g_idx": np.arange(K, dtype=np.int32)}, r"a.q_proj.g_idx: holds 0 .. 95; there are 3 groups"),
        ({"g_idx": np.full(K, -1, np.int32)}, r"a.q_proj.g_idx: holds -1"),
        ({"weight": np.zeros((N, K), np.float16)}, "both quantized and not"),
    ],
)
def test_defects_are_named(change: dict[str, np.ndarray | None], message: str) -> None:
    file = {piece: array for piece, array in (file_of() | change).items() if array is not None}
    with pytest.raises(FormatError, match=message):
        quantized_tensors(tensors(file), CONFIG)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoint_format": "marlin"}, "known: gptq, gptq_v2"),
        ({"bits": 5}, "bits is 5"),
    ],
)
def test_what_is_not_supported(change: dict[str, object], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        quantized_tensors(tensors(file_of()), CONFIG | change)


def test_zero_biases_that_the_model_has_not_are_dropped() -> None:
    file = file_of()
    raw = {
        name.replace(NAME, module): tensor
        for module in ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj")
        for name, tensor in tensors(file | {"bias": np.zeros(N, np.float16)}).items()
    }
    with_bias = replace(LLAMA, attention_bias=True)
    biases = [
        [name for name in quantized_tensors(raw, CONFIG, config) if name.endswith("bias")]
        for config in (None, LLAMA, with_bias)
    ]
    q, o = "model.layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.o_proj.bias"
    assert biases == [[q, o], [], [q]]
    raw[o] = plain_tensor(o, np.ones(N, np.float16))
    assert o in quantized_tensors(raw, CONFIG, LLAMA)


@pytest.mark.parametrize(
    ("form", "zero_points", "version"),
    [
        (AffineFormat(4, 32, "f16", False), None, "gptq"),
        (AffineFormat(3, 32, "f16", False), None, "gptq_v2"),  # programs disagree about gptq's 3 bits
        (AffineFormat(4, 32, "f16", True), (0, 15), "gptq_v2"),
    ],
)
def test_format_written(form: AffineFormat, zero_points: tuple[int, int] | None, version: str) -> None:
    _, config = pack_quantized(affine_checkpoint(form, zero_points=zero_points), "gptq")
    assert config == {
        "quant_method": "gptq", "bits": form.bits, "group_size": 32, "desc_act": False,
        "sym": not form.has_zero_point, "lm_head": False, "checkpoint_format": version,
    }  # fmt: skip


def test_a_file_of_format_gptq_stays_one() -> None:
    checkpoint = affine_checkpoint(AffineFormat(4, 32, "f16", True), zero_points=(1, 16))
    checkpoint.metadata = {"huggingface.config": {"quantization_config": CONFIG}}
    raw, config = pack_quantized(checkpoint, "gptq")
    assert config["checkpoint_format"] == "gptq"
    again = quantized_tensors(raw, config)
    for name, tensor in checkpoint.tensors.items():
        np.testing.assert_array_equal(again[name].data, tensor.data)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (AffineFormat(4, 32, "f32", False), "float16 or bfloat16 scales"),
        (AffineFormat(4, 32, "f16", True), "zero points 0 to 15 in this format; one here is 16"),
    ],
)
def test_what_gptq_cannot_hold(form: AffineFormat, message: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"q_proj.weight .*{message}"):
        raw, _ = pack_quantized(affine_checkpoint(form, zero_points=(16, 16)), "gptq")
        _ = raw["model.layers.0.self_attn.q_proj.qzeros"].data


def test_plain_linears_are_excluded_by_name() -> None:
    checkpoint = affine_checkpoint(AffineFormat(4, 32, "f16", False))
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = dict(checkpoint.tensors)
    tensors[name] = plain_tensor(name, tensors[name].dequantize())
    checkpoint.tensors = tensors
    _, config = pack_quantized(checkpoint, "gptq")
    assert config["dynamic"] == {r"-:^model\.layers\.1\.mlp\.up_proj$": {}}
    _, config = pack_quantized(checkpoint, "awq")
    assert config["modules_to_not_convert"] == ["model.layers.1.mlp.up_proj", "lm_head"]
