"""``nybble inspect``: what a model file holds. The file is mapped; no weight is read."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nybble.cli import console
from nybble.cli.options import add_model_argument

if TYPE_CHECKING:
    from nybble.checkpoint.checkpoint import Checkpoint

_LONGEST_VALUE = 100  # characters of a metadata value in a table
_LONGEST_ARRAY = 64  # elements that are shown in JSON; a vocabulary has 100,000

EPILOG = """\
Without an option: a summary. The options choose one part of it, whole.

examples:
  nybble inspect smollm2
  nybble inspect model.gguf --tensors
  nybble inspect smollm2 --template > template.jinja
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``nybble inspect``."""
    add_model_argument(parser)
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--tensors", action="store_true", help="every tensor: name, shape, encoding, size")
    part.add_argument("--template", action="store_true", help="the chat template alone")
    part.add_argument("--metadata", action="store_true", help="every key of the file")
    part.add_argument("--json", action="store_true", help="everything as one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Print what was asked for."""
    from nybble import hub
    from nybble.formats.adapter import is_adapter
    from nybble.hub.progress import progress_display

    with progress_display() as progress:
        path = hub.resolve(arguments.model, progress=progress)
    if is_adapter(path):
        return _adapter(path, arguments)
    checkpoint = _read(path)
    if arguments.json:
        console.write_json(_everything(checkpoint))
    elif arguments.tensors:
        console.write(_tensors(checkpoint))
    elif arguments.metadata:
        console.write(console.pairs(_metadata(checkpoint.metadata), indent=""))
    elif arguments.template:
        return _template(checkpoint)
    else:
        console.write(_summary(checkpoint))
    return 0


def _adapter(path: Path, arguments: argparse.Namespace) -> int:
    """A LoRA adapter instead of a model."""
    from nybble.cli import inspect_adapter
    from nybble.formats.adapter import read_adapter

    adapter = read_adapter(path)
    if arguments.json:
        console.write_json(inspect_adapter.everything(adapter))
    elif arguments.tensors:
        console.write(inspect_adapter.tensors(adapter))
    elif arguments.metadata:
        config = adapter.metadata.get("peft.config")
        console.write(
            console.pairs(_metadata(config if isinstance(config, dict) else adapter.metadata), indent="")
        )
    elif arguments.template:
        console.error("an adapter has no chat template")
        return 1
    else:
        console.write(inspect_adapter.summary(adapter))
    return 0


def _read(path: Path) -> Checkpoint:
    """The checkpoint; of an ONNX decoder that nybble does not recognise, what lies around its weights."""
    from nybble.errors import UnsupportedError
    from nybble.formats.onnx.folder import is_onnx, open_onnx_folder
    from nybble.loading import read_checkpoint

    try:
        return read_checkpoint(path)
    except UnsupportedError as error:
        if not is_onnx(path):
            raise
        checkpoint = open_onnx_folder(path)
        console.note(f"not recognised, so it runs with --device onnxruntime alone: {error}")
        return checkpoint


# -- parts as text --------------------------------------------------------------------------------


def _summary(checkpoint: Checkpoint) -> str:
    from nybble.devices.report import instruction_set

    parts = [
        console.heading("model"),
        console.pairs(_overview(checkpoint)),
        console.heading("\nconfig"),
        console.pairs((name, _short(value)) for name, value in _config(checkpoint)),
        console.heading("\nencodings"),
        console.table(
            ("ENCODING", "TENSORS", "PARAMETERS", "SIZE", "BITS/WEIGHT", f"KERNELS ({instruction_set()})"),
            [
                (
                    total.name,
                    total.tensors,
                    console.number(total.parameters),
                    console.size(total.nbytes),
                    f"{total.bits_per_weight:.3g}",
                    "; ".join(total.kernels) or "-",
                )
                for total in _totals(checkpoint)
            ],
            right=("TENSORS", "PARAMETERS", "SIZE", "BITS/WEIGHT"),
        ),
    ]
    tokenizer = _tokenizer(checkpoint)
    if tokenizer:
        parts += [console.heading("\ntokenizer"), console.pairs(tokenizer.items())]
    templates = [name or "default" for name in _templates(checkpoint)]
    parts += [
        console.heading("\nchat template"),
        f"  {', '.join(templates) + ' (--template prints it)' if templates else 'none: use run --raw'}\n",
    ]
    return "".join(parts)


def _overview(checkpoint: Checkpoint) -> list[tuple[str, object]]:
    elements = _elements(checkpoint)
    return [
        ("name", checkpoint.name),
        ("file", checkpoint.source),
        ("format", checkpoint.format),
        ("architecture", checkpoint.config.architecture),
        ("parameters", console.number(elements)),
        ("weights", console.size(checkpoint.stored_bytes)),
        ("bits per weight", f"{8 * checkpoint.stored_bytes / elements:.3g}" if elements else None),
        ("tensors", len(checkpoint.tensors)),
    ]


def _config(checkpoint: Checkpoint) -> Iterable[tuple[str, object]]:
    """The fields that the file sets to something else than the default."""
    config = checkpoint.config
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name != "extra" and (field.default is dataclasses.MISSING or value != field.default):
            yield field.name, value


def _short(value: object) -> str:
    """A config value on one line: a dataclass by what differs from its defaults, a run by its length."""
    if dataclasses.is_dataclass(value):
        fields = (
            (field.name, getattr(value, field.name))
            for field in dataclasses.fields(value)
            if getattr(value, field.name) != field.default
        )
        return ", ".join(f"{name} {_short(item)}" for name, item in fields)
    if isinstance(value, tuple) and len(value) > 4:
        counts = {item: value.count(item) for item in value}
        if len(counts) <= 3:
            return ", ".join(f"{count} x {item}" for item, count in counts.items())
        return f"{len(value)} values from {min(value)} to {max(value)}"
    return f"{value:.7g}" if isinstance(value, float) else str(value)


