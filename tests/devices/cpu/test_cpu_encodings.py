"""The CPU device with weights and KV caches in every encoding that its kernels know."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from nybble import _core
from nybble.checkpoint.encodings import ENCODINGS
from nybble.devices import cpu, reference
from nybble.devices.base import BatchItem
from nybble.devices.reference import session as reference_session
from nybble.errors import DeviceError
from support.random_checkpoints import (
    LLAMA,
    Floats,
    encoded,
    largest_difference,
    random_checkpoint,
    relative_error,
    rope,
    run,
    tokens,
)


def _native(name: str) -> bool:
    try:
        _core.encoding_kernels(name)
    except ValueError:
        return False
    return True


NATIVE = [name for name in ENCODINGS if _native(name)]
ROWS = (1, 2, 3, 4, 5, 8, 16, 17, 33)
BLOCKS = replace(
    LLAMA,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=1,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
    rope=rope(32),
    tie_word_embeddings=True,
    vocab_size=103,
)


@pytest.mark.parametrize("name", NATIVE)
def test_weights(name: str) -> None:
    """Prompts of every kind of length, logits of all rows."""
    # Large enough codes of random scales: with 256 columns an embedding row has unit deviation.
    checkpoint = random_checkpoint(BLOCKS, weights=name, embeddings=name)
    plain = reference.compile_session(checkpoint)
    exact = cpu.compile_session(checkpoint, precision="f32", threads=2)
    fast = cpu.compile_session(checkpoint, threads=2)
    for rows in ROWS:
        ids = tokens(rows, seed=rows)
        expected = run(plain, ids)
        assert largest_difference(run(exact, ids), expected) < 1e-4, rows
        # 5 linears in a row at half a percent each (test_cpu_parity.fast_bound), doubled.
        assert relative_error(run(fast, ids), expected) < 2 * 0.005 * 5**0.5, rows


@pytest.mark.parametrize("name", NATIVE)
def test_embeddings_are_the_definition(name: str) -> None:
    """A model without layers that see: its logits are those of float32 weights with the same values."""
    checkpoint = random_checkpoint(BLOCKS, embeddings=name)
    tensor = checkpoint.tensors["model.embed_tokens.weight"]
    plain = ENCODINGS["f32"]
    same = tensor.changed(encoding=plain, data=tensor.dequantize().reshape(-1).view(np.uint8))
    other = replace(checkpoint, tensors={**checkpoint.tensors, tensor.name: same})
    ids = tokens(20)
    one, two = (run(cpu.compile_session(c, precision="f32"), ids) for c in (checkpoint, other))
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("level", _core.isa_levels())
@pytest.mark.parametrize("name", NATIVE)
def test_products_of_every_level(name: str, level: str) -> None:
    """One kernel at a time, any number of rows, against NumPy."""
    random, rows, columns = np.random.default_rng(3), 19, 512
    data = encoded(random, name, (rows, columns), 0.05)
    weight = ENCODINGS[name].dequantize(data).reshape(rows, columns).astype(np.float64)
    for m in ROWS:
        x = random.standard_normal((m, columns)).astype(np.float32)
        expected = x.astype(np.float64) @ weight.T
        size = np.abs(x).astype(np.float64) @ np.abs(weight).T
        got = _core.linear(name, data, rows, x, "f32", level)
        assert (np.abs(got - expected) <= 2e-6 * size).all()
        got = _core.linear(name, data, rows, x, "int8", level)
        if got is not None:
            # Half a step of each block's largest value, at most, for every activation.
            step = np.abs(x.reshape(m, -1, 32)).max(axis=2) / 127
            sums = np.abs(weight).reshape(rows, -1, 32).sum(axis=2)
            assert (np.abs(got - expected) <= 0.501 * step @ sums.T + 2e-6 * size).all()


def test_an_encoding_without_kernel_is_refused_by_name() -> None:
    from nybble.errors import UnsupportedError

    checkpoint = random_checkpoint(LLAMA)
    name = "model.layers.1.mlp.up_proj.weight"
    tensor = checkpoint.tensors[name]
    other = tensor.changed(encoding=ENCODINGS["f64"], data=np.zeros(tensor.nbytes * 2, np.uint8))
    with pytest.raises(UnsupportedError, match=f"{name}: no CPU kernel knows the encoding f64"):
        cpu.compile_session(replace(checkpoint, tensors={**checkpoint.tensors, name: other}))


# -- KV caches ------------------------------------------------------------------------------------


def rounded(name: str, x: Floats) -> Floats:
    """What is read back of keys or values that were written as an encoding."""
    row = ENCODINGS[name]
    assert row.quantize is not None
    flat = np.ascontiguousarray(x).reshape(-1)
    data = row.quantize(flat)
    if name == "q8_0":
        # The cache rounds to steps of the float16 scale that it stores, which is nearer than GGUF's
        # quantizer (steps of the scale before it is rounded); scale and layout of codes are the same.
        scale = data.reshape(-1, row.block_bytes)[:, :2].copy().view("<f2").astype(np.float32)
        inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
        codes = np.clip(np.rint(flat.reshape(-1, 32) * inverse), -127, 127)
        nearer = (codes * scale).reshape(-1)
        assert np.square(nearer - flat).sum() <= np.square(row.dequantize(data) - flat).sum()
        return nearer.reshape(x.shape)
    return row.dequantize(data).reshape(x.shape)


@pytest.mark.parametrize("name", ["f32", "f16", "bf16", "q8_0", "q4_0"])
@pytest.mark.parametrize("head_dim", [32, 96])
def test_kv_cache_is_the_definition(name: str, head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference device, with keys and values rounded by NumPy's definition of the encoding."""
    config = replace(LLAMA, head_dim=head_dim, rope=rope(head_dim), num_hidden_layers=1)
    checkpoint, ids = random_checkpoint(config), tokens(80)
    plain = run(reference.compile_session(checkpoint), ids)
    attention = reference_session.reference.attention

    def rounding(q: Floats, keys: Floats, values: Floats, **constants: object) -> Floats:
        return attention(q, rounded(name, keys), rounded(name, values), **constants)  # type: ignore[arg-type]

    monkeypatch.setattr(reference_session.reference, "attention", rounding)
    expected = run(reference.compile_session(checkpoint), ids)
    session = cpu.compile_session(checkpoint, precision="f32", kv_cache=name, threads=2)
    for sizes in ([], [1] * 80, [64, 1, 5]):
        actual = run(session, ids, sizes)
        # A float32 rounding before the encoding may tip a value to its neighbour now and then.
        tipped = {"f32": 1e-6, "f16": 1e-4, "bf16": 4e-4, "q8_0": 1e-3, "q4_0": 1e-2}[name]
        assert relative_error(actual, expected) < tipped
        if name != "f32":
            assert relative_error(actual, expected) < 0.5 * relative_error(expected, plain)
    # And what the encoding costs at all.
    bound = {"f32": 1e-5, "f16": 1e-3, "bf16": 8e-3, "q8_0": 2e-2, "q4_0": 0.3}[name]
    assert relative_error(expected, plain) < bound


