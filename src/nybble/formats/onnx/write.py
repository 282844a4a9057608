"""Writes a checkpoint as a folder that ONNX Runtime and onnxruntime-genai run as it is.

The folder has ``model.onnx`` (the graph), ``model.onnx.data`` (all weights), ``genai_config.json``
and the tokenizer's files. Weights stream: at most one is in memory.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.errors import UnsupportedError
from nybble.formats.onnx.external_data_writer import place, write_external_data
from nybble.formats.onnx.genai_config import genai_config, generation_config
from nybble.formats.onnx.targets import Method, Target, target_named
from nybble.formats.output import Progress
from nybble.graph.onnx import lower

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
CONFIG_KEY = "nybble.config"
"""Key of ``metadata_props``: the ModelConfig as JSON, which the graph alone would not tell in full."""


def write_onnx_folder(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    target: str | Target,
    method: Method | None = None,
    progress: Progress | None = None,
) -> None:
    """Writes the model into ``folder``, which is made if it is not there.

    Args:
        checkpoint: in ONNX form (``checkpoint/forms.py``).
        folder: where the files go; none of them may exist.
        target: a name of ``TARGETS``, or a target.
        method: ``rtn`` rounds float weights to int4 also where the target does not by itself.
        progress: called with bytes written and bytes in all.

    Raises:
        ValueError: the checkpoint is in another form, or a tensor's encoding does not fit the
            target; the message names it.
        UnsupportedError: an unknown target, architecture or rotary scaling, or ``onnx`` is missing.
        FormatError: tensors that are missing or do not fit the config.
        OSError: a file cannot be written.
    """
    chosen = target_named(target) if isinstance(target, str) else target
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise UnsupportedError('writing ONNX needs the onnx package: pip install "nybble[onnx]"') from error
    from nybble.formats.onnx.to_proto import to_proto
    from nybble.text.write_folder import folder_files

    checkpoint.require_no_adapters()
    graph = lower(checkpoint, chosen, method)
    folder.mkdir(parents=True, exist_ok=True)
    placed = write_external_data(graph.initializers, folder / DATA_FILE, progress)
    config = json.dumps(_as_json(checkpoint), sort_keys=True)
    model = to_proto(
        graph,
        placed,
        DATA_FILE,
        opsets={"": chosen.opset} if chosen.portable else {"": chosen.opset, "com.microsoft": 1},
        ir_version=chosen.ir_version,
        metadata={CONFIG_KEY: config, "nybble.target": chosen.name},
    )
    (folder / MODEL_FILE).write_bytes(model.SerializeToString(deterministic=True))
    files = folder_files(checkpoint)
    genai = genai_config(checkpoint.config, graph, chosen, generation_config(files, checkpoint.metadata))
    files["genai_config.json"] = (json.dumps(genai, indent=4) + "\n").encode()
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)  # named chat templates have a folder of their own
        path.write_bytes(data)


def onnx_folder_bytes(checkpoint: Checkpoint, target: str | Target, method: Method | None = None) -> int:
    """About how many bytes ``write_onnx_folder`` writes; errors as there."""
    chosen = target_named(target) if isinstance(target, str) else target
    return place(lower(checkpoint, chosen, method).initializers)[1] + (8 << 20)


def _as_json(checkpoint: Checkpoint) -> dict[str, object]:
    values = asdict(replace(checkpoint.config, extra={}))
    del values["extra"]
    return values
