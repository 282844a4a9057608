"""calibrate: from a model and a text to an importance matrix, resumable.

The windows go through the model layer by layer (``layer_runner.py``). Every now and then, after a
layer, everything that is needed to go on is written beside the output, in ``<output>.calibration``: the
sums so far and the hidden states. The same call after a kill goes on from there; it is the same call if
the model's files, the tokens and the arithmetic are the same, by their hashes.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.convert.manifest import hash_file, input_files
from nybble.devices.cpu import longest_context
from nybble.errors import FormatError, UnsupportedError
from nybble.formats.mapping import release_pages
from nybble.formats.output import OutputError, require_space, staged_file
from nybble.quantize.calibration_text import Tokens, make_windows, read_documents
from nybble.quantize.fingerprint import windows_digest
from nybble.quantize.importance import Format, Importance, ImportanceMatrix, format_of, write_importance
from nybble.quantize.layer_runner import LayerRunner
from nybble.quantize.statistics import InputStatistics, Statistics
from nybble.text.chat import ChatTemplate

if TYPE_CHECKING:
    from nybble.hub.progress import ProgressCallback
    from nybble.text.tokenizer import Tokenizer

WINDOWS = 64
WINDOW = 512
STATE_SUFFIX = ".calibration"
STATE_SECONDS = 20.0
"""How much work a kill may cost, besides a layer: state is written after a layer, at most this often."""
_STATE_VERSION = 1


@dataclass(frozen=True)
class LayerProgress:
    """How far a calibration is."""

    layer: int
    """The one that runs; ``num_layers``: the output matrix."""
    num_layers: int
    fraction: float
    """Of the whole, 0 to 1."""
    seconds_left: float | None
    """At the speed so far; None before that can be told."""


@dataclass(frozen=True)
class CalibrationReport:
    """What ``calibrate`` did."""

    output: str
    windows: int
    window: int
    """Tokens of each window; the longest, where there is less text than one."""
    tokens: int
    linears: int
    resumed_layer: int
    """The layer that an earlier, broken calibration had come to; 0: this one did everything."""
    seconds: float
    datasets: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()
        }


class Calibration:
    """One calibration: ``run`` does it layer by layer, ``cancel`` stops it from another thread.

    Args:
        checkpoint: the model.
        windows: token ids of each window.
        state: where to keep what a kill must not cost; None: nowhere.
        threads, precision: as for ``LayerRunner``.
        progress: called while a layer runs and after it.
        state_seconds: see ``STATE_SECONDS``.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        windows: Sequence[Tokens],
        *,
        state: Path | None = None,
        threads: int | None = None,
        precision: str = "fast",
        progress: Callable[[LayerProgress], None] | None = None,
        state_seconds: float = STATE_SECONDS,
    ) -> None:
        self._checkpoint = checkpoint
        self._windows = windows
        self._state = state
        self._precision = precision
        self._progress = progress
        self._state_seconds = state_seconds
        self._fingerprint: str | None = None
        self._started = self._saved = perf_counter()
        self._from = 0.0  # the fraction that an earlier run had done
        self.statistics: dict[str, InputStatistics] = {}
        """What was collected so far, by the name of each linear's weight."""
        self.resumed_layer = 0
        self.notes: list[str] = []
        self._runner = LayerRunner(
            checkpoint,
            windows,
            threads=threads,
            precision=precision,
            folder=None if state is None else state.absolute().parent,
            progress=self._tell,
        )

    def run(self) -> Iterator[int]:
        """Collects; yields after each layer its number, the output matrix last."""
        runner = self._runner
        with runner:
            self._resume()
            self._started = self._saved = perf_counter()
            while runner.layer < runner.num_layers:
                layer = runner.layer
                self.statistics.update(runner.collect(layer, hessian=False, advance=True))
                release_pages()
                self._save()
                yield layer
            self.statistics.update(runner.collect(runner.num_layers, hessian=False))
            yield runner.num_layers

    def cancel(self) -> None:
        """From any thread: ``run`` raises Cancelled soon."""
        self._runner.cancel()

    def remove_state(self) -> None:
        """The result is safe: nothing needs to go on any more."""
        if self._state is not None:
            self._state.unlink(missing_ok=True)

    # -- progress --------------------------------------------------------------------------------------

    def _tell(self, done: int, total: int) -> None:
        if self._progress is None:
            return
        layers, layer = self._runner.num_layers, self._runner.layer
        fraction = min((layer + done / total) / layers, 1.0)
        elapsed, new = perf_counter() - self._started, fraction - self._from
        left = elapsed / new * (1 - fraction) if new > 0 and elapsed > 0 else None
        self._progress(LayerProgress(layer, layers, fraction, left))

    # -- state -----------------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """Of everything that the sums depend on: the model's files, the tokens, the arithmetic."""
        if self._fingerprint is None:
            source = self._checkpoint.source
            files = [] if source is None else input_files(source, self._checkpoint.metadata)
            content = {
                "version": _STATE_VERSION,
                "files": [[found.name, found.nbytes, found.sha256] for found in map(hash_file, files)],
                "windows": windows_digest(self._windows),
                "precision": self._precision,
            }
            self._fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        return self._fingerprint

    def _save(self) -> None:
        if self._state is None or perf_counter() - self._saved < self._state_seconds:
            return
        arrays: dict[str, npt.NDArray[Any]] = {"hidden": self._runner.hidden}
        shared = {id(seen): seen for seen in self.statistics.values()}
        numbers = {key: number for number, key in enumerate(shared)}
        for key, number in numbers.items():
            arrays[f"squares.{number}"] = shared[key].sum_squares
            arrays[f"absolute.{number}"] = shared[key].sum_absolute
        header = {
            "fingerprint": self.fingerprint(),
            "layer": self._runner.layer,
            "linears": {name: numbers[id(seen)] for name, seen in self.statistics.items()},
        }
        arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
        require_space(self._state.absolute().parent, sum(array.nbytes for array in arrays.values()))
        with staged_file(self._state, overwrite=True) as stage, stage.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type, unused-ignore]
        self._saved = perf_counter()

    def _resume(self) -> None:
        if self._state is None or not self._state.is_file():
            return
        try:
            with self._state.open("rb") as file, np.load(file, allow_pickle=False) as found:
                header = json.loads(found["header"].tobytes())
                if header["fingerprint"] != self.fingerprint():
                    self.notes.append(
                        f"{self._state} is of another model, text or precision: everything is done anew"
                    )
                    return
                seen: dict[int, InputStatistics] = {}
                tokens = self._runner.tokens
                for name, number in header["linears"].items():
                    if number not in seen:
                        sums = found[f"squares.{number}"], found[f"absolute.{number}"]
                        seen[number] = InputStatistics(tokens, *sums)
                    self.statistics[name] = seen[number]
                self._runner.restore(int(header["layer"]), found["hidden"])
        except (
            OSError,
            EOFError,
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            zipfile.BadZipFile,
        ) as error:
            raise FormatError(f"{self._state}: is damaged ({error}); remove it to begin anew") from error
        self.resumed_layer = self._runner.layer
        self._from = self._runner.layer / self._runner.num_layers


