"""``nybble quantize``: a model with fewer bits, by a recipe or for a budget."""

from __future__ import annotations

import argparse
from pathlib import Path

from nybble.cli import console
from nybble.cli.convert import add_output_arguments, report_text, size_of, tensor_encodings
from nybble.cli.layers import LayerDisplay
from nybble.cli.main import UsageError
from nybble.cli.options import positive

EPILOG = """\
A recipe says which tensor gets what, and how it is rounded: llama.cpp's mixes for GGUF (q4_k_m, q8_0, ...),
int4-awq, int4-gptq, int4-rtn, int8 for safetensors, onnx-cpu-int4, onnx-dml-int4, ... for ONNX Runtime.
"nybble quantize --list" shows them all. MODEL.toml of your own works too: docs/quantization.md.

--method awq or gptq looks at what the layers' inputs are like, on --text or nybble's own text, and needs
no GPU: it goes layer by layer. Interrupted (Ctrl-C, or killed), the same command goes on where it was,
from OUTPUT.quantizing.

examples:
  nybble quantize model-folder model.gguf --recipe q4_k_m
  nybble quantize model-folder model.gguf --recipe q4_k_m --importance imatrix.gguf
  nybble quantize model-folder awq-folder --recipe int4-awq --text wiki.txt
  nybble quantize model-folder onnx-folder --recipe onnx-dml-int4
  nybble quantize model-folder model.gguf --bits-per-weight 4.5
  nybble quantize model-folder model.gguf --recipe q4_0 --method gptq --tensor-encoding "*.v_proj.weight=q6_k"
"""
_DEFAULT = "q4_k_m"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``nybble quantize``."""
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", help="known name, GGUF file, folder, URL, hf:owner/repo, ..."
    )
    parser.add_argument("output", metavar="OUTPUT", nargs="?", help="the GGUF file or the folder to write")
    parser.add_argument("--list", action="store_true", help="list the recipes")
    group = parser.add_argument_group("what becomes what")
    group.add_argument(
        "--recipe", metavar="NAME", help=f"a recipe, or a file NAME.toml (default: {_DEFAULT})"
    )
    group.add_argument(
        "--bits-per-weight",
        type=float,
        metavar="B",
        help="the best mix of this size, from measured sensitivities, instead of a recipe",
    )
    group.add_argument(
        "--tensor-encoding",
        metavar="PATTERN=NAME",
        action="append",
        default=[],
        help="an encoding, or keep, for tensors whose name matches; may be repeated, the first counts",
    )
    group.add_argument(
        "--to", metavar="TARGET", help="gguf, safetensors, or an ONNX target (default: the recipe's)"
    )
    group.add_argument("--quantization", metavar="Q", help="safetensors: awq, gptq or compressed-tensors")
    group = parser.add_argument_group("how it is rounded")
    group.add_argument("--method", metavar="M", help="rtn, awq, gptq or awq+gptq (default: the recipe's)")
    group.add_argument(
        "--importance", metavar="FILE", help='an importance matrix ("nybble calibrate", llama.cpp)'
    )
    group.add_argument(
        "--text", metavar="TEXT", action="append", default=[], help="what to calibrate on; may be repeated"
    )
    group.add_argument("--windows", type=positive, metavar="N", help="windows of text (default: 64)")
    group.add_argument("--window", type=positive, metavar="L", help="tokens of each (default: 512)")
    group.add_argument("--seed", type=int, default=0, metavar="S", help="another seed draws other windows")
    group.add_argument(
        "--threads", type=positive, metavar="N", help="threads (default: the cores we may use)"
    )
    group.add_argument(
        "--precision", choices=("fast", "f32"), default="fast", help="arithmetic while calibrating"
    )
    add_output_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Quantize, and print the report."""
    from nybble.hub.progress import progress_display
    from nybble.quantize.calibrate import WINDOW, WINDOWS
    from nybble.quantize.quantize import CalibrationOptions, quantize
    from nybble.quantize.spool import SUFFIX

    if arguments.list:
        _print_recipes()
        return 0
    if arguments.model is None or arguments.output is None:
        raise UsageError("MODEL and OUTPUT are needed")
    if arguments.bits_per_weight is not None and arguments.recipe is not None:
        raise UsageError("--recipe and --bits-per-weight both say what tensors become: name one of them")
    display = LayerDisplay("quantizing", quiet=arguments.quiet)
    try:
        with progress_display() as progress:
            report = quantize(
                arguments.model,
                arguments.output,
                arguments.recipe or _DEFAULT,
                to=arguments.to,
                method=arguments.method,
                importance=arguments.importance,
                calibration=CalibrationOptions(
                    text=arguments.text,
                    windows=arguments.windows or WINDOWS,
                    window=arguments.window or WINDOW,
                    seed=arguments.seed,
                    precision=arguments.precision,
                ),
                encodings=tensor_encodings(arguments.tensor_encoding),
                bits_per_weight=arguments.bits_per_weight,
                quantization=arguments.quantization,
                threads=arguments.threads,
                overwrite=arguments.overwrite,
                split_bytes=None if arguments.split_size is None else size_of(arguments.split_size),
                progress=display,
                file_progress=None if arguments.quiet else progress,
            )
    except KeyboardInterrupt:
        display.close()
        output = Path(arguments.output)
        state = output.with_name(output.name + SUFFIX)
        if state.is_dir():
            console.note(f"interrupted; the same command goes on from {state}")
        raise
    finally:
        display.close()
    if arguments.json:
        console.write_json(report.to_json())
    else:
        console.write(report_text(report, each=arguments.tensors))
    return 0


def _print_recipes() -> None:
    from nybble.quantize.recipe import read_recipe, recipe_names

    recipes = [read_recipe(name) for name in recipe_names()]
    rows = [(recipe.name, recipe.to, recipe.method, recipe.description) for recipe in recipes]
    console.write(console.table(("RECIPE", "FOR", "METHOD", "WHAT"), rows, ()))
