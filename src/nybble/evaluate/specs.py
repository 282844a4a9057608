"""Specs: how a command line names a model, where it runs, and with which options.

    MODEL[@DEVICE][,OPTION=VALUE ...]

``model.gguf``, ``folder@onnxruntime:cpu``, ``model.gguf@cpu,precision=f32,kv_cache=f32``,
``smollm2,threads=1,label=one thread``. What follows the last ``@`` is a device only if it begins with
the name of one, since names of models may have an ``@`` too (``hf:owner/repo@main``).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from nybble.devices import DEVICES

OPTIONS = ("precision", "kv_cache", "threads", "label")
"""What may follow a model's name after commas."""


@dataclass(frozen=True)
class ModelSpec:
    """A model to evaluate.

    ``options`` are those of ``nybble.load``: ``precision``, ``kv_cache``, ``threads``. ``label`` is what
    results call it; empty: its file's or folder's name, and what makes it differ from the others.
    """

    model: str
    device: str | None = None
    options: Mapping[str, str | int] = field(default_factory=dict)
    label: str = ""

    @property
    def text(self) -> str:
        """As ``parse_spec`` reads it, without the label."""
        where = f"@{self.device}" if self.device else ""
        return self.model + where + "".join(f",{name}={value}" for name, value in self.options.items())


def parse_spec(text: str) -> ModelSpec:
    """A spec from its text.

    Raises:
        ValueError: an option is unknown or has no value, or there is no model.
    """
    model, *parts = text.split(",")
    while parts and "=" not in parts[0]:
        model += "," + parts.pop(0)  # a comma of a file's name
    options: dict[str, str | int] = {}
    for part in parts:
        name, separator, value = part.partition("=")
        if name not in OPTIONS or not separator or not value:
            raise ValueError(f"{text!r}: {part!r} is not OPTION=VALUE with one of {', '.join(OPTIONS)}")
        options[name] = _threads(text, value) if name == "threads" else value
    label = str(options.pop("label", ""))
    name, at, device = model.rpartition("@")
    if at and device.partition(":")[0] in DEVICES:
        model = name
    else:
        device = ""
    if not model:
        raise ValueError(f"{text!r} names no model")
    return ModelSpec(model, device or None, options, label)


def labelled(specs: Iterable[ModelSpec]) -> list[ModelSpec]:
    """The specs with a label each, no two alike."""
    specs = list(specs)
    names = [spec.label or _short(spec.model) for spec in specs]
    if len(set(names)) < len(names):
        names = [
            spec.label
            or (_short(spec.model) + spec.text[len(spec.model) :] if names.count(name) > 1 else name)
            for spec, name in zip(specs, names, strict=True)
        ]
    if len(set(names)) < len(names):
        names = [
            spec.label or spec.text if names.count(n) > 1 else n for spec, n in zip(specs, names, strict=True)
        ]
    seen: dict[str, int] = {}
    result = []
    for spec, name in zip(specs, names, strict=True):
        seen[name] = seen.get(name, 0) + 1
        result.append(replace(spec, label=name if seen[name] == 1 else f"{name} ({seen[name]})"))
    return result


def _short(model: str) -> str:
    """The last part of a path or name."""
    parts = [part for part in model.replace(os.sep, "/").split("/") if part]
    return parts[-1] if parts else model


def _threads(text: str, value: str) -> int:
    if not value.isascii() or not value.isdigit() or not int(value):
        raise ValueError(f"{text!r}: threads={value} is not a number above 0")
    return int(value)
