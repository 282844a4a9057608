"""Evaluations of tiny models: all formats side by side, against NumPy's sums of all logits at once."""

from __future__ import annotations

import json
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import nybble
from nybble.errors import DeviceError, NotFoundError, NybbleError
from nybble.evaluate import compare
from nybble.evaluate.compare import Evaluator, evaluate
from nybble.evaluate.options import EvaluationOptions
from nybble.evaluate.process import Worker, WorkerDied
from nybble.evaluate.specs import ModelSpec
from nybble.evaluate.vocabulary import OTHER_SPLIT, VocabularyError
from nybble.evaluate.windows import WindowError, Windows, tokens_of
from nybble.formats.gguf.metadata import GGUFMetadata
from nybble.formats.gguf.write_checkpoint import write_gguf
from nybble.loading import from_checkpoint, read_checkpoint
from nybble.text.tokenizer import GGUFTokenizerSource
from support.conversions import model_file
from support.evaluations import random_text

F32 = ",precision=f32,kv_cache=f32"
WINDOW = 32
QUICK = EvaluationOptions(window=WINDOW, speed=False)


def expected(reference: Path, other: Path) -> dict[str, float]:
    """What the numbers should be, by the slow device and plain sums."""
    one, two = (from_checkpoint(read_checkpoint(path), device="reference") for path in (reference, other))
    text = (reference.parent / "text.txt").read_text(encoding="utf-8")
    windows = Windows(tokens_of(one.tokenizer, text), WINDOW, prefix=one.tokenizer.prefix, most=8)
    nll, kld, same = [], [], []
    for window in windows:
        rows = slice(window.first_target - 1, WINDOW - 1)
        logits = [m.logits(window.tokens)[rows].astype(np.float64) for m in (one, two)]
        p, q = (x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in logits)
        nll += (-q[np.arange(len(q)), list(window.targets)]).tolist()
        kld += (np.exp(p) * (p - q)).sum(axis=1).tolist()
        same += (p.argmax(axis=1) == q.argmax(axis=1)).tolist()
    return {
        "tokens": len(nll),
        "perplexity": float(np.exp(np.mean(nll))),
        "kld": float(np.mean(kld)),
        "kld99": float(np.quantile(kld, 0.99)),
        "top1": float(np.mean(same)),
    }


def test_all_formats_side_by_side(folder: Path) -> None:
    models = [
        f"{folder / 'f32.gguf'}@cpu{F32}",
        f"{folder / 'safetensors'}{F32}",
        f"{folder / 'onnx'}@onnxruntime:cpu",
        f"{folder / 'onnx'}@cpu{F32}",
        f"{folder / 'q4_0.gguf'}",
    ]
    found = nybble.evaluate(
        models, text=folder / "text.txt", window=WINDOW, windows=4, repetitions=1, weights=True, threads=1
    )
    first, safetensors, onnx, onnx_cpu, q4_0 = found.models
    assert [model.format for model in found.models] == ["gguf", "safetensors", "onnx", "onnx", "gguf"]
    assert onnx.device == "onnxruntime:cpu" and onnx_cpu.device == "cpu"
    for same in (safetensors, onnx, onnx_cpu):
        assert same.quality is not None and same.quality.kld is not None and same.quality.top1 is not None
        assert same.quality.kld.value < 1e-9
        assert same.quality.top1.value == 1.0 and same.quality.flips == 0 and same.flips == ()
        assert same.quality.perplexity.value == pytest.approx(first.quality.perplexity.value, rel=1e-5)
        assert {error.relative_error for error in same.weight_errors} == {0.0}
    assert q4_0.quality is not None and q4_0.quality.kld is not None and q4_0.quality.kld.value > 1e-4
    assert q4_0.bits_per_weight == pytest.approx(4.5, abs=0.1)
    assert first.bits_per_weight == 32.0
    for model in found.models:
        assert model.prefill is not None and model.decode is not None and model.prefill.tokens == WINDOW
        assert model.peak_memory_bytes is not None and model.peak_memory_bytes > 10_000_000
        assert model.notes == () and model.failure is None


