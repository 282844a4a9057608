"""Keys and values of one sequence, as OrtValues that stay on the device from step to step.

Two kinds, because decoders come in two. ``SharedCache``: past and present are one buffer that is
longer than what it holds; the model writes new positions in place (GroupQueryAttention). Of sliding
layers it may hold the window alone, and can then be continued, but not from an earlier position.
``GrowingCache``: the model gives back longer arrays, which become the next step's input.
A run takes a cache and gives the one that follows it, so that a failed run changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from nybble.devices.onnxruntime.memory import Array, Memory, aligned_zeros
from nybble.formats.onnx.decoder_io import CachePort

STEP = 256
"""Positions by which a shared buffer is at least lengthened, and that one for a window has besides it where
it may: the model then moves the window to the buffer's begin once in so many steps."""


class Cache(Protocol):
    """Keys and values; positions from the sequence's length on mean nothing."""

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        ...

    def nbytes_with(self, end: int) -> int:
        """Bytes of all buffers after a run that ends at ``end``."""
        ...

    def kept(self, start: int) -> int:
        """``start`` if the sequence can go on from there, else 0."""
        ...

    def prepare(self, start: int, end: int) -> Cache:
        """The cache to run with: positions before ``start`` are kept, those before ``end`` have room."""
        ...

    def bind(self, end: int) -> Any:
        """An IOBinding with past and present, for a run that ends at ``end``; logits are its first output."""
        ...

    def after_run(self) -> Cache:
        """The cache after a run with ``bind``'s binding."""
        ...

    def share(self) -> Cache:
        """The cache for a second sequence with the same content."""
        ...

    def release(self) -> None:
        """One sequence less uses it."""
        ...


