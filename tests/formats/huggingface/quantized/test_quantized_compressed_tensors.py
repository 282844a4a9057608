"""compressed-tensors against its layout."""

from __future__ import annotations

import numpy as np
import pytest

from nybble.checkpoint.encodings.affine import AffineFormat
from nybble.checkpoint.tensor import Tensor
from nybble.errors import FormatError, UnsupportedError
from nybble.formats.huggingface.quantized import pack_quantized, quantized_tensors, unused_settings
from support.affine_models import affine_checkpoint, affine_tensor, plain_tensor

N, K, G = 10, 64, 32
NAME = "a.q_proj"
RANDOM = np.random.default_rng(4)


def config_of(weights: dict[str, object], kind: str = "pack-quantized", **more: object) -> dict[str, object]:
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", **weights}}
    return {
        "quant_method": "compressed-tensors", "format": kind, "config_groups": {"group_0": group | more},
        "ignore": ["lm_head"],
    }  # fmt: skip


GROUPS = {"strategy": "group", "group_size": G, "symmetric": False}


def packed_by_hand(codes: np.ndarray, bits: int) -> np.ndarray:
    rows = []
    for row in codes:
        number = sum(int(code) << (bits * i) for i, code in enumerate(row))
        count = -(-len(row) * bits // 32)
        rows.append([(number >> (32 * i)) & 0xFFFFFFFF for i in range(count)])
    return np.array(rows, np.uint32).view(np.int32)


def packed_file(bits: int, groups: int, *, zeros: bool) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """A file and its values."""
    codes = RANDOM.integers(0, 2**bits, (N, K))
    points = RANDOM.integers(0, 2**bits, (N, groups)) if zeros else np.full((N, groups), 2 ** (bits - 1))
    scales = RANDOM.uniform(0.01, 0.1, (N, groups)).astype(np.float32)
    file = {
        "weight_packed": packed_by_hand(codes, bits),
        "weight_scale": scales,
        "weight_shape": np.array([N, K]),
    }
    if zeros:
        file["weight_zero_point"] = packed_by_hand(points.T, bits).T
    size = K // groups
    difference = (codes - np.repeat(points, size, axis=1)).astype(np.float32)
    return file, difference * np.repeat(scales, size, axis=1)


def tensors(file: dict[str, np.ndarray], module: str = NAME) -> dict[str, Tensor]:
    return {f"{module}.{piece}": plain_tensor(f"{module}.{piece}", array) for piece, array in file.items()}


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packed(bits: int, groups: int, zeros: bool) -> None:
    file, values = packed_file(bits, groups, zeros=zeros)
    strategy = {"strategy": "channel"} if groups == 1 else {"strategy": "group", "group_size": G}
    config = config_of({"num_bits": bits, "symmetric": not zeros, **strategy})
    result = quantized_tensors(tensors(file), config)
    assert list(result) == [f"{NAME}.weight"]
    assert result[f"{NAME}.weight"].encoding.name == f"int{bits}_g{K // groups}_f32{'_z' * zeros}"
    np.testing.assert_array_equal(result[f"{NAME}.weight"].dequantize(), values)


@pytest.mark.parametrize("kind", ["int-quantized", "naive-quantized"])
@pytest.mark.parametrize(
    ("strategy", "shape"),
    [("channel", (N, 1)), ("channel", (N,)), ("tensor", (1,)), ("tensor", ()), ("group", (N, 2))],
)
def test_plain(kind: str, strategy: str, shape: tuple[int, ...]) -> None:
    weight = RANDOM.integers(-128, 128, (N, K)).astype(np.int8)
    scale = RANDOM.uniform(0.01, 0.1, shape).astype(np.float16)
    zero = RANDOM.integers(-128, 128, shape).astype(np.int8)
    file = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    more = {"group_size": G} if strategy == "group" else {}
    config = config_of({"num_bits": 8, "strategy": strategy, "symmetric": False, **more}, kind)
    result = quantized_tensors(tensors(file), config)[f"{NAME}.weight"]

    def spread(values: np.ndarray) -> np.ndarray:
        columns = values.reshape(-1, 2 if strategy == "group" else 1)
        return np.repeat(columns, K // columns.shape[1], axis=1).astype(np.float32)

    expected = (weight.astype(np.float32) - spread(zero)) * spread(scale)
    np.testing.assert_array_equal(result.dequantize(), expected)
    config = config_of({"num_bits": 8, "strategy": strategy, **more}, kind)
    del file["weight_zero_point"]
    result = quantized_tensors(tensors(file), config)[f"{NAME}.weight"]
    assert not result.encoding.name.endswith("_z")
    np.testing.assert_array_equal(result.dequantize(), weight.astype(np.float32) * spread(scale))


def test_plain_of_4_bits() -> None:
    weight = RANDOM.integers(-8, 8, (N, K)).astype(np.int8)
    file = {"weight": weight, "weight_scale": np.ones((N, 1), np.float32)}
    config = config_of({"strategy": "channel"}, "naive-quantized")
    result = quantized_tensors(tensors(file), config)[f"{NAME}.weight"]
    assert result.encoding.name == "int4_g64_f32"
    np.testing.assert_array_equal(result.dequantize(), weight.astype(np.float32))
    weight[3, 4] = 8
    result = quantized_tensors(tensors(file), config)[f"{NAME}.weight"]
    with pytest.raises(FormatError, match=rf"{NAME}.weight: holds -8 .. 8, which is not 4 bits"):
        _ = result.data


def test_act_order() -> None:
    file, values = packed_file(4, 2, zeros=False)
    plain = quantized_tensors(tensors(file), config_of(GROUPS | {"symmetric": True}))
    index = RANDOM.permutation(np.arange(K) // G).astype(np.int32)
    result = quantized_tensors(
        tensors(file | {"weight_g_idx": index}), config_of(GROUPS | {"symmetric": True, "actorder": "group"})
    )
    columns = result[f"{NAME}.input_permutation"].data.view("<i4")
    codes = values / np.repeat(file["weight_scale"], G, axis=1)  # of the columns as stored
    expected = codes * file["weight_scale"][:, index]
    np.testing.assert_allclose(result[f"{NAME}.weight"].dequantize(), expected[:, columns], rtol=1e-6)
    unset = quantized_tensors(
        tensors(file | {"weight_g_idx": np.full(K, -1, np.int32)}), config_of(GROUPS | {"symmetric": True})
    )
    assert list(unset) == [f"{NAME}.weight"]
    np.testing.assert_array_equal(unset[f"{NAME}.weight"].data, plain[f"{NAME}.weight"].data)


def test_settings_that_do_not_change_weights() -> None:
    weight = RANDOM.integers(-128, 128, (N, K)).astype(np.int8)
    file = {
        "weight": weight,
        "weight_scale": np.ones((N, 1), np.float32),
        "input_scale": np.ones(1, np.float32),
        "input_zero_point": np.zeros(1, np.int8),
    }
    config = config_of(
        {"num_bits": 8, "strategy": "channel"}, "int-quantized", input_activations={"num_bits": 8}
    ) | {"kv_cache_scheme": {"num_bits": 8}}
    raw = tensors(file) | {"a.k_scale": plain_tensor("a.k_scale", np.ones(1, np.float32))}
    result = quantized_tensors(raw, config)
    assert list(result) == [f"{NAME}.weight"]
    assert unused_settings(config) == ("input_activations", "kv_cache_scheme")
    assert unused_settings(config_of(GROUPS)) == ()


def test_groups_by_name_pattern_and_class() -> None:
    file4, values4 = packed_file(4, 1, zeros=False)
    file8, values8 = packed_file(8, 1, zeros=False)
    file2, values2 = packed_file(2, 1, zeros=False)

    def group(bits: int, *targets: str) -> dict[str, object]:
        weights = {"num_bits": bits, "type": "int", "strategy": "channel"}
        return {"targets": list(targets), "weights": weights, "format": "pack-quantized"}

    config = config_of({}, "mixed-precision") | {
        "config_groups": {"a": group(4, "Linear"), "b": group(8, "re:.*down"), "c": group(2, "x.down")}
    }
    raw = tensors(file4, "x.up") | tensors(file8, "y.down") | tensors(file2, "x.down")
    result = quantized_tensors(raw, config)
    for name, values in {"x.up": values4, "y.down": values8, "x.down": values2}.items():
        np.testing.assert_array_equal(result[f"{name}.weight"].dequantize(), values)
    with pytest.raises(FormatError, match=r"model.embed_tokens: is quantized, but no group"):
        quantized_tensors(tensors(file4, "model.embed_tokens"), config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_scale": None}, "a.q_proj.weight_scale: is missing"),
        ({"weight_packed": None}, "a.q_proj.weight_packed: is missing"),
        ({"weight_shape": None}, "a.q_proj.weight_shape: is missing"),
        ({"weight_zero_point": None}, "a.q_proj.weight_zero_point: is missing"),
        ({"weight_shape": np.array([N, 2 * K])}, "cannot hold 10 x 128 codes"),
        ({"weight_shape": np.array([N, -K])}, "cannot hold 10 x -64 codes"),
        ({"weight_shape": np.array([N])}, r"a.q_proj.weight_shape: expected .*\(2,\)"),
        ({"weight_scale": np.ones((N, 3), np.float32)}, r"a.q_proj.weight_scale: .*\(10, 2\)"),
        ({"weight_zero_point": np.zeros((N, 2), np.int32)}, r"a.q_proj.weight_zero_point: .*\(2, 2\)"),
        ({"weight": np.zeros((N, K), np.float16)}, "both quantized and not|does not belong"),
        ({"weight_g_idx": np.zeros(K, np.int32)}, "gives group 0 64 columns"),
    ],
)
def test_defects_are_named(change: dict[str, np.ndarray | None], message: str) -> None:
    file, _ = packed_file(4, 2, zeros=True)
    changed = {piece: array for piece, array in (file | change).items() if array is not None}
    with pytest.raises(FormatError, match=message):
        quantized_tensors(tensors(changed), config_of(GROUPS))


def test_integers_need_a_scale() -> None:
    raw = tensors({"weight": np.zeros((N, K), np.int8)})
    with pytest.raises(FormatError, match=r"a.q_proj.weight_scale: is missing beside"):
        quantized_tensors(raw, config_of({"num_bits": 8, "strategy": "channel"}, "int-quantized"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (config_of({"num_bits": 8, "type": "float"}, "float-quantized"), "'float-quantized' of type 'float'"),
        (config_of({"type": "float"}, "nvfp4-pack-quantized"), "known: pack-quantized, int-quantized"),
        (config_of({}, "dense"), "is 'dense'"),
        (config_of({"num_bits": 5}), "num_bits is 5"),
        (config_of({"strategy": "block"}), "strategy is 'block'"),
        (config_of({}) | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
        (config_of({}) | {"transform_config": {"config_groups": {"u": {}}}}, "rotations"),
        (config_of({}) | {"config_groups": {"W4A16": ["Linear"]}}, "preset"),
    ],
)
def test_what_is_not_supported(config: dict[str, object], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        quantized_tensors({}, config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (config_of({"strategy": "group"}), "group_size"),
        (config_of({"strategy": "channel", "group_size": 32}), "does not fit the strategy"),
        (config_of({}) | {"config_groups": {}}, "at least one group"),
        (config_of({}) | {"config_groups": {"a": {"targets": [1], "weights": {}}}}, "targets"),
        (config_of({}) | {"config_groups": {"a": {"targets": [], "weights": None}}}, "quantizes no weights"),
    ],
)
def test_bad_configs(config: dict[str, object], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        quantized_tensors({}, config)


def test_config_written() -> None:
    checkpoint = affine_checkpoint(AffineFormat(4, 32, "bf16", False))
    raw, config = pack_quantized(checkpoint, "compressed-tensors")
    weights = {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32,
        "dynamic": False,
    }  # fmt: skip
    group = {
        "targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None,
    }  # fmt: skip
    assert config == {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "quantization_status": "compressed", "config_groups": {"group_0": group}, "ignore": ["lm_head"],
        "kv_cache_scheme": None, "global_compression_ratio": None,
    }  # fmt: skip
    assert raw["model.layers.0.self_attn.q_proj.weight_scale"].encoding.name == "bf16"
    down = "model.layers.0.mlp.down_proj.weight"
    mixed = affine_tensor(down, AffineFormat(8, 96, "f32", True), (64, 96))
    checkpoint.tensors = {**checkpoint.tensors, down: mixed}
    _, config = pack_quantized(checkpoint, "compressed-tensors")
    groups = config["config_groups"]
    assert isinstance(groups, dict)
    assert len(groups["group_0"]["targets"]) == 3 * 7 - 1
    assert groups["group_1"]["targets"] == [down.removesuffix(".weight")]
    assert groups["group_1"]["weights"]["strategy"] == "channel"


def test_what_it_cannot_hold() -> None:
    checkpoint = affine_checkpoint(AffineFormat(4, 32, "f16", True), act_order=True)
    with pytest.raises(UnsupportedError, match=r"q_proj.weight .*act-order"):
        pack_quantized(checkpoint, "compressed-tensors")
    checkpoint = affine_checkpoint(AffineFormat(4, 32, "f16", True), zero_points=(16, 16))
    raw, _ = pack_quantized(checkpoint, "compressed-tensors")
    with pytest.raises(UnsupportedError, match=r"q_proj.weight .*one here is 16"):
        _ = raw["model.layers.0.self_attn.q_proj.weight_zero_point"].data


def test_pieces_come_in_any_order() -> None:
    """The weight of the plain formats has the name of the result: it is no second one."""
    weight = RANDOM.integers(-128, 128, (N, K)).astype(np.int8)
    file = {"weight_scale": np.ones((N, 1), np.float32), "weight": weight}
    config = config_of({"num_bits": 8, "strategy": "channel"}, "int-quantized")
    result = quantized_tensors(tensors(file), config)
    np.testing.assert_array_equal(result[f"{NAME}.weight"].dequantize(), weight.astype(np.float32))
