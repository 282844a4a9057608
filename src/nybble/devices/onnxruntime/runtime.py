"""Makes ONNX Runtime's session for a decoder: options, provider, and proof of where the nodes run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nybble.devices.onnxruntime.placement import RECORD, Placement, placement_of, strays
from nybble.devices.onnxruntime.providers import PROVIDERS, Provider
from nybble.errors import DeviceError, FormatError, UnsupportedError
from nybble.formats.fields import Fields

_OPTIONS: Mapping[str, type] = {
    "intra_op_num_threads": int,
    "inter_op_num_threads": int,
    "enable_cpu_mem_arena": bool,
    "enable_mem_pattern": bool,
    "log_severity_level": int,
    "enable_profiling": bool,
    "profile_file_prefix": str,
}
"""Keys that are attributes of SessionOptions; all others are config entries."""

_IGNORED = frozenset({"log_id", "provider_options", "providers", "log_verbosity_level", "use_env_allocators"})

_TOUCHES_FILES = re.compile(r"path|folder|file|librar|profil|dump|save|debug", re.IGNORECASE)
"""Options by which a model's own file could load code, or read and write files elsewhere."""


def session_section(genai: Mapping[str, Any], where: str) -> Mapping[str, object]:
    """genai_config.json's session options.

    Raises:
        FormatError: they are no mapping.
    """
    decoder = Fields(genai, where).fields("model").fields("decoder")
    decoder.fields("session_options")  # raises where one of them is no mapping
    found: object = genai
    for key in ("model", "decoder", "session_options"):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def wanted_provider(section: Mapping[str, object]) -> str | None:
    """The provider that genai_config.json names first, if nybble knows it; ``cpu`` where it names none."""
    listed = section.get("provider_options")
    for item in listed if isinstance(listed, list) else []:
        for name in item if isinstance(item, dict) else ():
            if str(name).lower() in PROVIDERS:
                return str(name).lower()
    return None


def provider_options_of(
    section: Mapping[str, object], provider: Provider, given: Mapping[str, object], where: str
) -> dict[str, str]:
    """Options for a provider: nybble's, then genai_config.json's, then the caller's.

    Raises:
        UnsupportedError: genai_config.json sets one that names a file.
    """
    options = dict(provider.options)
    listed = section.get("provider_options")
    for item in listed if isinstance(listed, list) else []:
        for name, values in item.items() if isinstance(item, dict) else ():
            if str(name).lower() != provider.name or not isinstance(values, dict):
                continue
            for key, value in values.items():
                _refuse_files(key, given, f"{where}: provider option {key}", "provider_options")
                if key not in provider.dropped:
                    options[key] = str(value)
    options.update({key: str(value) for key, value in given.items()})
    return options


def device_id(options: Mapping[str, str]) -> int:
    """The number of the device that the provider's options choose.

    Raises:
        DeviceError: it is no whole number.
    """
    given = options.get("device_id", "0")
    if not given.isdecimal():
        raise DeviceError(f"provider option device_id must be a whole number, not {given!r}")
    return int(given)


def session_options(
    runtime: Any,
    section: Mapping[str, object],
    given: Mapping[str, object],
    provider: Provider,
    *,
    threads: int,
    where: str,
) -> Any:
    """SessionOptions: genai_config.json's, then the caller's.

    Raises:
        UnsupportedError: genai_config.json sets one that names a file or a library.
        FormatError: a value of the wrong type.
    """
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors; warnings about shapes help nobody here
    for source, values in ((where, section), ("session_options", given)):
        for key, value in values.items():
            if key in _IGNORED:
                continue
            if values is section:
                _refuse_files(key, given, f"{where}: session option {key}", "session_options")
            kind = _OPTIONS.get(key)
            if kind is None:
                options.add_session_config_entry(key, str(value))
            elif isinstance(value, kind):
                setattr(options, key, value)
            else:
                raise FormatError(f"{source}: session option {key} must be {kind.__name__}, not {value!r}")
    options.intra_op_num_threads = threads
    options.add_session_config_entry(RECORD, "1")
    if provider.name == "dml":  # its documentation asks for both
        options.enable_mem_pattern = False
        options.execution_mode = runtime.ExecutionMode.ORT_SEQUENTIAL
    return options


def make_session(
    runtime: Any, file: Path, provider: Provider, options: Any, provider_options: Mapping[str, str]
) -> Any:
    """The session on one provider; ONNX Runtime adds the CPU for what the provider refuses.

    Raises:
        DeviceError: the model or the provider cannot be started, or ONNX Runtime left the provider out.
    """
    try:
        session = runtime.InferenceSession(
            str(file), options, providers=[(provider.ep, dict(provider_options))], enable_fallback=0
        )
    except Exception as error:
        raise DeviceError(
            f"onnxruntime:{provider.name} cannot run {file}: {str(error).strip()[:600]}"
        ) from None
    if provider.ep not in session.get_providers():
        raise DeviceError(
            f"ONNX Runtime could not start {provider.ep} and fell back to"
            f" {', '.join(session.get_providers())}: is there such a device, with its driver?"
        )
    return session


def checked_placement(session: Any, provider: Provider, *, allow_cpu_fallback: bool, where: str) -> Placement:
    """Where the nodes run; empty where this ONNX Runtime cannot tell and it was allowed not to know.

    Raises:
        DeviceError: matrix products, attention or norms would run on the CPU instead, or nobody knows.
    """
    placement = placement_of(session)
    if provider.name == "cpu" or allow_cpu_fallback:
        return placement or {}
    if placement is None:
        raise DeviceError(
            f"onnxruntime {_version()} cannot tell which nodes run on {provider.ep}: install 1.24 or later,"
            " or pass allow_cpu_fallback=True"
        )
    if moved := strays(placement, provider.ep):
        listed = ", ".join(f"{count} {op}" for op, count in sorted(moved.items()))
        raise DeviceError(
            f"{where}: {provider.ep} refuses part of the model, which would run on the CPU: {listed}; convert"
            " the model for this provider, or pass allow_cpu_fallback=True"
        )
    return placement


def _version() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)


def _refuse_files(key: str, given: Mapping[str, object], what: str, option: str) -> None:
    if _TOUCHES_FILES.search(key) and key not in given:
        raise UnsupportedError(
            f"{what} could load code or reach other files, which a model's own file may not ask for; if you"
            f" trust it, pass it yourself: {option}={{{key!r}: ...}}"
        )
