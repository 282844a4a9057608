"""``nybble version``: what to put into a bug report."""

from __future__ import annotations

import argparse
import platform
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed

import nybble
from nybble.cli import console

_LIBRARIES = ("numpy", "tokenizers", "jinja2", "huggingface_hub")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``nybble version``."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Print the versions."""
    facts = {
        "nybble": nybble.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "machine": platform.machine(),
        **{name: _version(name) for name in _LIBRARIES},
    }
    if arguments.json:
        console.write_json(facts)
    else:
        console.write(console.pairs(facts.items(), indent=""))
    return 0


def _version(name: str) -> str | None:
    try:
        return installed(name)
    except PackageNotFoundError:
        return None