def test_against_plain_sums(folder: Path) -> None:
    models = [folder / "f32.gguf", f"{folder / 'q4_0.gguf'}@reference", f"{folder / 'q4_0.gguf'}"]
    options = {"window": WINDOW, "windows": 8, "speed": False, "flips": 5, "precision": "f32"}
    found = evaluate(models, text=folder / "text.txt", **options)
    _, slow, fast = found.models
    wanted = expected(folder / "f32.gguf", folder / "q4_0.gguf")
    quality = slow.quality
    assert quality is not None and quality.tokens == wanted["tokens"] == found.scored
    for name in ("perplexity", "kld", "kld99", "top1"):
        assert getattr(quality, name).value == pytest.approx(wanted[name], rel=1e-4), name
    assert quality.flips == round((1 - wanted["top1"]) * wanted["tokens"])
    assert fast.quality is not None and fast.quality.kld is not None
    assert fast.quality.kld.value == pytest.approx(wanted["kld"], rel=1e-4)
    assert 0 < len(slow.flips) <= 5
    losses = [flip.loss for flip in slow.flips]
    assert losses == sorted(losses, reverse=True)
    tokens = tokens_of(
        read_checkpoint(folder / "f32.gguf").tokenizer.build(), (folder / "text.txt").read_text()
    )
    tokenizer = read_checkpoint(folder / "f32.gguf").tokenizer.build()
    for flip in slow.flips:
        assert flip.actual == tokenizer.token_bytes(int(tokens[flip.position])).decode()
        assert flip.context.endswith(
            tokenizer.decode(tokens[flip.position - 4 : flip.position].tolist()).strip()
        )
        assert flip.reference_probability >= flip.token_in_reference
        assert flip.probability >= flip.reference_token_in_model


def test_json(folder: Path) -> None:
    """The names and types of a report's fields are a contract."""
    models = [folder / "f32.gguf", f"{folder / 'q4_0.gguf'},label=four bits"]
    found = evaluate(models, text=folder / "text.txt", window=WINDOW, windows=2, repetitions=2, weights=True)
    value = json.loads(json.dumps(found.to_json(), allow_nan=False))
    number, text = (int, float), str
    estimate = {"value": number, "error": number}
    shape = {
        "schema": text, "text": text, "text_sha256": text, "tokens": int, "window": int, "stride": type(None),
        "windows": int, "scored": int, "processor": text, "load_average": (float, type(None)),
        "version": text, "seconds": float, "reference": text, "models": list,
    }  # fmt: skip
    model = {
        "label": text, "model": text, "path": text, "device": text, "format": text, "options": dict,
        "threads": int, "weight_bytes": int, "parameters": int, "bits_per_weight": float,
        "load_seconds": float, "peak_memory_bytes": int, "prefill": dict, "decode": dict, "quality": dict,
        "flips": list, "weight_errors": list, "notes": list, "failure": type(None),
    }  # fmt: skip
    assert_shape(value, shape)
    assert value["schema"] == "nybble-evaluation/1"
    assert value["models"][1]["label"] == "four bits"
    for result in value["models"]:
        assert_shape(result, model)
        assert_shape(
            result["prefill"],
            {"tokens": int, "median": float, "slowest": float, "fastest": float, "seconds": list},
        )
        assert len(result["decode"]["seconds"]) == 2
    names = ("perplexity", "perplexity_ratio", "kld", "kld_median", "kld99", "top1")
    quality = value["models"][1]["quality"]
    assert_shape(quality, {"tokens": int, **dict.fromkeys(names, dict), "kld_max": float, "flips": int})
    for name in names:
        assert_shape(quality[name], estimate)
    assert value["models"][0]["quality"]["kld"] is None
    assert_shape(
        value["models"][1]["weight_errors"][0],
        {"name": text, "layer": (int, type(None)), "kind": text, "relative_error": float, "encoding": text,
         "reference_encoding": text},
    )  # fmt: skip
    flip = value["models"][1]["flips"][0]
    assert flip["position"] > 0 and set(flip) == {
        "position", "context", "actual", "reference_token", "token", "reference_probability",
        "token_in_reference", "probability", "reference_token_in_model",
    }  # fmt: skip


def assert_shape(value: dict[str, object], shape: dict[str, object]) -> None:
    assert list(value) == list(shape) or set(value) == set(shape), set(value) ^ set(shape)
    for name, kind in shape.items():
        assert isinstance(value[name], kind), (name, value[name])  # type: ignore[arg-type]


