"""The operators against their definition, written once more as plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nybble.graph import reference

RANDOM = np.random.default_rng(3)


def normal(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def test_embedding_and_linear() -> None:
    weight, bias = normal(5, 4), normal(5)
    np.testing.assert_array_equal(
        reference.embedding(np.array([3, 0, 3]), weight, 2.0), weight[[3, 0, 3]] * 2
    )
    x = normal(3, 4)
    expected = [[sum(x[t, i] * weight[o, i] for i in range(4)) + bias[o] for o in range(5)] for t in range(3)]
    np.testing.assert_allclose(reference.linear(x, weight, bias), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("group", [8, 4])
def test_rms_norm(group: int) -> None:
    x, weight = normal(3, 8), normal(group)
    result = reference.rms_norm(x, weight, 0.1, 1.0, group)
    for t in range(3):
        for start in range(0, 8, group):
            part = x[t, start : start + group].astype(np.float64)
            expected = part / math.sqrt((part**2).mean() + 0.1) * (weight + 1.0)
            np.testing.assert_allclose(result[t, start : start + group], expected, rtol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_turns_pairs_of_the_rotated_part(interleaved: bool) -> None:
    head_dim, frequencies = 8, np.array([0.5, 0.1], np.float32)  # rotary_dim 4 of 8
    x, positions = normal(3, 2 * head_dim), np.array([0, 5, 900])
    result = reference.rotary(x, positions, frequencies, 1.25, head_dim=head_dim, interleaved=interleaved)
    expected = x.copy()
    for t, position in enumerate(positions):
        for head in (0, head_dim):
            for i, frequency in enumerate(frequencies):
                a, b = (head + 2 * i, head + 2 * i + 1) if interleaved else (head + i, head + i + 2)
                pair = complex(x[t, a], x[t, b]) * 1.25 * np.exp(1j * float(position * frequency))
                expected[t, a], expected[t, b] = pair.real, pair.imag
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (3, None), (1, 0.7), (100, 2.0)])
def test_attention_sees_the_past_inside_its_window(window: int | None, softcap: float | None) -> None:
    head_dim, heads, key_heads, length, new = 4, 4, 2, 9, 5
    q, k, v = normal(new, heads * head_dim), normal(length, key_heads * head_dim), normal(length, 8)
    result = reference.attention(q, k, v, head_dim=head_dim, scale=0.6, window=window, softcap=softcap)
    for row in range(new):
        position = length - new + row
        first = 0 if window is None else max(0, position - window + 1)
        for head in range(heads):
            own = slice(head * head_dim, (head + 1) * head_dim)
            shared = slice(head // 2 * head_dim, (head // 2 + 1) * head_dim)
            scores = np.array([q[row, own] @ k[p, shared] * 0.6 for p in range(first, position + 1)])
            if softcap is not None:
                scores = softcap * np.tanh(scores / softcap)
            weights = np.exp(scores) / np.exp(scores).sum()
            expected = weights @ v[first : position + 1, shared]
            np.testing.assert_allclose(result[row, own], expected, rtol=1e-4, atol=1e-5)


def test_attention_in_blocks_of_queries_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = normal(20, 8), normal(30, 4), normal(30, 4)
    whole = reference.attention(q, k, v, head_dim=4, scale=0.5, window=7)
    monkeypatch.setattr(reference, "QUERY_BLOCK", 3)
    np.testing.assert_allclose(
        reference.attention(q, k, v, head_dim=4, scale=0.5, window=7), whole, rtol=1e-5
    )


def test_activations() -> None:
    x = np.array([[-200.0, -3.0, -0.5, 0.0, 0.5, 3.0, 200.0]], np.float32)
    up = normal(1, 7)
    definitions = {
        "silu": lambda z: z / (1 + math.exp(-z)) if z > -100 else 0.0,
        "gelu": lambda z: z * 0.5 * math.erfc(-z / math.sqrt(2)),
        "gelu_pytorch_tanh": lambda z: (
            0.5 * z * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
        ),
    }
    assert set(definitions) == set(reference.ACTIVATIONS)
    for kind, definition in definitions.items():
        expected = np.array([[definition(float(z)) for z in x[0]]]) * up
        np.testing.assert_allclose(reference.gated_activation(x, up, kind), expected, rtol=1e-5, atol=1e-6)


def test_small_operators() -> None:
    x = normal(3, 5)
    np.testing.assert_array_equal(reference.add(x, x), 2 * x)
    np.testing.assert_array_equal(reference.scale(x, 0.5), x / 2)
    np.testing.assert_array_equal(reference.select_rows(x, np.array([2, 0])), x[[2, 0]])
    a, b = reference.split(x, (2, 3))
    np.testing.assert_array_equal(np.concatenate((a, b), axis=1), x)
    assert a.shape == (3, 2)
    np.testing.assert_allclose(reference.softcap_logits(x, 0.3), 0.3 * np.tanh(x / 0.3), rtol=1e-5)


def test_no_rows_at_all() -> None:
    """A batch may ask for no logits: everything after select_rows then runs on nothing."""
    nothing, frequencies = normal(0, 8), np.ones(2, np.float32)
    assert reference.rms_norm(nothing, normal(8), 0.1, 0.0, 8).shape == (0, 8)
    assert reference.linear(nothing, normal(5, 8)).shape == (0, 5)
    at = np.empty(0, np.int64)
    turned = reference.rotary(nothing, at, frequencies, 1.0, head_dim=4, interleaved=False)
    assert turned.shape == (0, 8)
    assert reference.attention(nothing, normal(3, 4), normal(3, 4), head_dim=4, scale=1.0).shape == (0, 8)
    assert reference.attention(nothing, normal(0, 4), normal(0, 4), head_dim=4, scale=1.0).shape == (0, 8)
