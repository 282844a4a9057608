"""``nybble evaluate``: models side by side on one text: quality, size, speed, memory."""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from nybble.cli import console
from nybble.cli.interrupt import interruptible
from nybble.cli.main import UsageError
from nybble.cli.options import positive

if TYPE_CHECKING:
    from nybble.evaluate.compare import Step
    from nybble.evaluate.limits import Limit
    from nybble.evaluate.options import EvaluationOptions
    from nybble.evaluate.results import Evaluation, Flip, ModelResult

EPILOG = """\
The first model is the reference: the others are told by how far their predictions are from its. All get
the same tokens in the same windows, those of llama.cpp's llama-perplexity. A model is a name or a path;
@DEVICE says where it runs, and options follow after commas: precision, kv_cache, threads, label.

--fail-if MEASURE OPERATOR NUMBER: exit code 1 if a model other than the reference is so. Measures:
perplexity, kld, kld_median, kld99, kld_max, top1, flips, size, bits, prefill, decode, memory; with
_ratio after the name, divided by the reference's. A number may end in %, k, M or G.

examples:
  nybble evaluate model-f16.gguf model-q4_k_m.gguf --text wiki.txt
  nybble evaluate folder model.gguf onnx-folder@onnxruntime:cpu --text wiki.txt --html report.html
  nybble evaluate smollm2,precision=f32,kv_cache=f32,label=f32 smollm2 --text wiki.txt --windows 8
  nybble evaluate a.gguf b.gguf --text wiki.txt --no-speed --fail-if "kld>0.05" --fail-if "top1<95%"
"""

_LINE_SECONDS = 10.0  # between lines of progress where standard error is no terminal
_RUNTIME_MEASURES = ("prefill", "decode", "memory")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``nybble evaluate``."""
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL[@DEVICE][,OPTION=VALUE]",
        help="known name, GGUF file, folder, URL, ...; the first is the reference",
    )
    parser.add_argument("--text", required=True, metavar="FILE", help="the text, UTF-8")
    windows = parser.add_argument_group("windows")
    windows.add_argument("--window", type=positive, default=512, metavar="N", help="tokens (default: 512)")
    windows.add_argument(
        "--stride",
        type=positive,
        metavar="N",
        help="tokens between beginnings of windows, of which the last N count"
        " (default: side by side, second halves count)",
    )
    windows.add_argument("--tokens", type=positive, metavar="N", help="use the first N tokens of the text")
    windows.add_argument("--windows", type=positive, metavar="N", help="use the first N windows")
    what = parser.add_argument_group("what is measured")
    what.add_argument("--no-speed", action="store_true", help="leave out prefill, decode and peak memory")
    what.add_argument(
        "--repetitions", type=positive, default=3, metavar="N", help="how often each is timed (default: 3)"
    )
    what.add_argument(
        "--weights", action="store_true", help="compare the weights too, tensor by tensor (--html does)"
    )
    what.add_argument(
        "--flips", type=int, default=10, metavar="N", help="list N flips of each model (default: 10)"
    )
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one JSON object")
    output.add_argument("--html", metavar="FILE", help="write a report with plots")
    output.add_argument(
        "--fail-if", action="append", default=[], metavar="LIMIT",
        help='exit code 1 if a model is so: "kld>0.05"; may be repeated',
    )  # fmt: skip
    output.add_argument("--quiet", action="store_true", help="no progress")
    device = parser.add_argument_group("device, for models that name none")
    device.add_argument(
        "--device", metavar="D", help="where to run (default: cpu; nybble devices lists them)"
    )
    device.add_argument(
        "--threads", type=positive, metavar="N", help="threads (default: the cores we may use)"
    )
    device.add_argument("--precision", metavar="P", help="arithmetic: fast (default) or f32, the reference")
    device.add_argument(
        "--kv-cache", metavar="E", help="encoding of the KV cache: f32, f16, bf16, q8_0 or q4_0"
    )


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, print, and judge."""
    from nybble.evaluate.compare import Evaluator
    from nybble.evaluate.limits import broken
    from nybble.hub.progress import progress_display

    limits = _limits(arguments)
    if arguments.html is not None and not Path(arguments.html).absolute().parent.is_dir():
        raise UsageError(f"--html {arguments.html}: there is no such folder")
    with progress_display() as progress:
        try:
            evaluator = Evaluator(
                arguments.models,
                Path(arguments.text),
                _options(arguments),
                progress=None if arguments.quiet else progress,
            )
        except ValueError as error:
            raise UsageError(str(error)) from error
        display = _Display(None if arguments.quiet else sys.stderr)
        try:
            for step in interruptible(evaluator.steps(), evaluator.cancel):
                display.show(step)
        finally:
            display.clear()
    evaluation = evaluator.result
    if arguments.html is not None:
        from nybble.evaluate.report_html import write_report

        write_report(evaluation, arguments.html)
        console.note(f"wrote {arguments.html}")
    if arguments.json:
        console.write_json(evaluation.to_json())
    else:
        console.write(_text(evaluation))
    problems = [f"{m.label}: failed: {m.failure}" for m in evaluation.models if m.failure is not None]
    problems += broken(evaluation, limits)
    for problem in problems:
        console.error(console.printable(problem))
    return 1 if problems else 0