class Caches:
    """Makes the caches of one session.

    ``longest``: positions that a sequence may have. ``begin_binding`` gives an IOBinding that has the
    logits bound as first output.
    """

    def __init__(
        self,
        ports: Sequence[CachePort],
        memory: Memory,
        *,
        shared: bool,
        longest: int,
        begin_binding: Callable[[], Any],
    ) -> None:
        self.ports = ports
        self.memory = memory
        self.longest = longest
        self.begin_binding = begin_binding
        self._shared = shared

    def empty(self) -> Cache:
        """The cache of a new sequence."""
        return SharedCache(self, 0, ()) if self._shared else GrowingCache(self, (), 0, None)

    @property
    def shortest_window(self) -> int | None:
        """Positions up to which every cache holds all, each at its place; None: always."""
        return min((port.window for port in self.ports if port.window is not None), default=None)

    def nbytes(self, positions: int) -> int:
        """Bytes of all buffers where those without a window are so long."""
        return sum(
            port.heads * port.width * np.dtype(port.dtype).itemsize * self.length(port, positions)
            for port in self.ports
        )

    def length(self, port: CachePort, capacity: int) -> int:
        """Length of a port's buffer where those without a window are ``capacity`` long."""
        if port.window is None or not capacity:
            return capacity
        if not self.memory.is_host:
            return port.window  # CUDA's kernel wants exactly that
        return max(port.window, min(port.window + STEP, self.longest))

    def capacity(self, positions: int) -> int:
        """Length of a new shared buffer for so many positions and some that follow."""
        return min(self.longest, -(-(positions + STEP // 2) // STEP) * STEP)


class SharedCache:
    """Buffers of ``capacity`` positions, used by one sequence or, until one of them writes, by forks."""

    def __init__(self, caches: Caches, capacity: int, arrays: Sequence[Array]) -> None:
        self._caches = caches
        self._capacity = capacity
        self._arrays: Sequence[Array] = arrays  # the buffers themselves (host), or what goes into them
        self._values: Sequence[Any] = ()
        self._binding: Any = None
        self._on_device = False
        self._end = 0  # of the last run, also of one that failed
        self.users = 1

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return self._caches.nbytes(self._capacity)

    def nbytes_with(self, end: int) -> int:
        """Bytes of all buffers after a run that ends at ``end``."""
        return self._caches.nbytes(self._next_capacity(end))

    def kept(self, start: int) -> int:
        """``start``, unless a sliding layer has dropped what was before it."""
        window = self._caches.shortest_window
        return start if start == self._end or window is None or self._end <= window else 0

    def prepare(self, start: int, end: int) -> SharedCache:
        """This cache if it has room and nobody else uses it, else a copy of what is kept."""
        if end <= self._capacity and self.users == 1:
            return self
        capacity = self._next_capacity(end)
        old = self._read() if start else [None] * len(self._caches.ports)
        arrays = []
        for port, before in zip(self._caches.ports, old, strict=True):
            length = self._caches.length(port, capacity)
            array = aligned_zeros((1, port.heads, length, port.width), port.dtype)
            if before is not None:
                array[:, :, :start] = before[:, :, :start]
            arrays.append(array)
        cache = SharedCache(self._caches, capacity, arrays)
        cache._end = start
        return cache

    def bind(self, end: int) -> Any:
        """The binding, which stays the same from step to step."""
        self._end = end
        if self._binding is not None:
            return self._binding
        memory = self._caches.memory
        binding = self._caches.begin_binding()
        values = [memory.place(array) for array in self._arrays]
        self._on_device = None not in values
        for port, array, value in zip(self._caches.ports, self._arrays, values, strict=True):
            if value is None:
                binding.bind_cpu_input(port.past, array)
                binding.bind_output(port.present, memory.device, memory.device_id)
            else:
                binding.bind_ortvalue_input(port.past, value)
                binding.bind_ortvalue_output(port.present, value)
        self._values = values
        self._binding = binding
        if self._on_device and not memory.is_host:
            self._arrays = ()
        return binding

    def after_run(self) -> SharedCache:
        """The same cache. The run may have allocated its buffers, which are both past and present now."""
        if not self._on_device:
            self._values = self._binding.get_outputs()[1:]
            for port, value in zip(self._caches.ports, self._values, strict=True):
                self._binding.bind_ortvalue_input(port.past, value)
                self._binding.bind_ortvalue_output(port.present, value)
            self._on_device = True
            self._arrays = ()
        return self

    def share(self) -> SharedCache:
        """The same cache with one user more; ``prepare`` copies it for the first that writes."""
        self.users += 1
        return self

    def release(self) -> None:
        """One user less."""
        self.users -= 1

    def _next_capacity(self, end: int) -> int:
        if end <= self._capacity:
            return self._capacity
        # Half as much again, so that a long answer copies each position a few times at most.
        return self._caches.capacity(max(end, self._capacity + self._capacity // 2))

    def _read(self) -> Sequence[Array]:
        if self._arrays:
            return self._arrays
        arrays: Sequence[Array] = self._binding.copy_outputs_to_cpu()[1:]
        return arrays


class GrowingCache:
    """Arrays of exactly ``length`` positions, which nobody changes: forks share them."""

    def __init__(self, caches: Caches, values: Sequence[Any], length: int, binding: Any) -> None:
        self._caches = caches
        self._values = values
        self._length = length
        self._source = binding  # whose run made the values
        self._binding: Any = None
        self._end = length

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return self._caches.nbytes(self._length)

    def nbytes_with(self, end: int) -> int:
        """Bytes of all arrays after a run that ends at ``end``."""
        return self._caches.nbytes(end)

    def kept(self, start: int) -> int:
        """``start``: nothing is ever dropped."""
        return start

    def prepare(self, start: int, end: int) -> GrowingCache:
        """A cache that holds exactly ``start`` positions."""
        if start == self._length and self._values:
            return GrowingCache(self._caches, self._values, start, self._source)
        return GrowingCache(self._caches, self._cut(start), start, None)

    def bind(self, end: int) -> Any:
        """A new binding: its outputs must outlive the next run."""
        self._end = end
        memory = self._caches.memory
        binding = self._caches.begin_binding()
        for port, value in zip(self._caches.ports, self._values, strict=True):
            if isinstance(value, np.ndarray):
                binding.bind_cpu_input(port.past, value)
            else:
                binding.bind_ortvalue_input(port.past, value)
            binding.bind_output(port.present, memory.device, memory.device_id)
        self._binding = binding
        return binding

    def after_run(self) -> GrowingCache:
        """What the run gave."""
        return GrowingCache(self._caches, self._binding.get_outputs()[1:], self._end, self._binding)

    def share(self) -> GrowingCache:
        """The same cache."""
        return self

    def release(self) -> None:
        """Nothing to do: memory goes with the last reference."""

    def _cut(self, length: int) -> list[Array]:
        """Host arrays of the first positions."""
        if not length:
            return [np.zeros((1, port.heads, 0, port.width), port.dtype) for port in self._caches.ports]
        if self._source is None:
            arrays = list(self._values)
        elif self._caches.memory.is_host:
            arrays = [value.numpy() for value in self._values]
        else:
            arrays = self._source.copy_outputs_to_cpu()[1:]
        return [np.ascontiguousarray(array[:, :, :length]) for array in arrays]