def test_default_kv_caches_and_their_sizes() -> None:
    checkpoint = random_checkpoint(replace(LLAMA, head_dim=32, rope=rope(32)))
    values = 3 * 2 * 2 * 32 * 64  # layers, keys and values, key-value heads, head_dim, tokens of a page
    for options, bits in (
        ({}, 16), ({"precision": "f32"}, 32), ({"kv_cache": "bf16"}, 16), ({"kv_cache": "q8_0"}, 8.5),
        ({"kv_cache": "q4_0"}, 4.5),
    ):  # fmt: skip
        session = cpu.compile_session(checkpoint, **options)  # type: ignore[arg-type]
        session.forward([BatchItem(session.new_sequence(), [1])])
        assert session.native.cache_bytes_allocated == values * bits / 8


@pytest.mark.parametrize("name", ["q8_0", "q4_0"])
def test_kv_blocks_need_whole_heads(name: str) -> None:
    with pytest.raises(DeviceError, match="head_dim that is a multiple of 32, not 16; use f16"):
        cpu.compile_session(random_checkpoint(LLAMA), kv_cache=name)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("kv_cache", "int3", "kv_cache is one of"),
        ("precision", "f8", "precision is one of"),
        ("threads", 0, "threads is between 1 and 1024"),
        ("context_length", 513, "context_length is between 1 and 512"),
        ("context_length", 0, "context_length is between 1 and 512"),
    ],
)
def test_options_that_do_not_exist(option: str, value: object, message: str) -> None:
    with pytest.raises(DeviceError, match=message):
        cpu.compile_session(random_checkpoint(LLAMA), **{option: value})  # type: ignore[arg-type]
