"""The CPU device: our own kernels, chosen at run time for this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nybble.errors import DeviceError

if TYPE_CHECKING:
    from nybble.checkpoint.checkpoint import Checkpoint
    from nybble.checkpoint.config import ModelConfig
    from nybble.devices.cpu.session import CpuSession

KV_CACHES = ("f32", "f16", "bf16", "q8_0", "q4_0")
PRECISIONS = ("fast", "f32")


def longest_context(config: ModelConfig) -> int:
    """Most tokens of a sequence on the CPU device."""
    most = config.max_position_embeddings
    if config.rope.kind == "dynamic" and config.rope.original_max_position_embeddings:
        # Its frequencies change with every token past that length, and the cached keys with them.
        most = min(most, config.rope.original_max_position_embeddings)
    return most


def compile_session(
    checkpoint: Checkpoint,
    *,
    threads: int | None = None,
    context_length: int | None = None,
    kv_cache: str | None = None,
    kv_cache_limit: int | None = None,
    precision: str = "fast",
    max_rows: int | None = None,
) -> CpuSession:
    """Make a checkpoint ready to run on the CPU.

    Args:
        checkpoint: the model; its tensors stay mapped and are used in place.
        threads: threads that compute; default: the cores that this process may use.
        context_length: most tokens of one sequence; default: what the model was trained for. Memory
            is taken as sequences grow, in pages of 64 tokens.
        kv_cache: encoding of cached keys and values: f32, f16, bf16, q8_0 or q4_0. Default: f16, and
            f32 with ``precision="f32"``.
        kv_cache_limit: bytes that all sequences together may take; default: no limit.
        precision: ``fast`` rounds activations (int8 blocks or bfloat16) as the kernels like it;
            ``f32`` computes everything in float32 on the dequantized weights: the reference.
        max_rows: tokens worked on at a time; default: by the model's width.

    Raises:
        DeviceError: an option has a value that does not exist.
        UnsupportedError: the model needs an operator or encoding that the CPU device lacks.
        FormatError: tensors and config do not fit.
    """
    from nybble import _core
    from nybble.devices.cpu.lower import Lowering
    from nybble.devices.cpu.session import CpuSession
    from nybble.devices.longrope import longrope_of
    from nybble.models import build_graph

    if precision not in PRECISIONS:
        raise DeviceError(f"precision is one of {', '.join(PRECISIONS)}, not {precision!r}")
    if kv_cache is None:
        kv_cache = "f32" if precision == "f32" else "f16"
    if kv_cache not in KV_CACHES:
        raise DeviceError(f"kv_cache is one of {', '.join(KV_CACHES)}, not {kv_cache!r}")
    if threads is None:
        threads = _core.default_threads()
    if not 1 <= threads <= 1024:
        raise DeviceError(f"threads is between 1 and 1024, not {threads}")
    most = longest_context(checkpoint.config)
    if context_length is None:
        context_length = most
    if not 1 <= context_length <= most:
        raise DeviceError(f"context_length is between 1 and {most} for this model, not {context_length}")

    graph = build_graph(checkpoint)
    adapters = len(checkpoint.adapters)
    lowering = Lowering(graph, checkpoint.tensors, context_length, adapters=adapters, threads=threads)
    plan = lowering.run()
    try:
        native = _core.make_session(
            plan, threads, kv_cache, kv_cache_limit or 0, max_rows or 0, precision == "f32"
        )  # fmt: skip
    except (ValueError, RuntimeError) as error:
        raise DeviceError(str(error)) from None
    return CpuSession(
        native, vocab_size=graph.output.width, context_length=context_length, longrope=longrope_of(graph),
        keep_alive=(lowering.keep_alive, plan, checkpoint), adapters=len(checkpoint.adapters),
    )  # fmt: skip
