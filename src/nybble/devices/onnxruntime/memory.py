"""Where caches lie: arrays of this process for providers on the CPU, the device's own memory for others."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_ALIGNMENT = 64


def aligned_zeros(shape: tuple[int, ...], dtype: str) -> Array:
    """Zeros that begin at a multiple of 64 bytes; pages are taken when they are first written."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    memory = np.zeros(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


class Memory:
    """Makes OrtValues on a provider's device.

    ``device`` is ONNX Runtime's name of it, ``device_id`` its number. ``is_host``: OrtValues share memory
    with NumPy arrays.
    """

    def __init__(self, runtime: Any, session: Any, device: str, device_id: int) -> None:
        self._runtime = runtime
        self._session = session
        self.device = device
        self.device_id = device_id
        self.is_host = device == "cpu"

    def place(self, array: Array) -> Any | None:
        """An OrtValue with the array's content; None where Python cannot allocate on the device.

        On the host the OrtValue is the array itself. Where the answer is None, a run that gets the
        array as input and has its output bound to the device allocates it.
        """
        if self.device != "webgpu":
            return self._runtime.OrtValue.ortvalue_from_numpy(array, self.device, self.device_id)
        create = getattr(self._session, "create_ortvalue_from_shape_and_type", None)
        if create is None:
            return None
        value = create(list(array.shape), array.dtype.type, self.device, self.device_id)
        value.update_inplace(array)
        return value
