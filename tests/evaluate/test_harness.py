"""The adapter for lm-evaluation-harness, with the real package where it is installed.

Elsewhere the tests are skipped; with ``NYBBLE_REQUIRE_HARNESS=1`` they fail.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import nybble
from support.required import missing

if importlib.util.find_spec("lm_eval") is None:
    missing("NYBBLE_REQUIRE_HARNESS", "lm_eval is not installed", "pip install nybble[evaluate]", module=True)
pytestmark = [pytest.mark.filterwarnings("default")]  # of its many libraries

from nybble.evaluate.harness import NybbleLM, _completed  # noqa: E402
from nybble.evaluate.measures import log_likelihoods  # noqa: E402

ROOT = Path(__file__).parents[2]


def request(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


@pytest.fixture(scope="module")
def adapter(folder: Path) -> Iterator[NybbleLM]:
    with nybble.load(folder / "f32.gguf", precision="f32", kv_cache="f32", context_length=64) as model:
        yield NybbleLM(model)


def plain(adapter: NybbleLM, context: list[int], targets: list[int]) -> tuple[float, bool]:
    """Log-likelihood from all logits at once."""
    logits = adapter.model.logits([*context, *targets[:-1]])[len(context) - 1 :]
    values, best = log_likelihoods(logits, targets)
    return float(values.sum()), bool(best.all())


def test_log_likelihoods(adapter: NybbleLM) -> None:
    tokenizer = adapter.model.tokenizer
    pairs = [
        ("abc def", " gh"),
        ("abc", " d e f"),
        ("abc def", " ij k"),
        ("", "abc"),
        ("abc ", "x"),
        ("z", ""),
    ]
    found = adapter.loglikelihood([request(*pair) for pair in pairs], disable_tqdm=True)
    for (context, continuation), (value, greedy) in zip(pairs[:5], found, strict=False):
        whole = tokenizer.encode(context + continuation)
        before = tokenizer.encode(context.rstrip()) if context else [tokenizer.bos_id]
        expected, best = plain(adapter, before, whole[len(before) :])
        assert value == pytest.approx(expected, rel=1e-4), (context, continuation)
        assert greedy == best
    assert found[5] == (0.0, True)


def test_greedy_continuations_are_greedy(adapter: NybbleLM) -> None:
    tokens = adapter.model.tokenizer.encode("abc def")
    sequence = list(tokens)
    for _ in range(4):
        sequence.append(int(adapter.model.logits(sequence)[-1].argmax()))
    value, greedy = adapter._score(tokens, sequence[len(tokens) :])
    assert greedy and value == pytest.approx(plain(adapter, tokens, sequence[len(tokens) :])[0], rel=1e-4)
    other = [*sequence[len(tokens) : -1], (sequence[-1] + 1) % 100]
    assert not adapter._score(tokens, other)[1]


def test_what_is_too_long_loses_its_beginning(adapter: NybbleLM) -> None:
    tokens = adapter.model.tokenizer.encode("a b c d e f g h i j " * 10)
    value, _ = adapter._score(tokens[:90], tokens[90:95])
    expected, _ = plain(adapter, tokens[95 - 65 : 90], tokens[90:95])
    assert value == pytest.approx(expected, rel=1e-4)


def test_rolling(adapter: NybbleLM) -> None:
    text = "ab cd ef gh ij kl mn " * 10
    (found,) = adapter.loglikelihood_rolling([request(text)], disable_tqdm=True)
    tokenizer = adapter.model.tokenizer
    tokens = tokenizer.encode(text, add_special=False)
    assert len(tokens) > 128  # more than two windows
    first, _ = plain(adapter, [tokenizer.bos_id], tokens[:64][:63])
    assert found < first
    assert np.isfinite(found)
    short = tokens[:20]
    (found,) = adapter.loglikelihood_rolling([request(tokenizer.decode(short))], disable_tqdm=True)
    assert found == pytest.approx(plain(adapter, [tokenizer.bos_id], short)[0], rel=1e-4)


def test_answers(adapter: NybbleLM) -> None:
    whole, cut, empty = adapter.generate_until(
        [
            request("abc", {"max_gen_toks": 12, "do_sample": False, "until": []}),
            request("abc", {"max_gen_toks": 12, "until": ["\n\n", "zzz"], "temperature": 0.0}),
            request("", {"max_gen_toks": 3}),
        ],
        disable_tqdm=True,
    )
    assert whole == adapter.model.generate("abc", max_tokens=12, temperature=0)
    assert whole.startswith(cut) and isinstance(empty, str)
    stop = whole[3:5]
    (stopped,) = adapter.generate_until(
        [request("abc", {"max_gen_toks": 12, "until": stop})], disable_tqdm=True
    )
    assert stopped == whole[: whole.index(stop)]
    with pytest.raises(ValueError, match="no option for num_beams"):
        adapter.generate_until([request("a", {"num_beams": 4})], disable_tqdm=True)
    with pytest.raises(ValueError, match="leaves no room"):
        adapter.generate_until([request("a", {"max_gen_toks": 64})], disable_tqdm=True)


def test_chat(adapter: NybbleLM) -> None:
    history = [{"role": "user", "content": "abc"}]
    assert adapter.apply_chat_template(history) == "abc"
    assert adapter.chat_template(True) == adapter.model.checkpoint.chat_template
    assert adapter.chat_template(False) is None
    assert adapter.tokenizer_name == "nybble"


@pytest.mark.parametrize(
    ("given", "added"),
    [
        (["--tasks", "x"], ["--model", "nybble", "--device", "cpu"]),
        (["run", "--tasks=x", "--device=onnxruntime:cpu"], ["--model", "nybble"]),
        (["--model", "hf", "--device", "cpu"], []),
        (["--model=hf"], ["--device", "cpu"]),
        (["ls", "tasks"], []),
        (["--help"], []),
        (["--config", "x.yaml"], []),
        ([], []),
    ],
)
def test_the_command_is_completed(given: list[str], added: list[str]) -> None:
    assert _completed(given) == given + added


@pytest.mark.slow
@pytest.mark.real_model
def test_local_tasks_with_the_command(smollm2_path: Path, tmp_path: Path) -> None:
    """The documented command, on the examples' files, without a network."""
    command = [sys.executable, "-m", "nybble.evaluate.harness", "--model_args", f"pretrained={smollm2_path}"]
    command += ["--tasks", "capitals,arithmetic_words", "--include_path", "examples/tasks"]
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"),
    }  # fmt: skip
    done = subprocess.run(
        [*command, "--output_path", str(tmp_path / "results")], cwd=ROOT, env=environment,
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (path,) = (tmp_path / "results").rglob("results_*.json")
    results = json.loads(path.read_text(encoding="utf-8"))["results"]
    assert results["capitals"]["acc,none"] >= 0.6
    assert results["arithmetic_words"]["exact_match,number"] > 0
