"""Execution providers of ONNX Runtime: nybble's names, the packages that have them, and what is here.

ONNX Runtime comes as several packages that exclude each other, each with other providers compiled
in. Source: https://onnxruntime.ai/docs/execution-providers/.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from nybble.errors import DeviceError

Runs = Literal["any", "whole or one", "one"]
"""How many tokens a run may have: any number after any number of cached ones; a whole sequence or one
token after cached ones; one token always."""


@dataclass(frozen=True)
class Provider:
    """One row: ``device`` is what ONNX Runtime calls the memory of its caches."""

    name: str
    ep: str
    package: str
    device: str = "cpu"
    options: Mapping[str, str] = field(default_factory=dict)
    """What it always gets, unless the caller says otherwise."""
    dropped: tuple[str, ...] = ()
    """Options of genai_config.json that need inputs of a fixed size, which nybble's are not."""
    where: str = ""
    """On which machines it can be."""
    runs: Runs = "any"
    """Which runs come out right."""
    pads_masks: bool = False
    """Whether zeros at the end of attention_mask change nothing but its length."""
    probed: bool = False
    """Whether GroupQueryAttention must be tried first: see ``probe``."""


PROVIDERS: Mapping[str, Provider] = {
    provider.name: provider
    for provider in (
        Provider("cpu", "CPUExecutionProvider", "onnxruntime", pads_masks=True),
        Provider(
            "cuda",
            "CUDAExecutionProvider",
            "onnxruntime-gpu",
            "cuda",
            dropped=("enable_cuda_graph",),
            where="Linux and Windows with an NVIDIA GPU",
        ),
        Provider(
            "dml",
            "DmlExecutionProvider",
            "onnxruntime-directml",
            "dml",
            options={"device_id": "0"},
            dropped=("enable_graph_capture",),
            where="Windows",
            # Its GroupQueryAttention knows a whole prompt and a single token; anything between gives
            # wrong numbers without an error (measured with 1.24.4; onnxruntime-genai refuses it).
            runs="whole or one",
        ),
        Provider(
            "webgpu",
            "WebGpuExecutionProvider",
            "onnxruntime-webgpu",
            "webgpu",
            dropped=("enableGraphCapture",),
            probed=True,
            where="machines with a GPU that Vulkan, Direct3D 12 or Metal drives",
        ),
        Provider(
            "openvino", "OpenVINOExecutionProvider", "onnxruntime-openvino", where="Intel processors and GPUs"
        ),
        Provider("coreml", "CoreMLExecutionProvider", "onnxruntime", where="macOS"),
        Provider("qnn", "QNNExecutionProvider", "onnxruntime-qnn", where="Windows on Snapdragon"),
    )
}

AUTO_ORDER = ("cuda", "dml", "webgpu")
"""What ``auto`` tries before the CPU; the others compile the model first and are chosen by name only."""


@dataclass(frozen=True)
class Choice:
    """What ``auto`` takes, best first, and why."""

    names: tuple[str, ...]
    reason: str


def import_runtime() -> Any:
    """The package ``onnxruntime``, whichever distribution brought it.

    Raises:
        DeviceError: none is installed.
    """
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise DeviceError(
            f'device onnxruntime needs ONNX Runtime ({error}): pip install "nybble[onnx]" for the CPU, or'
            " one of "
            + ", ".join(sorted({provider.package for provider in PROVIDERS.values()} - {"onnxruntime"}))
        ) from None


def find_provider(name: str) -> Provider:
    """The row of a name.

    Raises:
        DeviceError: no such provider.
    """
    provider = PROVIDERS.get(name)
    if provider is None:
        raise DeviceError(
            f"unknown device onnxruntime:{name}; there are "
            + ", ".join(f"onnxruntime:{known}" for known in [*PROVIDERS, "auto"])
        )
    return provider


def available(runtime: Any) -> frozenset[str]:
    """Nybble's names of the providers that this ONNX Runtime was built with."""
    built_in = set(runtime.get_available_providers())
    return frozenset(provider.name for provider in PROVIDERS.values() if provider.ep in built_in)


def require(runtime: Any, provider: Provider) -> None:
    """Check that a provider is there.

    Raises:
        DeviceError: it is not; the message names the package that has it.
    """
    if provider.name not in available(runtime):
        raise DeviceError(missing(runtime, provider))


def missing(runtime: Any, provider: Provider) -> str:
    """Why a provider cannot be used, and what to install."""
    has = ", ".join(sorted(available(runtime))) or "none that nybble knows"
    where = f" (for {provider.where})" if provider.where else ""
    return (
        f"the installed onnxruntime {runtime.__version__} has no {provider.ep} (it has: {has});"
        f" pip uninstall it and pip install {provider.package}{where}"
    )


def choose(runtime: Any, wanted_by_model: str | None = None) -> Choice:
    """What ``auto`` tries, in order: what the folder was made for if it is here, then GPUs, then the CPU."""
    here = available(runtime)
    names = [wanted_by_model] if wanted_by_model in here and wanted_by_model is not None else []
    names += [name for name in AUTO_ORDER if name in here and name not in names]
    if not names:
        absent = ", ".join(f"{name} ({PROVIDERS[name].package})" for name in AUTO_ORDER)
        return Choice(("cpu",), f"cpu, for the installed onnxruntime {runtime.__version__} has no {absent}")
    reason = f"{names[0]}, " + (
        "for which the model was made" if names[0] == wanted_by_model else "the first that is built in"
    )
    return Choice(
        (*[name for name in names if name != "cpu"], "cpu") if names[0] != "cpu" else ("cpu",), reason
    )
