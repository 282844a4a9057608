"""What ``nybble devices`` says about ONNX Runtime: its providers, and what is missing."""

from __future__ import annotations

from nybble.devices.onnxruntime import providers
from nybble.errors import DeviceError


def report() -> tuple[bool, str, dict[str, object]]:
    """Whether ONNX Runtime is here, in words why, and facts: version, what auto takes, providers.

    ``providers`` maps ``onnxruntime:cuda`` and the like to what is missing; empty where it is here.
    """
    try:
        runtime = providers.import_runtime()
    except DeviceError as error:
        return False, str(error), {}
    here = providers.available(runtime)
    found = {
        f"onnxruntime:{provider.name}": "" if provider.name in here else _missing(provider)
        for provider in providers.PROVIDERS.values()
    }
    facts: dict[str, object] = {
        "version": str(runtime.__version__),
        "auto": providers.choose(runtime).reason,
        "providers": found,
    }
    return True, "runs ONNX folders as they are; only with --device onnxruntime or one of the below", facts


def _missing(provider: providers.Provider) -> str:
    where = f", for {provider.where}" if provider.where else ""
    return f"it is in the package {provider.package}{where}"
