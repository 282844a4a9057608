"""The device ``onnxruntime``: ONNX decoders as they are, on any execution provider of ONNX Runtime.

``onnxruntime:cpu``, ``:cuda``, ``:dml``, ``:webgpu``, ``:openvino``, ``:coreml``, ``:qnn`` name the
provider; ``onnxruntime:auto``, or ``onnxruntime`` alone, chooses one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nybble.errors import DeviceError

if TYPE_CHECKING:
    from nybble.checkpoint.checkpoint import Checkpoint
    from nybble.devices.onnxruntime.session import OnnxRuntimeSession
    from nybble.formats.onnx.folder import OnnxDecoder

AUTO = "auto"


def compile_session(
    checkpoint: Checkpoint,
    *,
    provider: str = AUTO,
    threads: int | None = None,
    context_length: int | None = None,
    kv_cache_limit: int | None = None,
    provider_options: Mapping[str, object] | None = None,
    session_options: Mapping[str, object] | None = None,
    allow_cpu_fallback: bool = False,
) -> OnnxRuntimeSession:
    """Make an ONNX folder or file ready to run in ONNX Runtime.

    Args:
        checkpoint: of format ``onnx``; only its ``source`` is used.
        provider: nybble's name of the execution provider, or ``auto``: what the folder was made for
            if it is here, else a GPU, else the CPU.
        threads: threads that compute on the CPU; default: the cores that this process may use.
        context_length: most tokens of one sequence; default: what genai_config.json says.
        kv_cache_limit: bytes that all caches together may take; default: no limit.
        provider_options: options of the provider, over those of genai_config.json.
        session_options: attributes of SessionOptions or its config entries, over genai_config.json's.
        allow_cpu_fallback: let the CPU run matrix products, attention or norms that the provider refuses.

    Raises:
        DeviceError: the provider is missing (the message names the package), cannot start, or would
            leave the heavy part of the model to the CPU; or the checkpoint is no ONNX model.
        FormatError, NotFoundError, UnsupportedError: see ``open_onnx_folder``.
    """
    from nybble.devices.onnxruntime import providers
    from nybble.formats.onnx.folder import describe_decoder

    if checkpoint.format != "onnx" or checkpoint.source is None:
        what = f"a {checkpoint.format} model" if checkpoint.format else "a model in memory"
        raise DeviceError(
            f"device onnxruntime runs ONNX folders and files, and this is {what}: convert it first, for"
            f" example nybble convert {checkpoint.source or 'MODEL'} OUTPUT --to onnx"
        )
    if threads is not None and not 1 <= threads <= 1024:
        raise DeviceError(f"threads is between 1 and 1024, not {threads}")
    runtime = providers.import_runtime()
    decoder = describe_decoder(checkpoint.source)
    maximum = decoder.io.context_length or checkpoint.config.max_position_embeddings or None
    length = context_length or maximum
    if length is None:
        raise DeviceError(f"{decoder.file}: nothing tells the model's context length: pass context_length")
    if not 1 <= length <= (maximum or length):
        raise DeviceError(f"context_length is between 1 and {maximum} for this model, not {length}")
    arguments: dict[str, Any] = {
        "threads": threads or _default_threads(),
        "context_length": length,
        "kv_cache_limit": kv_cache_limit,
        "provider_options": provider_options or {},
        "session_options": session_options or {},
        "allow_cpu_fallback": allow_cpu_fallback,
    }
    if provider != AUTO:
        chosen = providers.find_provider(provider)
        providers.require(runtime, chosen)
        return _start(runtime, decoder, chosen, "asked for", **arguments)
    return _first(runtime, decoder, arguments)


def _first(runtime: Any, decoder: OnnxDecoder, arguments: dict[str, Any]) -> OnnxRuntimeSession:
    """The first provider that starts; the reason tells what became of the others."""
    from nybble.devices.onnxruntime import providers
    from nybble.devices.onnxruntime.runtime import session_section, wanted_provider

    wanted = wanted_provider(session_section(decoder.genai, str(decoder.file)))
    choice = providers.choose(runtime, wanted)
    failed: list[str] = []
    for name in choice.names:
        try:
            reason = choice.reason if not failed else f"{name}, because {'; '.join(failed)}"
            return _start(runtime, decoder, providers.PROVIDERS[name], reason, **arguments)
        except DeviceError as error:
            failed.append(str(error))
    raise DeviceError("no execution provider runs this model: " + "; ".join(failed))


def _start(
    runtime: Any,
    decoder: OnnxDecoder,
    provider: Any,
    reason: str,
    *,
    threads: int,
    context_length: int,
    kv_cache_limit: int | None,
    provider_options: Mapping[str, object],
    session_options: Mapping[str, object],
    allow_cpu_fallback: bool,
) -> OnnxRuntimeSession:
    from nybble.devices.onnxruntime import runtime as make
    from nybble.devices.onnxruntime.decoder import Decoder
    from nybble.devices.onnxruntime.session import OnnxRuntimeSession

    where = str(decoder.file)
    section = make.session_section(decoder.genai, where)
    options = make.session_options(runtime, section, session_options, provider, threads=threads, where=where)
    for_provider = make.provider_options_of(section, provider, provider_options, where)
    session = make.make_session(runtime, decoder.file, provider, options, for_provider)
    placement = make.checked_placement(session, provider, allow_cpu_fallback=allow_cpu_fallback, where=where)
    runs = provider.runs
    if provider.probed and decoder.io.shares_buffers:
        from nybble.devices.onnxruntime.probe import attends_to_prompts

        if not attends_to_prompts(runtime, provider, for_provider):
            runs = "one"
            reason += (
                "; its attention gets prompts wrong on this GPU, so prompts run token by token, which is slow"
            )
    number = 0 if provider.device == "cpu" else make.device_id(for_provider)
    return OnnxRuntimeSession(
        runtime,
        Decoder(
            runtime, session, decoder.io, device=(provider.device, number), context_length=context_length,
            shared=decoder.io.shares_buffers,
        ),
        decoder.io,
        context_length=context_length,
        threads=threads,
        provider=provider.name,
        reason=reason,
        placement=placement,
        kv_cache_limit=kv_cache_limit,
        runs=runs,
        pads_masks=provider.pads_masks and decoder.io.shares_buffers,
    )  # fmt: skip


def _default_threads() -> int:
    """As the cpu device; 0, ONNX Runtime's own choice, where the native core is missing."""
    try:
        from nybble import _core
    except ImportError:
        return 0
    return int(_core.default_threads())
