"""evaluate: models side by side on the same windows of the same text.

Every model has a process of its own (``process.py``). The reference and the others advance together,
a few rows of logits at a time: the rows are measured and forgotten, so that neither a long text nor a
large vocabulary takes memory here. One model computes at a time, with all the threads it was given.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from nybble.errors import Cancelled, NybbleError, UnsupportedError
from nybble.evaluate import measures
from nybble.evaluate.benchmark import Measurement, load_average
from nybble.evaluate.options import EvaluationOptions
from nybble.evaluate.process import Worker
from nybble.evaluate.results import Evaluation, ModelResult
from nybble.evaluate.specs import ModelSpec, labelled, parse_spec
from nybble.evaluate.tally import Tally
from nybble.evaluate.vocabulary import OTHER_SPLIT, check_pieces, check_size, digest
from nybble.evaluate.windows import Window, Windows, tokens_of

if TYPE_CHECKING:
    from nybble.checkpoint.checkpoint import Checkpoint
    from nybble.evaluate.weights import WeightError
    from nybble.hub import ProgressCallback
    from nybble.text.tokenizer import Tokenizer

DECODE_TOKENS = 64
"""Tokens of the answer whose decoding is timed; the prompt is one window."""

_PIECE_BYTES = 48 << 20  # logits of one model that are held at a time
_MIN_ROWS = 16

Stage = Literal["load", "speed", "windows", "weights"]
Logits = npt.NDArray[np.float32]
T = TypeVar("T")


@dataclass(frozen=True)
class Step:
    """Progress of an evaluation, reported as it goes."""

    stage: Stage
    done: int
    """Models loaded, repetitions timed, windows done, or models whose weights were compared."""
    total: int
    label: str = ""
    """The model at work, where it is one."""
    seconds_left: float | None = None
    """Of this stage, as far as can be told."""


@dataclass
class _Contender:
    """A model while it is evaluated."""

    spec: ModelSpec
    path: Path
    worker: Worker
    tally: Tally
    facts: dict[str, Any] = field(default_factory=dict)
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    peak: int | None = None
    notes: list[str] = field(default_factory=list)
    failure: str | None = None


class Evaluator:
    """One evaluation: iterate over ``steps``, then take ``result``.

    ``cancel`` may be called from another thread: the models' processes end and ``steps`` raises.
    """

    def __init__(
        self,
        models: Iterable[ModelSpec | str | os.PathLike[str]],
        text: str | os.PathLike[str],
        options: EvaluationOptions,
        *,
        progress: ProgressCallback | None = None,
        offline: bool | None = None,
    ) -> None:
        specs = [m if isinstance(m, ModelSpec) else parse_spec(os.fspath(m)) for m in models]
        if not specs:
            raise ValueError("no model to evaluate was given")
        self._specs = [
            replace(spec, device=spec.device or options.device, options=options.of_model(spec))
            for spec in labelled(specs)
        ]
        self._file = None if isinstance(text, str) else Path(text)
        self._text = text if isinstance(text, str) else None
        if self._text is not None and _is_file(self._text):
            raise ValueError(f"text={text!r} is the name of a file: pass pathlib.Path({text!r})")
        self._options = options
        self._progress, self._offline = progress, offline
        self._workers: list[Worker] = []
        self._cancelled = False
        self._result: Evaluation | None = None

    @property
    def result(self) -> Evaluation:
        """What was found, once ``steps`` has ended."""
        if self._result is None:
            raise ValueError("the evaluation has not ended")
        return self._result

    def cancel(self) -> None:
        """End the models' processes; from any thread."""
        self._cancelled = True
        for worker in tuple(self._workers):
            worker.kill()

    def steps(self) -> Generator[Step, None, None]:
        """Do the work, a step at a time.

        Raises: as ``evaluate``.
        """
        from nybble.devices.report import processor

        started, load = time.perf_counter(), load_average()
        paths = [self._resolve(spec) for spec in self._specs]
        checkpoints = [_read(path) for path in paths]
        text = self._read_text()
        tokenizer, windows = self._cut(text, checkpoints[0], paths[0])
        with ExitStack() as stack:
            contenders: list[_Contender] = []
            for index, (spec, path) in enumerate(zip(self._specs, paths, strict=True)):
                yield Step("load", index, len(paths), spec.label)
                contenders.append(self._load(stack, spec, path, windows, is_reference=not index))
            reference, *others = contenders
            _check_vocabularies(reference, others, tokenizer, windows)
            if self._options.speed:
                yield from self._time(contenders)
            _check_splits(contenders, text, windows, self._options.tokens)
            yield from self._run(reference, others, windows)
        comparisons: dict[str, list[WeightError]] = {}
        if self._options.weights:
            yield from self._compare_weights(contenders, checkpoints, comparisons)
        self._result = Evaluation(
            text="(text)" if self._file is None else str(self._file),
            text_sha256=hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(),
            tokens=len(windows.tokens),
            window=windows.window,
            stride=windows.stride,
            windows=len(windows),
            scored=windows.scored,
            models=tuple(
                _result(
                    contender,
                    checkpoint,
                    reference=reference,
                    tokenizer=tokenizer,
                    windows=windows,
                    errors=comparisons.get(contender.spec.label, ()),
                )
                for contender, checkpoint in zip(contenders, checkpoints, strict=True)
            ),
            processor=processor(),
            load_average=load,
            version=_version(),
            seconds=time.perf_counter() - started,
        )

    # -- before anything runs ----------------------------------------------------------------------

    def _resolve(self, spec: ModelSpec) -> Path:
        from nybble.hub import resolve

        return resolve(spec.model, progress=self._progress, offline=self._offline)

    def _read_text(self) -> str:
        if self._text is not None:
            return self._text
        assert self._file is not None
        try:
            return self._file.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise UnsupportedError(
                f"{self._file}: is not UTF-8 text (byte {error.start}); convert it first"
            ) from None

    def _cut(self, text: str, checkpoint: Checkpoint | NybbleError, path: Path) -> tuple[Tokenizer, Windows]:
        if isinstance(checkpoint, NybbleError):
            from nybble.loading import read_checkpoint_for

            # A graph that is not recognised; its tokenizer is there all the same, or this raises.
            checkpoint = read_checkpoint_for(self._specs[0].device or self._options.device, path)
        if checkpoint.tokenizer is None:
            raise UnsupportedError(f"{path}: the reference has no tokenizer, which cuts the text into tokens")
        tokenizer = checkpoint.tokenizer.build()
        ids = tokens_of(tokenizer, text, self._options.tokens)
        return tokenizer, Windows(
            ids, self._options.window, self._options.stride, tokenizer.prefix, self._options.windows
        )

    # -- the models --------------------------------------------------------------------------------

    def _load(
        self, stack: ExitStack, spec: ModelSpec, path: Path, windows: Windows, *, is_reference: bool
    ) -> _Contender:
        worker = stack.enter_context(Worker(spec.label))
        self._workers.append(worker)
        if self._cancelled:
            worker.kill()
        needed = max(windows.window, DECODE_TOKENS)
        facts = worker.ask(
            "load", path=str(path), device=spec.device, options=dict(spec.options), context_length=needed
        )
        if facts["context_length"] < windows.window:
            raise NybbleError(
                f"{spec.label}: holds at most {facts['context_length']} tokens, fewer than a window of"
                f" {windows.window}: choose smaller windows"
            )
        tally = Tally(is_reference=is_reference, flips=self._options.flips)
        return _Contender(spec, path, worker, tally, facts)

    def _time(self, contenders: Sequence[_Contender]) -> Iterator[Step]:
        """Time all models in turns, so that a neighbour's load that comes and goes hits them alike."""
        total = self._options.repetitions * len(contenders)
        started = time.perf_counter()
        for number in range(total):
            contender = contenders[number % len(contenders)]
            left = (time.perf_counter() - started) / number * (total - number) if number else None
            yield Step("speed", number, total, contender.spec.label, left)
            found = contender.worker.ask("time", **_lengths(self._options.window, contender))
            contender.prefill.append(found["prefill"])
            contender.decode.append(found["decode"])
        for contender in contenders:
            contender.peak = contender.worker.ask("memory")["peak_bytes"]

    def _run(self, reference: _Contender, others: Sequence[_Contender], windows: Windows) -> Iterator[Step]:
        started = time.perf_counter()
        for number, window in enumerate(windows):
            left = None
            if number:
                left = (time.perf_counter() - started) / number * (len(windows) - number)
            yield Step("windows", number, len(windows), seconds_left=left)
            self._run_window(reference, others, window)
        yield Step("windows", len(windows), len(windows), seconds_left=0.0)

    def _run_window(self, reference: _Contender, others: Sequence[_Contender], window: Window) -> None:
        _begin(reference, window)
        for other in others:
            _attempt(other, _begin, window)
        rows = max(_MIN_ROWS, _PIECE_BYTES // (4 * reference.facts["vocab_size"]))
        for start in range(0, len(window.inputs), rows):
            inputs = window.inputs[start : start + rows]
            expected = _forward(reference, inputs)
            found = [_attempt(other, _forward, inputs) for other in others]
            alive = [(o, x) for o, x in zip(others, found, strict=True) if x is not None]
            measured = measures.measure(
                expected,
                [logits for _, logits in alive],
                window.targets[start : start + rows],
                threads=self._options.threads,
            )
            first = window.start + window.first_target + start
            positions = range(first, first + len(inputs))
            reference.tally.add(measured[0], positions)
            for (other, _), result in zip(alive, measured[1:], strict=True):
                other.tally.add(result, positions)

    def _check_cancelled(self, _: str) -> None:
        if self._cancelled:
            raise Cancelled("the evaluation was cancelled")

    def _compare_weights(
        self,
        contenders: Sequence[_Contender],
        checkpoints: Sequence[Checkpoint | NybbleError],
        found: dict[str, list[WeightError]],
    ) -> Iterator[Step]:
        from nybble.evaluate.weights import weight_errors

        first, total = checkpoints[0], len(contenders) - 1
        for index, (contender, checkpoint) in enumerate(zip(contenders[1:], checkpoints[1:], strict=True)):
            yield Step("weights", index, total, contender.spec.label)
            try:
                for read in (first, checkpoint):
                    if isinstance(read, NybbleError):
                        raise read
                assert not isinstance(first, NybbleError) and not isinstance(checkpoint, NybbleError)
                errors, notes = weight_errors(first, checkpoint, self._check_cancelled)
            except UnsupportedError as error:
                contender.notes.append(f"weights were not compared: {error}")
                continue
            found[contender.spec.label] = errors
            contender.notes += notes


def evaluate(
    models: Iterable[ModelSpec | str | os.PathLike[str]],
    *,
    text: str | os.PathLike[str],
    progress: ProgressCallback | None = None,
    offline: bool | None = None,
    **options: Any,
) -> Evaluation:
    """Compare models on a text: perplexity, KL divergence from the first, speed, size and memory.

    Args:
        models: names, paths or ``MODEL[@DEVICE][,OPTION=VALUE...]`` (see ``specs``); the first is the
            reference.
        text: a string is the text itself, a ``pathlib.Path`` a file with it, in UTF-8.
        progress: called while a model is downloaded; see ``nybble.hub.resolve``.
        offline: True: never download; None: what the environment says.
        options: fields of ``EvaluationOptions``.

    A model that fails after it was loaded has ``failure`` set, and the others go on.

    Raises:
        TypeError, ValueError: an option is unknown or out of range.
        WindowError: the text is shorter than a window.
        VocabularyError: tokens of a model do not mean what the reference's do.
        WorkerDied: the reference's process ended.
        NotFoundError, FormatError, UnsupportedError, DeviceError: a model cannot be loaded; see
            ``nybble.load``.
    """
    evaluator = Evaluator(models, text, EvaluationOptions(**options), progress=progress, offline=offline)
    for _ in evaluator.steps():
        pass
    return evaluator.result


# -- parts -----------------------------------------------------------------------------------------


def _is_file(text: str) -> bool:
    """Whether somebody gave a name where the text itself is wanted."""
    return len(text) < 1000 and "\n" not in text and os.path.isfile(text)


def _read(path: Path) -> Checkpoint | NybbleError:
    """The checkpoint, or why it has none that nybble understands: ONNX Runtime may run it all the same."""
    from nybble.loading import read_checkpoint

    try:
        return read_checkpoint(path)
    except UnsupportedError as error:
        return error


def _begin(contender: _Contender, window: Window) -> None:
    contender.worker.ask("open")
    if window.context:
        contender.worker.run(window.context, "none")


def _attempt(contender: _Contender, work: Callable[..., T], *arguments: Any) -> T | None:
    """What ``work`` returns; None once the model has failed, which ends its part and no other's."""
    if contender.failure is not None:
        return None
    try:
        return work(contender, *arguments)
    except NybbleError as error:
        contender.failure = str(error).removeprefix(f"{contender.spec.label}: ")
        return None


def _forward(contender: _Contender, tokens: Sequence[int]) -> Logits:
    logits = contender.worker.run(tokens, "all")
    if not np.isfinite(logits).all():
        raise NybbleError(f"{contender.spec.label}: its logits are not all finite numbers")
    return logits


def _lengths(window: int, contender: _Contender) -> dict[str, int]:
    longest = contender.facts["context_length"]
    return {"prefill": min(window, longest), "decode": min(DECODE_TOKENS, longest)}


def _check_vocabularies(
    reference: _Contender, others: Sequence[_Contender], tokenizer: Tokenizer, windows: Windows
) -> None:
    """Every token of the text must be the same token of every model."""
    used = [int(i) for i in np.unique(windows.tokens)]
    expected = [tokenizer.token_bytes(i).hex() for i in used]
    name = reference.spec.label
    for other in others:
        check_size(other.spec.label, other.facts["vocab_size"], name, reference.facts["vocab_size"])
        if other.facts["has_tokenizer"]:
            pieces = other.worker.ask("vocabulary", ids=used)["pieces"]
            check_pieces(other.spec.label, pieces, name, expected, used)
        else:
            other.notes.append("has no tokenizer: its tokens were taken to be the reference's")


def _check_splits(contenders: Sequence[_Contender], text: str, windows: Windows, count: int | None) -> None:
    """Note models whose own tokenizer would have cut the text otherwise; all get the reference's tokens."""
    expected = digest(windows.tokens)
    for contender in contenders[1:]:
        if contender.facts["has_tokenizer"]:
            found = contender.worker.ask("split", text=text, count=count)["digest"]
            if found != expected:
                contender.notes.append(OTHER_SPLIT)


def _result(
    contender: _Contender,
    checkpoint: Checkpoint | NybbleError,
    *,
    reference: _Contender,
    tokenizer: Tokenizer,
    windows: Windows,
    errors: Sequence[WeightError],
) -> ModelResult:
    from nybble.evaluate.weights import parameters, stored_bytes

    facts, spec = contender.facts, contender.spec
    readable = None if isinstance(checkpoint, NybbleError) else checkpoint
    quality = None if contender.failure else contender.tally.quality(reference.tally)
    prefill, decode = None, None
    if contender.prefill:
        lengths = _lengths(windows.window, contender)
        prefill = Measurement("prefill", lengths["prefill"], 0, tuple(contender.prefill))
        decode = Measurement("decode", lengths["decode"], 0, tuple(contender.decode))
    return ModelResult(
        label=spec.label,
        model=spec.model,
        path=str(contender.path),
        device=spec.device or "",
        format=facts["format"],
        options=dict(spec.options),
        threads=facts["threads"],
        weight_bytes=stored_bytes(contender.path, readable) if readable else facts["weight_bytes"],
        parameters=parameters(readable) if readable else None,
        load_seconds=facts["load_seconds"],
        quality=quality,
        flips=() if contender.failure else contender.tally.flips(tokenizer, windows.tokens),
        prefill=prefill,
        decode=decode,
        peak_memory_bytes=contender.peak,
        weight_errors=tuple(errors),
        notes=tuple(contender.notes),
        failure=contender.failure,
    )


def _version() -> str:
    import nybble

    return nybble.__version__
