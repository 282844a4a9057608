"""Adapters while a model runs: devices against the merged model, batches, forks, prefixes, requests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nybble import _core
from nybble.checkpoint.adapter import Adapter
from nybble.checkpoint.apply_adapters import with_adapters
from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.encodings import encoding
from nybble.checkpoint.forms import to_gguf_form
from nybble.checkpoint.merge_adapters import merge_adapters
from nybble.checkpoint.tensor import Tensor
from nybble.devices import cpu, reference
from nybble.devices.base import BatchItem, Session
from nybble.errors import DeviceError, FormatError, UnsupportedError
from nybble.formats.gguf.write_checkpoint import write_gguf
from nybble.formats.huggingface.writer import write_huggingface_folder
from nybble.formats.onnx.write import write_onnx_folder
from nybble.graph import reference as operators
from nybble.loading import from_checkpoint
from nybble.models import build_graph
from support.adapters import random_adapter
from support.affine_models import affine_checkpoint
from support.random_checkpoints import (
    FAMILIES,
    LLAMA,
    largest_difference,
    random_checkpoint,
    relative_error,
    tokens,
)

ALL = ("proj.weight", "lm_head.weight", "embed_tokens.weight")


def run(
    session: Session, ids: list[int], weights: tuple[float, ...] = (), sizes: tuple[int, ...] = ()
) -> np.ndarray:
    """Logits of all tokens, in chunks of these sizes and then the rest."""
    sequence = session.new_sequence(weights)
    rows, begin = [], 0
    for size in (*sizes, len(ids)):
        if ids[begin : begin + size]:
            rows.append(session.forward([BatchItem(sequence, ids[begin : begin + size], "all")]))
        begin += size
    return np.concatenate(rows)


def two(config: object = LLAMA, only: tuple[str, ...] = ALL) -> list[Adapter]:
    """Adapters of different ranks, scales and dtypes."""
    return [
        random_adapter(config, "one", only=only, seed=1),  # type: ignore[arg-type]
        random_adapter(config, "two", only=only, rank=5, alpha=3, seed=2, kind="bf16"),  # type: ignore[arg-type]
    ]


def test_definition() -> None:
    x = np.array([[1, 2, np.inf], [4, 5, 6]], np.float32)
    weights = np.array([[1, 0], [0.5, 2]], np.float32)
    slots = np.array([0, 0, 1], np.int32)
    scales = np.array([2, 3, 4], np.float32)
    result = operators.scale_by_sequence(x, weights, slots, scales)
    assert result.shape == (2, 32) and not result[:, 3:].any()
    assert result[:, :3].tolist() == [[2, 6, 0], [4, 7.5, 48]]


@pytest.mark.parametrize("family", FAMILIES)
def test_devices_against_merged(family: str) -> None:
    base = random_checkpoint(FAMILIES[family])
    one, other = two(base.config)
    both = with_adapters(base, [one, other])
    ids = tokens(30)
    slow = reference.compile_session(both)
    exact = cpu.compile_session(both, precision="f32", threads=2)
    fast = cpu.compile_session(both, threads=2)
    plain = run(reference.compile_session(base), ids)
    for weights in ((0.0, 0.0), (1.0, 0.0), (0.0, 0.5), (0.75, -0.5)):
        merged = merge_adapters(base, {one: weights[0], other: weights[1]}, encoding="f32")
        expected = run(reference.compile_session(merged), ids)
        if any(weights):
            assert largest_difference(expected, plain) > 0.05
        assert largest_difference(run(slow, ids, weights), expected) < 1e-4
        assert largest_difference(run(exact, ids, weights, (7, 1, 1)), expected) < 1e-4
        assert relative_error(run(fast, ids, weights, (7, 1, 1)), expected) < 0.06
    assert np.array_equal(run(exact, ids), run(exact, ids, (0.0, 0.0)))


@pytest.mark.parametrize(
    "only",
    [
        ("q_proj.weight",),
        ("o_proj.weight", "down_proj.weight"),
        ("up_proj.weight",),
        ("lm_head.weight",),
        ("embed_tokens.weight",),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama-biases", "gemma2"])
def test_some_weights_only(family: str, only: tuple[str, ...]) -> None:
    base = random_checkpoint(replace(FAMILIES[family], tie_word_embeddings=False))
    adapters = two(base.config, only)
    both = with_adapters(base, adapters)
    merged = merge_adapters(base, dict(zip(adapters, (1.0, 0.5), strict=True)), encoding="f32")
    ids = tokens(9)
    expected = run(reference.compile_session(merged), ids)
    assert (
        largest_difference(run(cpu.compile_session(both, precision="f32"), ids, (1.0, 0.5)), expected) < 1e-4
    )


def test_quantized_base_with_act_order() -> None:
    from nybble.checkpoint.encodings.affine import AffineFormat

    base = affine_checkpoint(AffineFormat(4, 32, "f16", True), LLAMA, act_order=True)
    one = random_adapter(base.config)
    ids = tokens(9)
    expected = run(reference.compile_session(merge_adapters(base, {one: 1.0}, encoding="f32")), ids)
    with_one = with_adapters(base, [one])
    assert largest_difference(run(reference.compile_session(with_one), ids, (1.0,)), expected) < 1e-4
    assert (
        largest_difference(run(cpu.compile_session(with_one, precision="f32"), ids, (1.0,)), expected) < 1e-4
    )


@pytest.mark.parametrize("device", [reference, cpu], ids=["reference", "cpu"])
def test_a_batch_with_different_adapters(device: object) -> None:
    base = random_checkpoint(LLAMA)
    both = with_adapters(base, two())
    options = {} if device is reference else {"precision": "f32", "max_rows": 8, "threads": 2}
    session = device.compile_session(both, **options)  # type: ignore[attr-defined]
    weights = [(1.0, 0.0), (), (0.0, 1.0), (0.5, 0.5), (0.0, 0.0)]
    prompts = [tokens(5 + 3 * i, seed=i) for i in range(len(weights))]
    expected = [run(session, ids, own) for ids, own in zip(prompts, weights, strict=True)]
    sequences = [session.new_sequence(own) for own in weights]
    rows = session.forward([BatchItem(s, ids, "all") for s, ids in zip(sequences, prompts, strict=True)])
    assert largest_difference(rows, np.concatenate(expected)) < 1e-5
    # The last row alone: the last layer works on selected rows.
    forks = [sequence.fork() for sequence in sequences]
    for fork in forks:
        fork.truncate(4)
    items = [BatchItem(f, ids[4:], "last") for f, ids in zip(forks, prompts, strict=True)]
    last = session.forward(items)
    assert largest_difference(last, np.stack([rows[-1] for rows in expected])) < 1e-5


def test_requests() -> None:
    """Weights belong to a request; cached tokens are not shared between different ones."""
    base = random_checkpoint(LLAMA)
    one, other = two()
    model = from_checkpoint(base, adapters={"a": one, "b": (other, 0.5)}, cached_conversations=4)
    assert model.adapters == ("a", "b")
    assert model.defaults.adapters == {"a": 1.0, "b": 0.5}
    plain = from_checkpoint(base)
    prompt = tokens(12)
    options = {"max_tokens": 8, "temperature": 0, "reuse_prefix": True}
    wanted = {}
    for key, weights in {"a": {"a": 1.0}, "b": {"b": 1.0}, "none": {}, "default": None}.items():
        wanted[key] = model.complete(prompt, adapters=weights, **{**options, "reuse_prefix": False}).token_ids
    assert wanted["none"] == plain.complete(prompt, **options).token_ids
    assert len({tuple(ids) for ids in wanted.values()}) > 2
    for _ in range(2):
        for key, weights in {"a": {"a": 1.0}, "b": {"b": 1.0}, "none": {}, "default": None}.items():
            assert model.complete(prompt, adapters=weights, **options).token_ids == wanted[key]
    first = model.complete(prompt, adapters={"a": 1.0}, **options)
    assert first.usage.cached_tokens == len(prompt)
    new = model.complete(prompt, adapters={"a": 0.9}, **options)
    assert new.usage.cached_tokens == 0
    several = model.complete(prompt, adapters={"a": 1.0}, n=3, **options)
    assert [choice.token_ids for choice in several.choices] == [wanted["a"]] * 3
    assert np.array_equal(model.logits(prompt, adapters={}), plain.logits(prompt)) or (
        largest_difference(model.logits(prompt, adapters={}), plain.logits(prompt)) < 0.02
    )
    assert largest_difference(model.logits(prompt), plain.logits(prompt)) > 0.05
    for unknown in ({"c": 1.0}, {"one": 1.0}):
        with pytest.raises(ValueError, match=r"no adapter '.*': it has a, b"):
            model.complete(prompt, adapters=unknown)
    with pytest.raises(ValueError, match="loaded without any"):
        plain.complete(prompt, adapters={"a": 1.0})


def test_weights_are_counted() -> None:
    base = random_checkpoint(LLAMA)
    for device in (reference, cpu):
        session = device.compile_session(with_adapters(base, two()))
        with pytest.raises(ValueError, match="1 weights of adapters; the model has 2"):
            session.new_sequence((1.0,))
        with pytest.raises(ValueError, match="1 weights of adapters; the model has 0"):
            device.compile_session(base).new_sequence((1.0,))


def test_onnxruntime_refuses() -> None:
    with pytest.raises(DeviceError, match="cannot apply LoRA adapters: merge them"):
        from_checkpoint(random_checkpoint(LLAMA), adapters=two(), device="onnxruntime:cpu")


def test_writers_refuse(tmp_path: Path) -> None:
    checkpoint = with_adapters(random_checkpoint(LLAMA), two())
    for write in (
        lambda: write_huggingface_folder(checkpoint, tmp_path),
        lambda: write_gguf(to_gguf_form(checkpoint), tmp_path / "x.gguf"),
        lambda: write_onnx_folder(checkpoint, tmp_path, target="onnx-cpu-fp32"),
    ):
        with pytest.raises(UnsupportedError, match=r"adapters beside its weights \(one, two\).* merge them"):
            write()
    assert not list(tmp_path.iterdir())


def test_names() -> None:
    base = random_checkpoint(LLAMA)
    one, _ = two()
    with pytest.raises(ValueError, match="two adapters are named 'one'"):
        from_checkpoint(base, adapters=[one, one])
    assert from_checkpoint(base, adapters={"x": one, "y": one}).adapters == ("x", "y")
    for weight in (float("nan"), float("inf"), "1", True, None):
        with pytest.raises(ValueError, match="weight of adapter 'one'"):
            from_checkpoint(base, adapters=[(one, weight)])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="a list or a mapping"):
        from_checkpoint(base, adapters="one.gguf")


def fails(base: Checkpoint, adapter: Adapter, message: str) -> None:
    for use in (lambda: with_adapters(base, [adapter]), lambda: merge_adapters(base, {adapter: 1.0})):
        with pytest.raises(UnsupportedError, match=message):
            use()


def test_adapters_of_other_models() -> None:
    base = random_checkpoint(LLAMA)
    own = random_adapter(LLAMA)
    fails(
        base, random_adapter(replace(LLAMA, num_hidden_layers=4)), "lacks 7 of its weights: model.layers.3."
    )
    fails(
        base, random_adapter(FAMILIES["phi3"]), "lacks .* of its weights: model.layers.0.self_attn.qkv_proj"
    )
    fails(
        base, random_adapter(replace(LLAMA, intermediate_size=64)), r"gate_proj.weight is \(96, 64\) in the"
    )
    fails(base, replace(own, architecture="qwen2"), "for the architecture 'qwen2', and the model is 'llama'")
    with_adapters(base, [replace(own, architecture="mistral")])
    wide = random_adapter(replace(LLAMA, num_attention_heads=8), only=("q_proj.weight",))
    fails(base, wide, "q_proj.weight is")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": [0, 0, 1]}, "slots size"),
        ({"slots": [0, 0, 1, 2]}, "slots entry"),
        ({"slots": [0, 0, 1, -1]}, "slots entry"),
        ({"index": 1}, "unknown slots"),
        ({"scales": 1}, "scales"),
        ({"width": 5}, "scale by sequence input"),
        ({"out": 2}, "scale by sequence output"),
        ({"offset": 1, "width": 3, "out_width": 3, "slots": [0, 0, 0]}, "overlaps"),
        ({"out_width": 3}, "scale by sequence width"),
        ({"out_width": 5}, "scale by sequence output"),
    ],
)
def test_plans_are_checked(change: dict[str, object], message: str) -> None:
    plan = _core.Plan()
    plan.vocab_size, plan.context_length, plan.adapters = 4, 8, 2
    x = plan.add_buffer(4, False)
    plan.add_vector(np.ones(4, np.float32))
    plan.add_slots(np.array(change.get("slots", [1, 0, 1, 0]), np.int32))
    at = {"out": x, "offset": 0, "width": 4, "out_width": 4, "index": 0, "scales": 0, **change}
    out = (at["out"], at["offset"])
    plan.scale_by_sequence((x, 0), out, at["width"], at["out_width"], at["index"], at["scales"], False)
    with pytest.raises(ValueError, match=message):
        plan.validate()


def test_bad_slots_are_refused() -> None:
    both = with_adapters(random_checkpoint(LLAMA), two())
    name = "model.layers.0.self_attn.q_proj.adapters.slots"
    for slots in ([-1] * 9, [0] * 3):
        data = np.array(slots, "<i4")
        bad = Tensor(name, data.shape, encoding("i32"), data.view(np.uint8))
        with pytest.raises(FormatError, match=name):
            build_graph(replace(both, tensors={**both.tensors, name: bad}))


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3-longrope"])
def test_random_operations(family: str) -> None:
    """Sequences with adapters of their own are forked, cut and run in random batches, as one by one."""
    config = FAMILIES[family]
    both = with_adapters(random_checkpoint(config), two(config))
    session = cpu.compile_session(both, precision="f32", threads=2, max_rows=16)
    slow = reference.compile_session(both)
    random = np.random.default_rng(7)
    weights: list[tuple[float, ...]] = [(1.0, 0.0), (0.0, 1.0), (0.3, -0.7), ()]
    alive = [(session.new_sequence(own), own) for own in weights]
    checked = 0
    for _ in range(25):
        chosen = [pair for pair in alive if random.random() < 0.7]
        items = [
            BatchItem(sequence, random.integers(0, 101, random.integers(1, 9)).tolist(), "last")
            for sequence, _ in chosen
        ]
        rows = session.forward(items)
        for (sequence, own), row in zip(chosen, rows, strict=True):
            if random.random() < 0.3:
                fresh = slow.new_sequence(own)
                expected = slow.forward([BatchItem(fresh, sequence.tokens, "last")])
                assert largest_difference(row[None], expected) < 2e-4
                checked += 1
        sequence, own = alive[random.integers(len(alive))]
        if random.random() < 0.4 and len(alive) < 8:
            alive.append((sequence.fork(), own))
        if random.random() < 0.4:
            sequence.truncate(int(random.integers(0, sequence.length + 1)))
    assert checked > 10
