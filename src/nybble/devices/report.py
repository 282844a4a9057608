"""What each device is on this machine: whether it can be used, what was chosen, and why.

``nybble devices`` prints it; ``nybble inspect`` and ``nybble bench`` name kernels with it.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from nybble.devices import DEVICES
from nybble.errors import DeviceError

DEFAULT_DEVICE = "cpu"


@dataclass(frozen=True)
class InstructionSet:
    """A level of the CPU's kernels. ``why_not`` is empty where the machine has it."""

    name: str
    why_not: str
    chosen: bool

    @property
    def available(self) -> bool:
        """Whether this machine and its operating system let us use it."""
        return not self.why_not


@dataclass(frozen=True)
class DeviceReport:
    """One device. ``reason`` says why it was chosen, or why not, or why it cannot be used."""

    name: str
    available: bool
    chosen: bool
    reason: str
    facts: dict[str, object] = field(default_factory=dict)
    instruction_sets: tuple[InstructionSet, ...] = ()


def device_reports() -> list[DeviceReport]:
    """Every device that nybble knows.

    Raises:
        DeviceError: ``NYBBLE_ISA`` asks for a level that is unknown or not available.
    """
    reports = {"cpu": _cpu, "reference": _reference, "onnxruntime": _onnxruntime}
    return [reports[name]() for name in DEVICES if name in reports]


def processor() -> str:
    """The processor's name as the system tells it."""
    if sys.platform == "linux":
        try:
            lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            lines = []
        for line in lines:
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model", "cpu model"):
                return value.strip()
    if sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode == 0:
            return result.stdout.strip()
    return platform.processor() or platform.machine()


def instruction_set() -> str:
    """The level of the CPU's kernels in use.

    Raises:
        DeviceError: ``NYBBLE_ISA`` asks for a level that is unknown or not available.
    """
    from nybble import _core

    try:
        return str(_core.isa())
    except RuntimeError as error:
        raise DeviceError(str(error)) from error


def linear_kernel(encoding: str, columns: int) -> str:
    """In words: the arithmetic in which the CPU, at precision ``fast``, multiplies with such weights.

    ``columns`` is how many input features the weights have.

    Raises:
        DeviceError: as ``instruction_set``.
    """
    from nybble import _core

    isa = instruction_set()
    try:
        kernels = _core.encoding_kernels(encoding, isa)
    except ValueError:
        return "not on the cpu"
    if columns % 32:
        return "f32"
    decode = "int8" if kernels["int8"] else "f32"
    return f"{decode}, prefill bf16 tiles" if isa == "amx" else decode


def _cpu() -> DeviceReport:
    facts: dict[str, object] = {"processor": processor()}
    try:
        from nybble import _core
    except ImportError as error:
        return DeviceReport("cpu", False, False, f"the native core cannot be loaded: {error}", facts)
    chosen = instruction_set()
    facts["threads"] = int(_core.default_threads())
    facts["threads_reason"] = str(_core.default_threads_reason())
    levels = tuple(InstructionSet(name, why, name == chosen) for name, why in _core.isa_report().items())
    best = str(_core.isa_levels()[-1])
    how = (
        "the highest that this machine has"
        if chosen == best
        else f"NYBBLE_ISA asks for it; {best} is here too"
    )
    facts["isa"] = chosen
    facts["isa_reason"] = how
    return DeviceReport("cpu", True, True, "the default device", facts, levels)


def _reference() -> DeviceReport:
    reason = "plain NumPy in float32: slow, for tests; only with --device reference"
    return DeviceReport("reference", True, False, reason)


def _onnxruntime() -> DeviceReport:
    from nybble.devices.onnxruntime.report import report

    available, reason, facts = report()
    return DeviceReport("onnxruntime", available, False, reason, facts)
