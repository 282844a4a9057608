"""Devices: what runs a checkpoint, by name.

One row a device: its name and its module, which offers
``compile_session(checkpoint, **options) -> Session``. The module is imported when it is asked for.
What follows a colon (``onnxruntime:cuda``) is the option ``provider`` of devices that have it.
"""

from __future__ import annotations

import importlib
import inspect
from typing import TYPE_CHECKING, Any

from nybble.errors import DeviceError

if TYPE_CHECKING:
    from nybble.checkpoint.checkpoint import Checkpoint
    from nybble.devices.base import Session

DEVICES = {
    "cpu": "nybble.devices.cpu",
    "reference": "nybble.devices.reference",
    "onnxruntime": "nybble.devices.onnxruntime",
}


def compile(checkpoint: Checkpoint, *, device: str = "cpu", **options: Any) -> Session:
    """Make a model ready to run on a device.

    Options that are None are left to the device's own default.

    Raises:
        DeviceError: no such device, or the device has no such option; the message lists them.
    """
    name, colon, provider = device.partition(":")
    module = DEVICES.get(name)
    if module is None:
        raise DeviceError(f"unknown device {device!r}; devices are {', '.join(sorted(DEVICES))}")
    compile_session = importlib.import_module(module).compile_session
    given = {name: value for name, value in options.items() if value is not None}
    known = [
        p.name for p in inspect.signature(compile_session).parameters.values() if p.kind == p.KEYWORD_ONLY
    ]
    if colon:
        if "provider" not in known:
            raise DeviceError(f"unknown device {device!r}: {name} has no providers")
        given["provider"] = provider
    for name in given:
        if name not in known:
            raise DeviceError(
                f"device {device!r} has no option {name!r}; it has {', '.join(known) if known else 'none'}"
            )
    session: Session = compile_session(checkpoint, **given)
    return session