def _options(arguments: argparse.Namespace) -> EvaluationOptions:
    """The options that the user gave; ValueError where one is out of range."""
    from nybble.evaluate.options import EvaluationOptions

    names = ("window", "stride", "tokens", "windows", "device", "threads", "precision", "kv_cache")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    return EvaluationOptions(
        speed=not arguments.no_speed,
        repetitions=arguments.repetitions,
        weights=arguments.weights or arguments.html is not None,
        flips=arguments.flips,
        **given,
    )


def _limits(arguments: argparse.Namespace) -> list[Limit]:
    from nybble.evaluate.limits import LimitError, parse_limit

    try:
        limits = [parse_limit(text) for text in arguments.fail_if]
    except LimitError as error:
        raise UsageError(f"--fail-if {error}") from error
    if limits and len(arguments.models) < 2:
        raise UsageError("--fail-if judges models beside the reference, and there is none")
    for limit in limits:
        if arguments.no_speed and limit.measure in _RUNTIME_MEASURES:
            raise UsageError(f"--fail-if {limit.text!r} asks for what --no-speed leaves out")
    return limits


# -- text --------------------------------------------------------------------------------------------

_HEADER = ("MODEL", "PERPLEXITY", "KL DIVERGENCE", "KL 99%", "SAME TOP", "SIZE", "BITS/WEIGHT",
           "PREFILL/S", "DECODE/S", "MEMORY")  # fmt: skip


def _text(evaluation: Evaluation) -> str:
    parts = [
        f"{evaluation.scored:,} tokens in {evaluation.windows:,} windows of {evaluation.window:,},"
        f" reference {console.printable(evaluation.reference.label)}\n\n",
        console.table(_HEADER, map(_row, evaluation.models), right=_HEADER[1:]),
    ]
    for model in evaluation.models:
        parts += [f"\nnote: {console.printable(model.label)}: {console.printable(n)}\n" for n in model.notes]
    for model in evaluation.others:
        if model.flips and model.quality is not None:
            parts.append(f"\n{len(model.flips)} of {model.quality.flips:,} flips of ")
            parts.append(console.heading(console.printable(model.label)))
            header = ("AT", "CONTEXT", "TEXT", "REFERENCE", "", "MODEL", "")
            parts.append(console.table(header, map(_flip_row, model.flips), right=("AT", "")))
    return "".join(parts)


def _row(model: ModelResult) -> tuple[str, ...]:
    from nybble.evaluate import numerals

    quality, bits = model.quality, model.bits_per_weight
    return (
        model.label,
        numerals.estimate(quality.perplexity) if quality else "failed",
        numerals.estimate(quality.kld) if quality else "-",
        numerals.estimate(quality.kld99) if quality else "-",
        numerals.percent(quality.top1) if quality else "-",
        numerals.size(model.weight_bytes),
        "-" if bits is None else f"{bits:.2f}",
        numerals.rate(None if model.prefill is None else model.prefill.median),
        numerals.rate(None if model.decode is None else model.decode.median),
        numerals.size(model.peak_memory_bytes),
    )


def _flip_row(flip: Flip) -> tuple[str, ...]:
    return (
        f"{flip.position:,}",
        "…" + flip.context[-32:],
        repr(flip.actual),
        repr(flip.reference_token),
        f"{flip.reference_probability:.1%}",
        repr(flip.token),
        f"{flip.probability:.1%}",
    )


# -- progress ----------------------------------------------------------------------------------------


class _Display:
    """One line on a terminal that is written over, or a line now and then in a log."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._last = ("", 0.0)

    def show(self, step: Step) -> None:
        """Tell where the evaluation is."""
        if self._stream is None:
            return
        text = console.printable(_describe(step))
        if self._stream.isatty():
            self._write(f"\r{text}\x1b[K")
        elif step.stage != self._last[0] or time.monotonic() - self._last[1] >= _LINE_SECONDS:
            self._last = (step.stage, time.monotonic())
            self._write(text + "\n")

    def clear(self) -> None:
        """Leave no half line behind."""
        if self._stream is not None and self._stream.isatty():
            self._write("\r\x1b[K")

    def _write(self, text: str) -> None:
        assert self._stream is not None
        with suppress(OSError):
            self._stream.write(text)
            self._stream.flush()


def _describe(step: Step) -> str:
    from nybble.hub.progress import format_seconds

    left = "" if step.seconds_left is None else f", {format_seconds(step.seconds_left)} left"
    what = {
        "load": f"loading {step.label}",
        "speed": f"measuring the speed of {step.label}: {step.done} of {step.total} times",
        "windows": f"{step.done} of {step.total} windows",
        "weights": f"comparing the weights of {step.label}",
    }
    return what[step.stage] + left
