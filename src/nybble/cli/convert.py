"""``nybble convert``: a model from one format to another."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

from nybble.cli import console
from nybble.cli.main import UsageError
from nybble.cli.options import adapter, add_model_argument

if TYPE_CHECKING:
    from nybble.convert.report import Report

EPILOG = """\
A tensor keeps its encoding where the target can hold it, or gets one that holds the same values.
Where there is none, nothing is written, and the message lists the tensors and the choices.
Beside the output stands a manifest; "nybble verify OUTPUT" compares the two.

TARGET: gguf, safetensors, onnx (nothing is lost), or what an ONNX runtime wants, which may lose
something and says so: onnx-cpu-int4, onnx-cuda-fp16, onnx-cuda-int4, onnx-dml-int4, ...

examples:
  nybble convert smollm2 smollm2-folder --to safetensors
  nybble convert hf:owner/repo model.gguf --encoding q8_0
  nybble convert model.gguf folder --to onnx-cpu-int4
  nybble convert model.gguf merged.gguf --adapter pirate:0.8 --allow-lossy
  nybble convert pirate-folder pirate.gguf --base model.gguf
  nybble convert folder model.gguf --encoding q4_0 --tensor-encoding "lm_head.weight=q8_0"
"""
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``nybble convert``."""
    add_model_argument(parser)
    parser.add_argument("output", metavar="OUTPUT", help="the GGUF file or the folder to write")
    parser.add_argument(
        "--to", metavar="TARGET", help="what to write (default: gguf if OUTPUT ends in .gguf)"
    )
    group = parser.add_argument_group("encodings")
    group.add_argument(
        "--encoding", metavar="NAME", help="what every matrix becomes: f16, q8_0, int4_g32_f16, ..."
    )
    group.add_argument(
        "--tensor-encoding",
        metavar="PATTERN=NAME",
        action="append",
        default=[],
        help="the same for tensors whose name matches (*.mlp.*=q8_0); may be repeated, the first counts",
    )
    group.add_argument(
        "--allow-lossy", action="store_true", help="go on where something is lost; the report says what"
    )
    group.add_argument("--method", metavar="M", help="how an ONNX target without one makes integers: rtn")
    group.add_argument(
        "--quantization",
        metavar="Q",
        help="safetensors: awq, gptq or compressed-tensors, how integers are packed",
    )
    group = parser.add_argument_group("LoRA")
    group.add_argument(
        "--adapter",
        type=adapter,
        metavar="PATH[:WEIGHT]",
        action="append",
        default=[],
        help="merge an adapter (PEFT folder or GGUF file), at weight 1 unless given; may be repeated",
    )
    group.add_argument("--base", metavar="BASE", help="where MODEL is an adapter: the model it belongs to")
    add_output_arguments(parser)


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Options about a model that is written, and the report of it."""
    group = parser.add_argument_group("output")
    group.add_argument("--overwrite", action="store_true", help="replace OUTPUT if it exists")
    group.add_argument("--split-size", metavar="SIZE", help="most bytes of tensors in a file: 2G, 500M")
    group.add_argument("--tensors", action="store_true", help="report every tensor on its own")
    group.add_argument("--json", action="store_true", help="print the report as one JSON object")
    group.add_argument("--quiet", action="store_true", help="no progress")


def run(arguments: argparse.Namespace) -> int:
    """Convert, and print the report."""
    from nybble.convert.convert import convert
    from nybble.hub.progress import progress_display

    to = arguments.to or ("gguf" if arguments.output.endswith(".gguf") else None)
    if to is None:
        raise UsageError("--to is needed: gguf, safetensors, onnx or the name of an ONNX target")
    with progress_display() as progress:
        report = convert(
            arguments.model,
            arguments.output,
            to=to,
            encoding=arguments.encoding,
            encodings=tensor_encodings(arguments.tensor_encoding),
            allow_lossy=arguments.allow_lossy,
            overwrite=arguments.overwrite,
            method=arguments.method,
            quantization=arguments.quantization,
            split_bytes=None if arguments.split_size is None else size_of(arguments.split_size),
            adapters=arguments.adapter,
            base=arguments.base,
            progress=None if arguments.quiet else progress,
        )
    if arguments.json:
        console.write_json(report.to_json())
    else:
        console.write(report_text(report, each=arguments.tensors))
    return 0


def tensor_encodings(options: list[str]) -> dict[str, str]:
    """``PATTERN=NAME`` options as a mapping; of several that name a pattern the first counts."""
    found: dict[str, str] = {}
    for option in options:
        pattern, separator, name = option.rpartition("=")
        if not separator or not pattern or not name:
            raise UsageError(f"--tensor-encoding {option!r} is not PATTERN=NAME")
        found.setdefault(pattern, name)
    return found


def size_of(text: str) -> int:
    """``2G``, ``500M`` in bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgt]?)b?", text.lower())
    if match is None or not float(match[1]):
        raise UsageError(f"--split-size {text!r} is not a size such as 2G or 500M")
    return int(float(match[1]) * _UNITS[match[2]])


def report_text(report: Report, *, each: bool) -> str:
    """The report as a table; ``each``: a row for every tensor."""
    rows = report.tensor_rows() if each else report.rows()
    lossy = sum(tensor.relation != "exact" for tensor in report.tensors)
    verdict = f"{lossy} of {len(report.tensors)} tensors are lossy" if lossy else "every tensor is exact"
    return "".join(
        [
            console.table(report.HEADER, rows, report.RIGHT),
            "\n",
            *(f"note: {note}\n" for note in report.notes),
            f"{report.target}: {console.size(report.nbytes)} of tensors,"
            f" {report.bits_per_weight:.4g} bits a weight, {verdict}; {report.seconds:.1f} s\n",
        ]
    )
