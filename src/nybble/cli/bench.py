"""``nybble bench``: how fast a model prefills and decodes here, with spread."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from nybble.cli import console
from nybble.cli.loading import load
from nybble.cli.main import UsageError
from nybble.cli.options import add_load_arguments, add_model_argument, positive

if TYPE_CHECKING:
    from nybble.checkpoint.checkpoint import Checkpoint
    from nybble.evaluate.benchmark import Measurement

EPILOG = """\
Prefill computes a prompt at once, decode one token a call; depth is how many tokens the cache holds
before. Each is repeated after a warm-up that is not counted; the table has the median and the slowest
and fastest repetition. Tokens are random and nothing is sampled.

examples:
  nybble bench smollm2
  nybble bench smollm2 --prefill 128,512 --decode 64 --depth 0,1024 --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``nybble bench``."""
    add_model_argument(parser)
    what = parser.add_argument_group("what is measured")
    what.add_argument(
        "--prefill",
        type=lengths,
        default=[512],
        metavar="N,...",
        help="prompt lengths (default: 512; 0: none)",
    )
    what.add_argument(
        "--decode", type=lengths, default=[64], metavar="N,...", help="answer lengths (default: 64; 0: none)"
    )
    what.add_argument(
        "--depth", type=lengths, default=[0], metavar="N,...", help="tokens in the cache before (default: 0)"
    )
    what.add_argument(
        "--repetitions", type=positive, default=5, metavar="N", help="how often each is timed (default: 5)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_load_arguments(parser)


def lengths(text: str) -> list[int]:
    """``0,1024`` as numbers, none of them negative."""
    values = [int(part) for part in text.split(",")]
    if min(values) < 0:
        raise argparse.ArgumentTypeError(f"{text!r}: a length is negative")
    return values


def run(arguments: argparse.Namespace) -> int:
    """Load, measure, print."""
    from nybble.devices.report import DEFAULT_DEVICE, instruction_set, processor
    from nybble.evaluate.benchmark import load_average, measure, peak_memory

    prefill = [length for length in arguments.prefill if length]
    decode = [length for length in arguments.decode if length]
    if not prefill and not decode:
        raise UsageError("nothing to measure: --prefill and --decode are both 0")
    device = arguments.device or DEFAULT_DEVICE
    before = load_average()
    model = load(arguments)
    results = []
    for result in measure(
        model.session,
        prefill=prefill,
        decode=decode,
        depths=arguments.depth,
        repetitions=arguments.repetitions,
    ):
        results.append(result)
        if sys.stderr.isatty():
            console.note(f"{result.phase} of {result.tokens} at depth {result.depth}: done")
    facts = {
        "model": arguments.model,
        "size_bytes": _weight_bytes(model.checkpoint),
        "processor": processor(),
        "device": device,
        "isa": instruction_set() if device == "cpu" else None,
        "threads": getattr(model.session, "threads", None),
        "load_average_before": before,
        "load_seconds": model.load_seconds,
        "peak_memory_bytes": peak_memory(),
        "repetitions": arguments.repetitions,
    }
    if arguments.json:
        console.write_json({**facts, "results": [_result_json(result) for result in results]})
    else:
        console.write(_text(facts, results))
    return 0


def _weight_bytes(checkpoint: Checkpoint | None) -> int | None:
    """Bytes of the weights, wherever they are: a model that ONNX Runtime holds has no tensors here."""
    if checkpoint is None:
        return None
    elsewhere = checkpoint.metadata.get("onnx.weight_bytes")
    return checkpoint.nbytes or (elsewhere if isinstance(elsewhere, int) else 0)


def _text(facts: dict[str, Any], results: list[Measurement]) -> str:
    shown = {
        "model": facts["model"],
        "weights": console.size(facts["size_bytes"]) if facts["size_bytes"] is not None else None,
        "processor": facts["processor"],
        "device": facts["device"],
        "instruction set": facts["isa"],
        "threads": facts["threads"],
        "load before": facts["load_average_before"],
        "loaded in": f"{facts['load_seconds']:.2f} s",
        "peak memory": console.size(facts["peak_memory_bytes"]) if facts["peak_memory_bytes"] else None,
        "repetitions": facts["repetitions"],
    }
    rows = [
        (
            result.phase,
            result.tokens,
            result.depth,
            f"{result.median:.1f}",
            f"{result.spread[0]:.1f} .. {result.spread[1]:.1f}",
            f"{1000 / result.median * (result.tokens if result.phase == 'prefill' else 1):.2f}",
        )
        for result in results
    ]
    header = ("PHASE", "TOKENS", "DEPTH", "TOKENS/S", "SLOWEST .. FASTEST", "MS/CALL")
    facts_text = console.pairs(
        ((name, value) for name, value in shown.items() if value is not None), indent=""
    )
    return facts_text + "\n" + console.table(header, rows, right=header[1:])


def _result_json(result: Measurement) -> dict[str, Any]:
    slowest, fastest = result.spread
    return {
        "phase": result.phase,
        "tokens": result.tokens,
        "depth": result.depth,
        "tokens_per_second": {"median": result.median, "slowest": slowest, "fastest": fastest},
        "seconds": list(result.seconds),
    }