def _tensors(checkpoint: Checkpoint) -> str:
    rows = [
        (name, " x ".join(map(str, tensor.shape)), tensor.encoding.name, console.size(tensor.stored_bytes))
        for name, tensor in checkpoint.tensors.items()
    ]
    return console.table(("NAME", "SHAPE", "ENCODING", "SIZE"), rows, right=("SIZE",))


def _metadata(metadata: Mapping[str, object]) -> Iterable[tuple[str, str]]:
    import numpy as np

    for key, value in metadata.items():
        if isinstance(value, (Sequence, np.ndarray)) and not isinstance(value, str):
            first = ", ".join(
                str(item) if isinstance(value, np.ndarray) else repr(item) for item in value[:4]
            )
            text = f"[{first}{', ...' if len(value) > 4 else ''}] ({len(value)} values)"
        else:
            text = str(value)
        yield console.printable(key), text if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + " ..."


def _template(checkpoint: Checkpoint) -> int:
    templates = _templates(checkpoint)
    if not templates:
        console.error("the model has no chat template")
        return 1
    for name, text in templates.items():
        if len(templates) > 1:
            console.note(f"template {name or 'default'}:")
        # A hostile file must not drive the terminal; a pipe gets every byte.
        shown = "\n".join(map(console.printable, text.split("\n"))) if sys.stdout.isatty() else text
        console.write(shown if shown.endswith("\n") else shown + "\n")
    return 0


# -- facts ----------------------------------------------------------------------------------------


@dataclasses.dataclass
class EncodingTotal:
    """All tensors of one encoding; ``kernels`` are those of its matrices."""

    name: str
    bits_per_weight: float
    tensors: int = 0
    parameters: int = 0
    nbytes: int = 0
    kernels: list[str] = dataclasses.field(default_factory=list)


def _totals(checkpoint: Checkpoint) -> list[EncodingTotal]:
    """By encoding, the largest first."""
    from nybble.devices.report import linear_kernel

    totals: dict[str, EncodingTotal] = {}
    for tensor in checkpoint.tensors.values():
        name = tensor.encoding.name
        total = totals.setdefault(name, EncodingTotal(name, tensor.encoding.bits_per_weight))
        total.tensors += 1
        total.parameters += math.prod(tensor.shape)
        total.nbytes += tensor.stored_bytes
        if len(tensor.shape) == 2:
            kernel = linear_kernel(name, tensor.shape[1])
            if kernel not in total.kernels:
                total.kernels.append(kernel)
    return sorted(totals.values(), key=lambda total: -total.nbytes)


def _elements(checkpoint: Checkpoint) -> int:
    return sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())


def _templates(checkpoint: Checkpoint) -> dict[str, str]:
    """Chat templates by name; the default one's name is empty."""
    default = {} if checkpoint.chat_template is None else {"": checkpoint.chat_template}
    return {**default, **checkpoint.chat_templates}


def _tokenizer(checkpoint: Checkpoint) -> dict[str, Any]:
    if checkpoint.tokenizer is None:
        return {}
    tokenizer = checkpoint.tokenizer.build()

    def named(token: int | None) -> str | None:
        return None if token is None else f"{token} {tokenizer.token_text(token)}"

    facts = {
        "kind": checkpoint.metadata.get("tokenizer.ggml.model"),
        "pre-tokenizer": checkpoint.metadata.get("tokenizer.ggml.pre"),
        "vocabulary": tokenizer.vocab_size,
        "begins with": named(tokenizer.bos_id),
        "ends with": ", ".join(filter(None, map(named, sorted(tokenizer.eos_ids)))),
        "unknown": named(tokenizer.unk_id),
        "padding": named(tokenizer.pad_id),
    }
    return {name: value for name, value in facts.items() if value not in (None, "")}


# -- everything as JSON ---------------------------------------------------------------------------


def _everything(checkpoint: Checkpoint) -> dict[str, Any]:
    from nybble.devices.report import instruction_set

    elements = _elements(checkpoint)
    return {
        "name": checkpoint.name,
        "source": None if checkpoint.source is None else str(checkpoint.source),
        "format": checkpoint.format,
        "architecture": checkpoint.config.architecture,
        "parameters": elements,
        "nbytes": checkpoint.stored_bytes,
        "bits_per_weight": 8 * checkpoint.stored_bytes / elements if elements else None,
        "config": _plain(dataclasses.asdict(checkpoint.config)),
        "instruction_set": instruction_set(),
        "encodings": [dataclasses.asdict(total) for total in _totals(checkpoint)],
        "tokenizer": _tokenizer(checkpoint),
        "chat_templates": {name or "default": text for name, text in _templates(checkpoint).items()},
        "tensors": [
            {
                "name": name,
                "shape": list(tensor.shape),
                "encoding": tensor.encoding.name,
                "nbytes": tensor.stored_bytes,
            }
            for name, tensor in checkpoint.tensors.items()
        ],
        "metadata": {key: _plain(value) for key, value in checkpoint.metadata.items()},
    }


def _plain(value: object) -> Any:
    """A value as JSON has it; a long array only by its length."""
    import numpy as np

    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, np.ndarray):
        return _plain(value.tolist()) if len(value) <= _LONGEST_ARRAY else {"length": len(value)}
    if isinstance(value, Sequence):
        return [_plain(item) for item in value] if len(value) <= _LONGEST_ARRAY else {"length": len(value)}
    return str(value)
