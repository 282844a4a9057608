"""The chat templates of a Hugging Face folder, in every place where they have been kept.

``chat_template.jinja`` and ``additional_chat_templates/*.jinja`` since 2025; before, the key
``chat_template`` of ``tokenizer_config.json``, which is one template or a list of named ones; those of
models with images are in ``chat_template.json``.
"""

from __future__ import annotations

from pathlib import Path

from nybble.errors import FormatError
from nybble.formats.json_text import MAX_FILE, read_object_if_there

DEFAULT = "default"


def read_chat_templates(folder: Path) -> tuple[str | None, dict[str, str]]:
    """The default template, or None, and the named ones (``tool_use``, ...).

    Raises:
        FormatError: a template is no text, too large, or its file is damaged.
    """
    found: dict[str, str] = {}
    for name in ("chat_template.json", "tokenizer_config.json"):
        found |= _of_config(folder / name)
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        found[path.stem] = _text(path)
    path = folder / "chat_template.jinja"
    if path.is_file():
        found[DEFAULT] = _text(path)
    return found.pop(DEFAULT, None), found


def _of_config(path: Path) -> dict[str, str]:
    value = read_object_if_there(path).get("chat_template")
    if value is None:
        return {}
    if isinstance(value, str):
        return {DEFAULT: value}
    items = value if isinstance(value, list) else [value]
    templates: dict[str, str] = {}
    for item in items:
        name = item.get("name") if isinstance(item, dict) else None
        template = item.get("template") if isinstance(item, dict) else None
        if not isinstance(name, str) or not isinstance(template, str):
            raise FormatError(f"{path}: chat_template must be text, or a list of named templates")
        templates[name] = template
    return templates


def _text(path: Path) -> str:
    if path.stat().st_size > MAX_FILE:
        raise FormatError(f"{path}: has {path.stat().st_size} bytes; at most {MAX_FILE} are read")
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: is not UTF-8: {error.reason} at byte {error.start}") from None