def calibrate(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    text: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    windows: int = WINDOWS,
    window: int = WINDOW,
    seed: int = 0,
    file_format: Format | None = None,
    threads: int | None = None,
    precision: str = "fast",
    overwrite: bool = False,
    offline: bool | None = None,
    progress: Callable[[LayerProgress], None] | None = None,
    download_progress: ProgressCallback | None = None,
    run: Callable[[Calibration], None] | None = None,
) -> CalibrationReport:
    """Makes an importance matrix: how much each input column of each linear matters, by a text.

    Args:
        model: a model as for ``nybble.load``.
        output: the file to write.
        text: a text file, a file of JSON lines (texts or chats), a folder of them, or several of these;
            none: nybble's own text.
        windows, window: how many windows of how many tokens; fewer where there is too little text.
        seed: another seed draws other windows from the same text.
        file_format: ``gguf`` or ``legacy``; None: by the output's name (``.dat`` is legacy).
        threads: None: the cores that this process may use.
        precision: ``fast`` or ``f32``.
        overwrite: replace an output that exists.
        offline: True: never download the model.
        progress: called while layers run.
        download_progress: called while the model is downloaded.
        run: runs the calibration; None: here and now. For those who want to stop it (``Calibration.run``).

    Raises:
        OutputError: the output exists, or it or the state beside it cannot be written.
        FormatError, UnsupportedError, NotFoundError, TemplateError: the model or a text cannot be used.
    """
    from nybble.hub import resolve
    from nybble.loading import read_checkpoint

    started = perf_counter()
    texts = [text] if isinstance(text, (str, os.PathLike)) else list(text)
    target = Path(output)
    if target.exists() and not overwrite:
        raise OutputError(f"{target} exists; name another output or allow it to be overwritten")
    path = resolve(os.fspath(model), progress=download_progress, offline=offline)
    checkpoint = read_checkpoint(path)
    if checkpoint.tokenizer is None:
        raise UnsupportedError(f"{path}: has no tokenizer, which a calibration needs")
    most = longest_context(checkpoint.config)
    if not 2 <= window <= most:
        raise UnsupportedError(f"windows of {window} tokens: the model takes 2 to {most} at a time")
    cut = calibration_windows(
        checkpoint, checkpoint.tokenizer.build(), text=texts, windows=windows, window=window, seed=seed
    )
    calibration = Calibration(
        checkpoint,
        cut,
        state=target.with_name(target.name + STATE_SUFFIX),
        threads=threads,
        precision=precision,
        progress=progress,
    )
    if run is None:
        for _ in calibration.run():
            pass
    else:
        run(calibration)
    datasets = tuple(Path(item).name for item in texts) or ("nybble",)
    longest = max(map(len, cut))
    matrix = ImportanceMatrix(
        importance_of(checkpoint, calibration.statistics), datasets, chunk_count=len(cut), chunk_size=longest
    )
    write_importance(
        matrix,
        target,
        checkpoint.config.architecture,
        file_format=format_of(target) if file_format is None else file_format,
        overwrite=overwrite,
    )
    calibration.remove_state()
    notes = list(calibration.notes)
    if len(cut) < windows:
        notes.append(f"the text has {len(cut)} windows of {longest} tokens; {windows} were asked for")
    return CalibrationReport(
        output=str(target),
        windows=len(cut),
        window=longest,
        tokens=sum(map(len, cut)),
        linears=len(matrix.entries),
        resumed_layer=calibration.resumed_layer,
        seconds=perf_counter() - started,
        datasets=datasets,
        notes=tuple(notes),
    )


def calibration_windows(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    *,
    text: Sequence[str | os.PathLike[str]] = (),
    windows: int = WINDOWS,
    window: int = WINDOW,
    seed: int = 0,
) -> list[Tokens]:
    """The windows of a text for a model: see ``make_windows``; chats go through its chat template."""
    template = checkpoint.chat_template
    chat = (
        None
        if template is None
        else ChatTemplate(template, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token)
    )
    return make_windows(
        read_documents(text),
        tokenizer,
        windows=windows,
        length=window,
        seed=seed,
        render=None if chat is None else lambda messages: chat.render(messages, add_generation_prompt=False),
    )


def importance_of(checkpoint: Checkpoint, statistics: Statistics) -> Mapping[str, Importance]:
    """The importance of columns in the model's own order, wherever a checkpoint has them permuted."""
    entries = {}
    for name, seen in statistics.items():
        sums = seen.sum_squares
        permutation = checkpoint.tensors.get(name.removesuffix("weight") + "input_permutation")
        if permutation is not None:
            ordered = np.empty_like(sums)
            ordered[np.ascontiguousarray(permutation.data).view("<i4")] = sums
            sums = ordered
        entries[name] = Importance(sums, seen.tokens)
    return entries
