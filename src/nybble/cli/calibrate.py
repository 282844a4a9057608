"""``nybble calibrate``: an importance matrix for quantizers, from a model and a text."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from nybble.cli import console
from nybble.cli.interrupt import interruptible
from nybble.cli.layers import LayerDisplay
from nybble.cli.options import add_model_argument, positive

if TYPE_CHECKING:
    from nybble.quantize.calibrate import Calibration

EPILOG = """\
The model runs over windows of the text, layer by layer, and the file says how much each input of each
linear matters: quantizers weigh their errors with it. llama.cpp reads it too.
Interrupted (Ctrl-C, or killed), the same command goes on where it was, from OUTPUT.calibration.

TEXT: text files, folders, or JSON lines of {"text": ...} or {"messages": [...]}, which go through the
model's chat template. Without it nybble's own text is taken, which has some 80 to 100 windows of 512.

examples:
  nybble calibrate smollm2 smollm2-imatrix.gguf
  nybble calibrate model.gguf imatrix.gguf --text chats.jsonl --text notes/ --windows 256
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``nybble calibrate``."""
    add_model_argument(parser)
    parser.add_argument("output", metavar="OUTPUT", help="the file to write: GGUF, or *.dat (legacy)")
    group = parser.add_argument_group("text")
    group.add_argument(
        "--text", metavar="TEXT", action="append", default=[], help="what to run; may be repeated"
    )
    group.add_argument("--windows", type=positive, metavar="N", help="windows of text (default: 64)")
    group.add_argument("--window", type=positive, metavar="L", help="tokens of each (default: 512)")
    group.add_argument("--seed", type=int, default=0, metavar="S", help="another seed draws other windows")
    group = parser.add_argument_group("device")
    group.add_argument(
        "--threads", type=positive, metavar="N", help="threads (default: the cores we may use)"
    )
    group.add_argument("--precision", choices=("fast", "f32"), default="fast", help="arithmetic of the model")
    group = parser.add_argument_group("output")
    group.add_argument("--overwrite", action="store_true", help="replace OUTPUT if it exists")
    group.add_argument("--json", action="store_true", help="print the report as one JSON object")
    group.add_argument("--quiet", action="store_true", help="no progress")


def run(arguments: argparse.Namespace) -> int:
    """Calibrate, and say what was done."""
    from nybble.hub.progress import progress_display
    from nybble.quantize.calibrate import STATE_SUFFIX, WINDOW, WINDOWS, calibrate

    display = LayerDisplay("calibrating", quiet=arguments.quiet)

    def work(calibration: Calibration) -> None:
        try:
            for _ in interruptible(calibration.run(), calibration.cancel):
                pass
        finally:
            display.close()

    try:
        with progress_display() as downloads:
            report = calibrate(
                arguments.model,
                arguments.output,
                text=arguments.text,
                windows=arguments.windows or WINDOWS,
                window=arguments.window or WINDOW,
                seed=arguments.seed,
                threads=arguments.threads,
                precision=arguments.precision,
                overwrite=arguments.overwrite,
                progress=display,
                download_progress=None if arguments.quiet else downloads,
                run=work,
            )
    except KeyboardInterrupt:
        state = Path(arguments.output + STATE_SUFFIX)
        if state.is_file():
            console.note(f"interrupted; the same command goes on from {state}")
        raise
    if arguments.json:
        console.write_json(report.to_json())
        return 0
    for text in report.notes:
        console.note(text)
    resumed = f", resumed at layer {report.resumed_layer}" if report.resumed_layer else ""
    console.write(
        f"{report.output}: {report.linears} linears, {report.windows} windows of {report.window} tokens,"
        f" {report.seconds:.1f} s{resumed}\n"
    )
    return 0