def test_pieces_and_strides(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows of logits are held at a time, and with windows that overlap."""
    models = [f"{folder / 'f32.gguf'}{F32}", f"{folder / 'q8_0.gguf'}{F32}"]
    options = {"text": folder / "text.txt", "window": 64, "stride": 24, "tokens": 300, "speed": False}
    whole = evaluate(models, **options)
    monkeypatch.setattr(compare, "_PIECE_BYTES", 4 * 101 * 5)
    monkeypatch.setattr(compare, "_MIN_ROWS", 1)
    cut = evaluate(models, **options)
    assert whole.tokens == cut.tokens == 300
    assert cut.windows == (300 - 64) // 24 + 1 and cut.scored == cut.windows * 24
    for one, two in zip(whole.models, cut.models, strict=True):
        assert one.quality.perplexity.value == pytest.approx(two.quality.perplexity.value, rel=1e-6)
    assert cut.models[1].quality.kld.value == pytest.approx(whole.models[1].quality.kld.value, rel=1e-3)
    assert cut.models[0].prefill is None and cut.models[0].peak_memory_bytes is None


def test_one_model_alone(folder: Path) -> None:
    found = evaluate([folder / "f32.gguf"], text=random_text(80), window=WINDOW, speed=False)
    assert found.others == () and found.text == "(text)"
    assert found.reference.quality.kld is None


def test_another_vocabulary_size(folder: Path, tmp_path: Path) -> None:
    other = read_checkpoint(folder / "f32.gguf")
    smaller = {
        name: tensor.changed(shape=(96, tensor.shape[1]), data=tensor.data[: 96 * tensor.nbytes // 101])
        if tensor.shape[0] == 101
        else tensor
        for name, tensor in other.tensors.items()
    }
    keys = {k: v[:96] if k.startswith("tokenizer.ggml.") and hasattr(v, "__len__") and len(v) == 101 else v
            for k, v in other.metadata.items()}  # fmt: skip
    metadata = GGUFMetadata(keys)
    write_gguf(
        replace(other, tensors=smaller, metadata=metadata, tokenizer=GGUFTokenizerSource(metadata),
                config=replace(other.config, vocab_size=96)),
        tmp_path / "small.gguf",
    )  # fmt: skip
    with pytest.raises(
        VocabularyError, match=r"small\.gguf: gives logits of 96 tokens, and f32\.gguf of 101"
    ):
        evaluate([folder / "f32.gguf", tmp_path / "small.gguf"], text=folder / "text.txt", window=WINDOW)


def with_tokens(source: Path, target: Path, tokens: list[str], **keys: object) -> Path:
    checkpoint = read_checkpoint(source)
    metadata = GGUFMetadata({**checkpoint.metadata, "tokenizer.ggml.tokens": tokens, **keys})
    write_gguf(replace(checkpoint, metadata=metadata, tokenizer=GGUFTokenizerSource(metadata)), target)
    return target


def test_tokens_that_mean_something_else(folder: Path, tmp_path: Path) -> None:
    tokens = list(read_checkpoint(folder / "f32.gguf").metadata["tokenizer.ggml.tokens"])
    a, b = tokens.index("a"), tokens.index("b")
    tokens[a], tokens[b] = tokens[b], tokens[a]
    other = with_tokens(folder / "f32.gguf", tmp_path / "swapped.gguf", tokens)
    with pytest.raises(VocabularyError, match=rf"swapped\.gguf: token {a} is 'b', but 'a' in f32\.gguf"):
        evaluate([folder / "f32.gguf", other], text=folder / "text.txt", window=WINDOW, speed=False)


def test_another_way_to_cut_the_text(folder: Path, tmp_path: Path) -> None:
    tokens = list(read_checkpoint(folder / "f32.gguf").metadata["tokenizer.ggml.tokens"])
    other = with_tokens(
        folder / "f32.gguf", tmp_path / "other.gguf", tokens, **{"tokenizer.ggml.add_space_prefix": False}
    )
    found = evaluate([folder / "f32.gguf", other], text=folder / "text.txt", window=WINDOW, speed=False)
    assert found.models[1].notes == (OTHER_SPLIT,)
    assert found.models[1].quality.kld.value == 0.0


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_model_whose_process_is_killed(folder: Path) -> None:
    evaluator = Evaluator(
        [folder / "f32.gguf", f"{folder / 'q4_0.gguf'},label=victim", folder / "q8_0.gguf"],
        folder / "text.txt",
        QUICK,
    )
    for step in evaluator.steps():
        if step.stage == "windows" and step.done == 1:
            os.kill(evaluator._workers[1].pid, signal.SIGKILL)
    first, victim, third = evaluator.result.models
    assert victim.failure == "its process was ended by SIGKILL; the system kills so where memory runs out"
    assert victim.quality is None and victim.weight_bytes > 0
    assert first.quality is not None and third.quality is not None
    assert third.quality.tokens == first.quality.tokens == evaluator.result.scored
    json.dumps(evaluator.result.to_json(), allow_nan=False)


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_the_reference_is_needed(folder: Path) -> None:
    evaluator = Evaluator([folder / "f32.gguf", folder / "q4_0.gguf"], folder / "text.txt", QUICK)
    with pytest.raises(WorkerDied, match=r"f32\.gguf: its process was ended by SIGKILL"):
        for step in evaluator.steps():
            if step.stage == "windows" and step.done == 1:
                os.kill(evaluator._workers[0].pid, signal.SIGKILL)
    assert all(worker._process.poll() is not None for worker in evaluator._workers)


def test_cancel_from_another_thread(folder: Path) -> None:
    options = EvaluationOptions(window=WINDOW)
    evaluator = Evaluator([folder / "f32.gguf", folder / "q4_0.gguf"], folder / "text.txt", options)
    begun, errors = threading.Event(), []

    def work() -> None:
        try:
            for _ in evaluator.steps():
                begun.set()
        except NybbleError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    begun.wait(60)
    evaluator.cancel()
    thread.join(30)
    assert not thread.is_alive() and len(errors) == 1
    assert all(worker._process.poll() is not None for worker in evaluator._workers)
    with pytest.raises(ValueError, match="has not ended"):
        _ = evaluator.result


def test_logits_that_are_not_finite(folder: Path, tmp_path: Path) -> None:
    broken = model_file(tmp_path / "broken.gguf", weights="f32", embeddings="f32")
    checkpoint = read_checkpoint(broken)
    name = "model.norm.weight"
    bad = np.full(checkpoint.tensors[name].shape, np.inf, np.float32).view(np.uint8)
    tensors = {**checkpoint.tensors, name: checkpoint.tensors[name].changed(data=bad)}
    write_gguf(replace(checkpoint, tensors=tensors), tmp_path / "inf.gguf")
    found = evaluate(
        [folder / "f32.gguf", tmp_path / "inf.gguf"], text=folder / "text.txt", window=WINDOW, speed=False
    )
    assert found.models[1].failure == "its logits are not all finite numbers"


@pytest.mark.parametrize(
    ("models", "options", "kind", "message"),
    [
        ([], {}, ValueError, "no model"),
        (["f32.gguf"], {"window": 2}, ValueError, "at least 4 tokens"),
        (["f32.gguf"], {"repetitions": 0}, ValueError, "at least 1"),
        (["f32.gguf"], {"text": "a b c"}, WindowError, "fewer than one window of 32"),
        (["f32.gguf"], {"window": 600, "text": "a " * 700}, NybbleError, "at most 512 tokens, fewer"),
        (["nothing.gguf"], {}, NotFoundError, "nothing.gguf"),
        (["f32.gguf@cpu,precision=f16"], {}, DeviceError, "f32.gguf: precision is one of"),
        (["f32.gguf@onnxruntime:cpu"], {}, DeviceError, "runs ONNX folders and files"),
        (["f32.gguf"], {"device": "abacus"}, DeviceError, "unknown device 'abacus'"),
    ],
)  # fmt: skip
def test_errors(
    folder: Path, monkeypatch: pytest.MonkeyPatch, models: list[str], options: dict[str, object],
    kind: type[Exception], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(folder)
    with pytest.raises(kind, match=message):
        evaluate(models, **{"text": folder / "text.txt", "window": WINDOW, **options})  # type: ignore[arg-type]


def test_texts_that_are_none(folder: Path, tmp_path: Path) -> None:
    name = str(folder / "text.txt")
    with pytest.raises(ValueError, match="is the name of a file"):
        evaluate([folder / "f32.gguf"], text=name)
    (tmp_path / "binary").write_bytes(b"abc\xff")
    with pytest.raises(NybbleError, match=r"is not UTF-8 text \(byte 3\)"):
        evaluate([folder / "f32.gguf"], text=tmp_path / "binary")


def test_a_worker_finds_modules_whatever_its_folder_holds(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong json')")
    (tmp_path / "nybble").mkdir()
    monkeypatch.chdir(tmp_path)
    with Worker("it") as worker:
        facts = worker.ask("load", path=str(folder / "f32.gguf"), device="cpu", options={}, context_length=64)
        assert facts["vocab_size"] == 101 and facts["context_length"] == 64
        with pytest.raises(NybbleError, match="it: ValueError: no sequence was opened"):
            worker.run([1], "none")
        worker.ask("open")
        worker.run([1, 2], "none")
        assert worker.run([3, 4, 5], "all").shape == (3, 101)


def test_specs_as_objects(folder: Path) -> None:
    spec = ModelSpec(str(folder / "f32.gguf"), options={"threads": 1}, label="mine")
    found = evaluate([spec], text=folder / "text.txt", window=WINDOW, speed=False)
    assert found.reference.label == "mine" and found.reference.threads == 1


def test_a_worker_runs_this_very_nybble(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nybble").mkdir()
    (tmp_path / "nybble" / "__init__.py").write_text("raise SystemExit('another nybble')")
    monkeypatch.syspath_prepend(tmp_path)
    with Worker("it") as worker:
        facts = worker.ask("load", path=str(folder / "f32.gguf"), device="cpu", options={}, context_length=64)
    assert facts["vocab_size"] == 101
