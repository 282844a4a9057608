"""Linears whose weight's columns lie in another order: the same model, on every device."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from nybble import _core
from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.encodings import encoding
from nybble.checkpoint.tensor import Tensor
from nybble.devices import cpu, reference
from nybble.errors import FormatError, UnsupportedError
from nybble.graph import reference as operators
from nybble.models import build_graph
from support.random_checkpoints import FAMILIES, LLAMA, largest_difference, random_checkpoint, run, tokens
from support.random_checkpoints import with_tensors as changed


def permutation_tensor(name: str, columns: np.ndarray) -> Tensor:
    return Tensor(name, columns.shape, encoding("i32"), columns.astype("<i4").view(np.uint8))


def permuted(checkpoint: Checkpoint, *, shared: bool, only: str = "proj.weight") -> Checkpoint:
    """The same model with permuted columns; ``shared``: linears of one input have one permutation."""
    random = np.random.default_rng(4)
    new: dict[str, Tensor] = {}
    by_place: dict[str, np.ndarray] = {}
    for name, tensor in checkpoint.tensors.items():
        if not name.endswith((only, "lm_head.weight")):
            continue
        place = name.rpartition(".mlp.")[0] + name.rpartition(".self_attn.")[0]
        if not shared or name.endswith(("o_proj.weight", "down_proj.weight")) or not place:
            place = name
        place += ".mlp" * (".mlp." in name)
        columns = by_place.setdefault(place, random.permutation(tensor.shape[1]))
        values = np.ascontiguousarray(tensor.dequantize()[:, columns])
        new[name] = tensor.changed(encoding=encoding("f32"), data=values.reshape(-1).view(np.uint8))
        permutation = name.removesuffix("weight") + "input_permutation"
        new[permutation] = permutation_tensor(permutation, columns)
    return changed(checkpoint, new)


def test_definition() -> None:
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    result = operators.gather_columns(x, np.array([2, 0, 3, 1], np.int32))
    assert result.tolist() == [[2, 0, 3, 1], [6, 4, 7, 5], [10, 8, 11, 9]]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("family", ["llama", "llama-biases", "phi3", "qwen3", "gemma3"])
def test_models(family: str, shared: bool) -> None:
    plain = random_checkpoint(FAMILIES[family])
    other = permuted(plain, shared=shared)
    ids = tokens(30)
    expected = run(reference.compile_session(plain), ids)
    assert largest_difference(run(reference.compile_session(other), ids), expected) < 1e-5
    for threads in (1, 3):
        session = cpu.compile_session(other, precision="f32", threads=threads)
        assert largest_difference(run(session, ids, (7, 1, 1)), expected) < 1e-4
    assert largest_difference(run(cpu.compile_session(other, threads=2), ids), expected) < 0.05


def test_only_some_linears_of_a_norm() -> None:
    plain = random_checkpoint(LLAMA)
    other = permuted(plain, shared=False, only="k_proj.weight")
    ids = tokens(9)
    expected = run(reference.compile_session(plain), ids)
    assert largest_difference(run(cpu.compile_session(other, precision="f32"), ids), expected) < 1e-4


def test_equal_permutations_are_gathered_once() -> None:
    config = replace(LLAMA, num_hidden_layers=1)
    shared = build_graph(permuted(random_checkpoint(config), shared=True))
    gathers = [node for node in shared.nodes if node.operator == "gather_columns"]
    assert [len(node.weights) for node in gathers] == [3, 1, 2, 1, 1]  # qkv, o, gate and up, down, lm_head
    apart = build_graph(permuted(random_checkpoint(config), shared=False))
    assert sum(node.operator == "gather_columns" for node in apart.nodes) == 8


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (np.zeros(64), "no permutation of 0 .. 63"),
        (np.arange(1, 65), "no permutation"),
        (np.arange(-1, 63), "no permutation"),
        (np.arange(32), r"expected i32 of shape \(64,\), found i32 \(32,\)"),
    ],
)
def test_bad_permutations_are_refused(columns: np.ndarray, message: str) -> None:
    name = "model.layers.0.self_attn.q_proj.input_permutation"
    checkpoint = changed(random_checkpoint(LLAMA), {name: permutation_tensor(name, columns)})
    with pytest.raises(FormatError, match=f"{name}: .*{message}"):
        build_graph(checkpoint)


def test_a_permutation_of_nothing_is_unused() -> None:
    name = "model.layers.0.self_attn.r_proj.input_permutation"
    checkpoint = changed(random_checkpoint(LLAMA), {name: permutation_tensor(name, np.arange(64))})
    with pytest.raises(UnsupportedError, match=name):
        build_graph(checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"columns": [0, 1, 2]}, "permutation size"),
        ({"columns": [0, 1, 2, 4]}, "permutation entry"),
        ({"columns": [0, 1, 2, -1]}, "permutation entry"),
        ({"index": 1}, "unknown permutation"),
        ({"index": -1}, "unknown permutation"),
        ({"out": 0}, "gather in place"),
        ({"width": 5}, "gather input"),
        ({"out": 2}, "gather output"),
    ],
)
def test_plans_are_checked(change: dict[str, object], message: str) -> None:
    plan = _core.Plan()
    plan.vocab_size, plan.context_length = 4, 8
    x, y = plan.add_buffer(4, False), plan.add_buffer(4, False)
    index = plan.add_permutation(np.array(change.get("columns", [3, 2, 1, 0]), np.int32))
    arguments = {"out": y, "width": 4, "index": index, **change}
    plan.gather_columns((x, 0), (arguments["out"], 0), arguments["width"], arguments["index"], False)
    with pytest.raises(ValueError, match=message):
        plan.validate()
