"""Decoder: one run of the model for one sequence, with everything bound in place."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from nybble.devices.onnxruntime.cache import Cache, Caches
from nybble.devices.onnxruntime.memory import Memory
from nybble.formats.onnx.decoder_io import DecoderIO

Logits = npt.NDArray[np.float32]


class Decoder:
    """Runs tokens of one sequence.

    ``run`` is called by one thread at a time. ``device``: name and number of the caches' memory. ``shared``
    caches are written in place.
    """

    def __init__(
        self,
        runtime: Any,
        session: Any,
        io: DecoderIO,
        *,
        device: tuple[str, int],
        context_length: int,
        shared: bool,
    ) -> None:
        self._session = session
        self._io = io
        self._runtime = runtime
        self.memory = Memory(runtime, session, *device)
        self.caches = Caches(
            io.caches, self.memory, shared=shared, longest=context_length, begin_binding=self._begin_binding
        )
        self._ones = np.ones((1, context_length), self._dtype("attention_mask"))
        self._positions = np.arange(context_length, dtype=self._dtype("position_ids"))[None]
        # One row of logits is written into the same place at every step of decoding.
        self._row = np.zeros((1, 1, io.vocab_size), io.logits.dtype)
        self._row_value = runtime.OrtValue.ortvalue_from_numpy(self._row)

    def run(
        self,
        cache: Cache,
        tokens: npt.NDArray[np.int64],
        start: int,
        *,
        rows: str,
        mask_length: int = 0,
        options: Any = None,
    ) -> tuple[Cache, Logits | None]:
        """Run tokens that follow ``start`` cached ones.

        Args:
            cache: holds at least ``start`` positions.
            tokens: (count,), at least one.
            start: positions that are kept.
            rows: ``none``, ``last`` or ``all``.
            mask_length: attention_mask gets zeros at its end to be at least that long.
            options: ONNX Runtime's RunOptions.

        Returns:
            The cache that follows, and logits (rows, vocab_size) or None.
        """
        count = len(tokens)
        cache = cache.prepare(start, max(start + count, mask_length))
        binding = cache.bind(start + count)
        given_rows = 1 if self._io.last_row_only or (rows != "all" and self._keeps_rows) else count
        if given_rows == 1:
            binding.bind_ortvalue_output(self._io.logits.name, self._row_value)
        else:
            binding.bind_output(self._io.logits.name, "cpu")
        for role, port in self._io.inputs.items():
            if role == "attention_mask":
                binding.bind_cpu_input(port.name, self._mask(start + count, mask_length))
            else:
                binding.bind_cpu_input(port.name, self._input(role, tokens, start, rows))
        self._session.run_with_iobinding(binding, options)
        logits = None
        if rows != "none":
            found = self._row if given_rows == 1 else binding.get_outputs_as_ortvaluevector()[0].numpy()
            logits = found[0, -1:] if rows == "last" else found[0]
            logits = logits.astype(np.float32)
        return cache.after_run(), logits

    def end_profiling(self) -> str:
        """The file with ONNX Runtime's profile, if the session options asked for one."""
        return str(self._session.end_profiling())

    @property
    def _keeps_rows(self) -> bool:
        """Whether the model computes only the rows of logits that it is asked for."""
        return "num_logits_to_keep" in self._io.inputs

    def _begin_binding(self) -> Any:
        binding = self._session.io_binding()
        binding.bind_output(self._io.logits.name, "cpu")
        return binding

    def _dtype(self, role: str) -> str:
        port = self._io.inputs.get(role)
        return "int64" if port is None else port.dtype

    def _mask(self, end: int, length: int) -> npt.NDArray[Any]:
        mask = self._ones[:, : max(end, length)]
        if length > end:
            mask = mask.copy()
            mask[:, end:] = 0
        return mask

    def _input(self, role: str, tokens: npt.NDArray[np.int64], start: int, rows: str) -> npt.NDArray[Any]:
        port = self._io.inputs[role]
        end = start + len(tokens)
        if role == "input_ids":
            return tokens.astype(port.dtype)[None]
        if role == "position_ids":
            positions = self._positions[:, start:end]
            # Three of them are for time, height and width of images; text has the same in each.
            return np.stack([positions] * 3) if len(port.shape) == 3 else positions
        if role == "num_logits_to_keep":
            keep = end - start if rows == "all" else 1
            return np.full((1,) * len(port.shape), keep, port.dtype)
        return np.full((1,) * len(port.shape), start > 0, port.dtype)  # use_cache_branch
