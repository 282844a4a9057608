"""AWQ against its layout, read nibble by nibble."""

from __future__ import annotations

import numpy as np
import pytest

from nybble.checkpoint.encodings.affine import AffineFormat
from nybble.errors import FormatError, UnsupportedError
from nybble.formats.huggingface.quantized import pack_quantized, quantized_tensors
from support.affine_models import affine_checkpoint, plain_tensor

CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
RANDOM = np.random.default_rng(2)
K, N, G = 96, 24, 32


def words(*shape: int) -> np.ndarray:
    return RANDOM.integers(-(2**31), 2**31, shape, dtype=np.int32)


def nibble(word: int, place: int) -> int:
    return (int(word) >> (4 * place)) & 15


def gemm_file() -> dict[str, np.ndarray]:
    scales = RANDOM.uniform(0.01, 0.1, (K // G, N)).astype(np.float16)
    return {"qweight": words(K, N // 8), "qzeros": words(K // G, N // 8), "scales": scales}


def tensors(file: dict[str, np.ndarray], module: str = "a.q_proj"):
    return {f"{module}.{piece}": plain_tensor(f"{module}.{piece}", array) for piece, array in file.items()}


def test_gemm_layout() -> None:
    file = gemm_file()
    result = quantized_tensors(tensors(file), CONFIG)
    assert list(result) == ["a.q_proj.weight"]
    weight = result["a.q_proj.weight"]
    assert (weight.shape, weight.encoding.name) == ((N, K), "int4_g32_f16_z")
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # the feature of each nibble
    expected = np.zeros((N, K), np.float32)
    for k in range(K):
        for word in range(N // 8):
            for place, feature in enumerate(order):
                n = word * 8 + feature
                code = nibble(file["qweight"][k, word], place)
                zero = nibble(file["qzeros"][k // G, word], place)
                expected[n, k] = np.float32(code - zero) * np.float32(file["scales"][k // G, n])
    np.testing.assert_array_equal(weight.dequantize(), expected)


def test_gemv_layout() -> None:
    # 3 groups of 32 take one word, filled up to four
    scales = RANDOM.uniform(0.01, 0.1, (N, 32)).astype(np.float16)
    file = {"qweight": words(N, K // 8), "qzeros": words(N, 4), "scales": scales}
    weight = quantized_tensors(tensors(file), CONFIG | {"version": "GEMV"})["a.q_proj.weight"]
    expected = np.zeros((N, K), np.float32)
    for n in range(N):
        for k in range(K):
            code, zero = nibble(file["qweight"][n, k // 8], k % 8), nibble(file["qzeros"][n, 0], k // G)
            expected[n, k] = np.float32(code - zero) * np.float32(scales[n, k // G])
    np.testing.assert_array_equal(weight.dequantize(), expected)


def test_whole_rows_and_symmetric_zero_points() -> None:
    file = gemm_file() | {"qzeros": np.full((1, N // 8), -0x77777778, np.int32)}
    file["scales"] = file["scales"][:1]
    weight = quantized_tensors(tensors(file), CONFIG | {"group_size": -1})["a.q_proj.weight"]
    assert weight.encoding.name == "int4_g96_f16"


def test_other_tensors_keep_their_order() -> None:
    norm = plain_tensor("norm.weight", np.ones(4, np.float32))
    bias = plain_tensor("a.q_proj.bias", np.ones(N, np.float16))
    raw = {"norm.weight": norm, **tensors(gemm_file()), "a.q_proj.bias": bias}
    result = quantized_tensors(raw, CONFIG)
    assert list(result) == ["norm.weight", "a.q_proj.weight", "a.q_proj.bias"]
    np.testing.assert_array_equal(result["norm.weight"].data, norm.data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qzeros": None}, r"a.q_proj.qzeros: is missing beside"),
        ({"scales": None}, r"a.q_proj.scales: is missing beside"),
        ({"qweight": None}, r"a.q_proj.qweight: is missing beside"),
        ({"qweight": words(K, 2)}, r"a.q_proj.scales: expected .* shape \(3, 16\), found f16 .* \(3, 24\)"),
        ({"qweight": words(80, 3)}, r"a.q_proj.qweight: 80 input features are not whole groups of 32"),
        ({"qweight": words(96)}, r"a.q_proj.qweight: expected i32 matrix"),
        ({"qzeros": words(3, 4)}, r"a.q_proj.qzeros: expected i32 of shape \(3, 3\)"),
        ({"qzeros": np.zeros((3, 3), np.int64)}, r"a.q_proj.qzeros: expected i32 .* found i64"),
        ({"weight": np.zeros((N, K), np.float16)}, r"a.q_proj.weight: is there both quantized and not"),
    ],
)
def test_defects_are_named(change: dict[str, np.ndarray | None], message: str) -> None:
    file = {piece: array for piece, array in (gemm_file() | change).items() if array is not None}
    with pytest.raises(FormatError, match=message):
        quantized_tensors(tensors(file), CONFIG)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "gemv_fast"}, "gemv_fast, whose zero points"),
        ({"version": "marlin"}, "known: gemm, gemv"),
        ({"bits": 3}, "bits is 3; AWQ has 4"),
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes'; known: awq, gptq, compressed-tensors"),
    ],
)
def test_what_is_not_supported(change: dict[str, object], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        quantized_tensors(tensors(gemm_file()), CONFIG | change)


@pytest.mark.parametrize(
    ("form", "options", "message"),
    [
        (AffineFormat(8, 32, "f16", False), {}, "int8_g32_f16.: AWQ has 4 bits only"),
        (AffineFormat(4, 32, "bf16", False), {}, "AWQ has float16 scales"),
        (AffineFormat(4, 32, "f16", False), {"act_order": True}, "q_proj.weight .*act-order"),
    ],
)
def test_what_awq_cannot_hold(form: AffineFormat, options: dict[str, bool], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        pack_quantized(affine_checkpoint(form, **options), "awq")


def test_zero_points_out_of_range_are_refused_when_written() -> None:
    checkpoint = affine_checkpoint(AffineFormat(4, 32, "f16", True), zero_points=(16, 16))
    raw, _ = pack_quantized(checkpoint, "awq")
    with pytest.raises(UnsupportedError, match=r"q_proj.weight .*zero points of 4 bits; one here is 16"):
        _ = raw["model.layers.0.self_attn.q_proj.qzeros"].data


def test_config() -> None:
    checkpoint = affine_checkpoint(AffineFormat(4, 32, "f16", True))
    raw, config = pack_quantized(checkpoint, "awq")
    assert config == CONFIG
    assert raw["model.layers.0.mlp.down_proj.qweight"].shape == (96, 8)
    assert "model.embed_tokens.weight" in raw
