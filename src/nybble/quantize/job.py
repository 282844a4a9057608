"""Job: matrices rounded layer by layer into a spool, with a calibration or without.

What a run has finished is not made again: the same job goes on after the last layer that its spool holds.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import nybble
from nybble.checkpoint.checkpoint import Checkpoint
from nybble.convert.made import MadeTensor
from nybble.convert.rules import output_name
from nybble.formats.mapping import release_pages
from nybble.quantize.calibrate import LayerProgress
from nybble.quantize.calibration_text import Tokens
from nybble.quantize.fingerprint import file_stamps, windows_digest
from nybble.quantize.importance import ImportanceMatrix
from nybble.quantize.layer_quantizer import LayerQuantizer, Method
from nybble.quantize.layer_runner import LayerRunner
from nybble.quantize.matrices import round_plainly
from nybble.quantize.options import CalibrationOptions
from nybble.quantize.spool import Spool

HIDDEN_SECONDS = 20.0
"""How often the hidden states are kept, at most: what a kill costs besides a layer."""
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Job:
    """What is to be done: the results depend on this, and on nybble's version."""

    checkpoint: Checkpoint
    encodings: Mapping[str, str]
    """Of every matrix that is rounded, by name."""
    method: Method
    importance: ImportanceMatrix | None
    windows: Sequence[Tokens]
    """Of the calibration; none: the method needs none."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What else decides, as JSON: for the fingerprint and the manifest."""

    def fingerprint(self) -> str:
        """Of everything that the results depend on; of the model's files names, sizes and times."""
        content = {
            "nybble": nybble.__version__,
            "files": file_stamps(self.checkpoint),
            "encodings": dict(self.encodings),
            "method": vars(self.method),
            "windows": windows_digest(self.windows),
            "importance": None if self.importance is None else self.importance.digest(),
            "settings": dict(self.settings),
        }
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def run(
    job: Job,
    spool: Spool,
    options: CalibrationOptions,
    *,
    threads: int | None = None,
    progress: Callable[[LayerProgress], None] | None = None,
) -> dict[str, MadeTensor]:
    """The tensors of a job, by name, on the disk; what the spool has already is not made again."""
    layers = job.checkpoint.config.num_hidden_layers
    if all(spool.unit(number) is not None for number in range(layers + 1)):
        return spool.tensors()
    meter = _Meter(layers, progress)
    if job.windows:
        _run_calibrated(job, spool, options, meter, threads)
    for number, names in enumerate(_units(job.checkpoint, job.encodings)):
        if spool.unit(number) is None:
            spool.write(number, dict(_plainly(job, names, meter.within(number))))
            release_pages()
    return spool.tensors()


def _run_calibrated(
    job: Job, spool: Spool, options: CalibrationOptions, meter: _Meter, threads: int | None
) -> None:
    """Layers, and an output matrix that calibration is about; the rest is left to plain rounding."""
    layers = job.checkpoint.config.num_hidden_layers
    saved = perf_counter()
    with LayerRunner(
        job.checkpoint,
        job.windows,
        threads=threads,
        precision=options.precision,
        folder=spool.folder,
        progress=lambda done, total: meter.running(done / total),
    ) as runner:
        found = spool.hidden()
        if found is not None:
            try:
                runner.restore(*found)
            except ValueError as error:
                raise spool.damaged("hidden.npz", error) from error
        meter.start(runner.layer)
        quantizer = LayerQuantizer(
            job.checkpoint, job.encodings, job.method, runner, threads=threads, progress=meter.rounding
        )
        while runner.layer < layers:
            layer = runner.layer
            made = spool.unit(layer)
            if made is None:
                made = spool.write(layer, quantizer.quantize(layer))
            quantizer.advance(layer, made)
            release_pages()
            meter.done(layer)
            if perf_counter() - saved > HIDDEN_SECONDS:
                spool.save_hidden(runner.layer, runner.hidden)
                saved = perf_counter()
        if spool.unit(layers) is None:
            outer = quantizer.quantize(layers)
            rest = [name for name in _units(job.checkpoint, job.encodings)[layers] if name not in outer]
            spool.write(layers, {**outer, **dict(_plainly(job, rest, meter.rounding))})
        meter.finished()


def _plainly(
    job: Job, names: Sequence[str], progress: Callable[[float], None]
) -> Iterator[tuple[str, MadeTensor]]:
    """Matrices rounded to nearest."""
    for number, name in enumerate(names):
        weights = None if job.importance is None else job.importance.weights(name)
        tensor = job.checkpoint.tensors[name]
        output = name == output_name(job.checkpoint.config)
        yield name, round_plainly(tensor, job.encodings[name], weights, output=output)
        progress((number + 1) / len(names))


def _units(checkpoint: Checkpoint, names: Mapping[str, str]) -> list[list[str]]:
    """Names by layer; the last ones belong to none."""
    layers = checkpoint.config.num_hidden_layers
    units: list[list[str]] = [[] for _ in range(layers + 1)]
    for name in names:
        found = _LAYER.match(name)
        units[int(found[1]) if found else layers].append(name)
    return units


class _Meter:
    """Tells how far a job is."""

    def __init__(self, layers: int, progress: Callable[[LayerProgress], None] | None) -> None:
        self._layers = layers
        self._progress = progress
        self._layer = 0
        self._rounded = False
        self._from = 0.0
        self._started = perf_counter()

    def start(self, layer: int) -> None:
        """Layers before this one were done by an earlier run."""
        self._layer = layer
        self._from = layer / (self._layers + 1)
        self._started = perf_counter()

    def running(self, share: float) -> None:
        """The text runs through the layer, before and after its matrices are rounded: a third each."""
        self._tell((2 + share) / 3 if self._rounded else share / 3)

    def rounding(self, share: float) -> None:
        """Matrices of the layer are rounded."""
        self._rounded = True
        self._tell((1 + share) / 3)

    def within(self, layer: int) -> Callable[[float], None]:
        """For a layer in which nothing but rounding is done."""
        self._layer = layer
        return self._tell

    def done(self, layer: int) -> None:
        """The layer is done."""
        self._layer = layer + 1
        self._rounded = False
        self._tell(0.0)

    def finished(self) -> None:
        """Everything is done."""
        self._tell(1.0)

    def _tell(self, share: float) -> None:
        if self._progress is None:
            return
        fraction = min((self._layer + share) / (self._layers + 1), 1.0)
        elapsed, new = perf_counter() - self._started, fraction - self._from
        left = elapsed / new * (1 - fraction) if new > 0 and elapsed > 0 else None
        self._progress(LayerProgress(self._layer, self._layers, fraction, left))
