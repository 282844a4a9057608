"""Affine weights packed and read back: the same bytes, for every shape that a packing holds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.encodings.affine import AffineFormat
from nybble.checkpoint.tensor import Tensor
from nybble.devices import reference
from nybble.errors import UnsupportedError
from nybble.formats.huggingface.quantized import METHODS, pack_quantized, quantized_tensors
from nybble.graph.reference import gather_columns
from support.affine_models import (
    affine_checkpoint,
    affine_tensor,
    checkpoint_with_minima,
    permutation_tensor,
)
from support.random_checkpoints import LLAMA, largest_difference, random_checkpoint, run, tokens

WEIGHT, ORDER = "a.q_proj.weight", "a.q_proj.input_permutation"
LIMITS = {"awq": ([4], ["f16"]), "gptq": ([2, 3, 4, 8], ["f16", "bf16"])}


def with_tensors(*tensors: Tensor) -> Checkpoint:
    return Checkpoint(LLAMA, {tensor.name: tensor for tensor in tensors})


@st.composite
def weights(draw: st.DrawFn, method: str) -> Tensor:
    bits, scales = LIMITS.get(method, ([2, 3, 4, 8], ["f16", "bf16", "f32"]))
    form = AffineFormat(
        draw(st.sampled_from(bits)),
        draw(st.sampled_from([8, 32, 64, 96])),
        draw(st.sampled_from(scales)),
        draw(st.booleans()),
    )
    rows = draw(st.integers(1, 3)) * {"awq": 8, "gptq": 32}.get(method, 1)
    columns = draw(st.integers(1, 3)) * form.group_size
    if method == "gptq":
        columns *= 32 // np.gcd(32, form.group_size)
    return affine_tensor(WEIGHT, form, (rows, columns), draw(st.integers(0, 2**32 - 1)))


@pytest.mark.parametrize("method", METHODS)
@given(data=st.data())
def test_any_weight_comes_back(method: str, data: st.DataObject) -> None:
    tensor = data.draw(weights(method))
    raw, config = pack_quantized(with_tensors(tensor), method)
    for piece in raw.values():
        assert piece.data.shape == (piece.nbytes,)
        assert piece.encoding.name in ("i32", "i64", "f16", "bf16", "f32")
    back = quantized_tensors(raw, config)
    assert list(back) == [WEIGHT]
    assert back[WEIGHT].shape == tensor.shape
    if back[WEIGHT].encoding is tensor.encoding:
        np.testing.assert_array_equal(back[WEIGHT].data, tensor.data)
    else:  # all zero points happened to be the middle
        assert back[WEIGHT].encoding.name + "_z" == tensor.encoding.name
        np.testing.assert_array_equal(back[WEIGHT].dequantize(), tensor.dequantize())


@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 4, 8]), st.integers(1, 4))
def test_act_order_comes_back(seed: int, bits: int, groups: int) -> None:
    """The order within a group is free: the linear is what must stay."""
    tensor = affine_tensor(WEIGHT, AffineFormat(bits, 32, "f16", True), (32, 32 * groups), seed)
    order = permutation_tensor(ORDER, 32 * groups, seed)
    raw, config = pack_quantized(with_tensors(tensor, order), "gptq")
    assert config["desc_act"] is True and ORDER not in raw
    back = quantized_tensors(raw, config)

    def applied(tensors: dict[str, Tensor]) -> np.ndarray:
        x = np.arange(32 * groups, dtype=np.float32)[None]  # whole numbers: sums are exact in float64
        if ORDER in tensors:
            x = gather_columns(x, tensors[ORDER].data.view("<i4"))
        return x.astype(np.float64) @ tensors[WEIGHT].dequantize().astype(np.float64).T

    np.testing.assert_array_equal(applied(dict(back)), applied({WEIGHT: tensor, ORDER: order}))
    again, _ = pack_quantized(with_tensors(*back.values()), "gptq")
    for name in raw:
        np.testing.assert_array_equal(again[name].data, raw[name].data)


@pytest.mark.parametrize("group_size", [32, 0])
@pytest.mark.parametrize("method", METHODS)
def test_models_come_back(method: str, group_size: int) -> None:
    checkpoint = affine_checkpoint(AffineFormat(4, group_size, "f16", True))
    raw, config = pack_quantized(checkpoint, method)
    back = quantized_tensors(raw, config, LLAMA)
    assert sorted(back) == sorted(checkpoint.tensors)
    for name, tensor in checkpoint.tensors.items():
        assert back[name].encoding is tensor.encoding, name
        np.testing.assert_array_equal(back[name].data, tensor.data)


def test_act_order_models_give_the_same_logits() -> None:
    checkpoint = affine_checkpoint(AffineFormat(4, 32, "f16", True), act_order=True)
    expected = run(reference.compile_session(checkpoint), tokens(12))
    raw, config = pack_quantized(checkpoint, "gptq")
    checkpoint.tensors = quantized_tensors(raw, config, LLAMA)
    assert any(name.endswith("input_permutation") for name in checkpoint.tensors)
    result = run(reference.compile_session(checkpoint), tokens(12))
    assert largest_difference(result, expected) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_is_taken_apart_once(method: str) -> None:
    tensor = affine_tensor(WEIGHT, AffineFormat(4, 32, "f16", True), (32, 64))
    reads = []

    def data() -> np.ndarray:
        reads.append(1)
        return tensor.data

    raw, _ = pack_quantized(with_tensors(tensor.changed(data=data)), method)
    assert not reads
    for piece in raw.values():
        _ = piece.data
    assert len(reads) == 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([], "no tensor of the model is quantized"),
        ([permutation_tensor(ORDER, 8)], f"{ORDER}: belongs to no quantized weight"),
        (
            [affine_tensor("a.q_proj.bias", AffineFormat(4, 32, "f16", False), (8, 32))],
            "a.q_proj.bias: .* packs the weights of linears only",
        ),
    ],
)
def test_checkpoints_without_such_weights(method: str, tensors: list[Tensor], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        pack_quantized(with_tensors(*tensors), method)


@pytest.mark.parametrize("method", METHODS)
def test_block_types_are_refused(method: str) -> None:
    checkpoint = random_checkpoint(LLAMA, weights="q4_0")
    with pytest.raises(UnsupportedError, match=r"proj.weight: q4_0 has no place in a"):
        pack_quantized(checkpoint, method)


@pytest.mark.parametrize("method", METHODS)
def test_minima_are_refused(method: str) -> None:
    checkpoint = checkpoint_with_minima(random_checkpoint(LLAMA), "int4_g32_f16_m", layers_only=True)
    with pytest.raises(UnsupportedError, match=r"proj.weight \(int4_g32_f16_m\): .* whole zero points"):
        pack_quantized(checkpoint, method)


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_one_group_size_for_all(method: str) -> None:
    form = AffineFormat(4, 32, "f16", False)
    one = affine_tensor(WEIGHT, form, (32, 64))
    other = affine_tensor("a.o_proj.weight", AffineFormat(4, 64, "f16", False), (32, 128))
    with pytest.raises(UnsupportedError, match=rf"a.o_proj.weight .*one group size .*{WEIGHT} has 32"):
        pack_quantized(with_tensors(one, other), method)
    embedding = affine_tensor("model.embed_tokens.weight", form, (32, 64))
    with pytest.raises(UnsupportedError, match=r"model.embed_tokens.weight .*linears"):
        pack_quantized(with_tensors(embedding), method)


def test_unknown_method() -> None:
    with pytest.raises(ValueError, match="method is one of awq, gptq, compressed-tensors, not 'fp8'"):
        pack_quantized(with_tensors(), "fp8")
