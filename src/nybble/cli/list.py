"""``nybble list``: the models in the cache, and those that are known by name."""

from __future__ import annotations

import argparse

from nybble.cli import console

EPILOG = "The cache lies where NYBBLE_CACHE says, or in the system's place for caches."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``nybble list``."""
    parser.add_argument("--known", action="store_true", help="the names that nybble knows, cached or not")
    parser.add_argument("--json", action="store_true", help="print a JSON list")


def run(arguments: argparse.Namespace) -> int:
    """Print the list."""
    return _known(arguments.json) if arguments.known else _cached(arguments.json)


def _cached(as_json: bool) -> int:
    from nybble import hub

    models = hub.list_models()
    if as_json:
        console.write_json(
            [
                {
                    "name": model.name,
                    "source": model.source,
                    "path": str(model.path),
                    "size": model.size,
                    "last_used": model.last_used.isoformat(timespec="seconds"),
                    "sha256": {file.path: file.sha256 for file in model.manifest.files},
                }
                for model in models
            ]
        )
        return 0
    if not models:
        console.note("the cache is empty; nybble list --known shows what can be pulled by name")
        return 0
    rows = [(m.name, console.size(m.size), f"{m.last_used:%Y-%m-%d %H:%M}", m.path) for m in models]
    console.write(console.table(("NAME", "SIZE", "LAST USED", "FILE"), rows, right=("SIZE",)))
    console.note(f"{len(models)} models, {console.size(sum(m.size for m in models))}")
    return 0


def _known(as_json: bool) -> int:
    from nybble import hub
    from nybble.hub.known import DEFAULT_MODEL, KNOWN_MODELS

    cached = {model.source for model in hub.list_models()}
    if as_json:
        console.write_json(
            [
                {
                    "name": model.name,
                    "aliases": list(model.aliases),
                    "source": model.source,
                    "size": model.size,
                    "license": model.license,
                    "description": model.description,
                    "default": model.name == DEFAULT_MODEL,
                    "cached": model.source in cached,
                }
                for model in KNOWN_MODELS
            ]
        )
        return 0
    rows = [
        (
            m.name,
            console.size(m.size),
            "yes" if m.source in cached else "",
            m.description,
            m.license.split(" (")[0],
        )
        for m in KNOWN_MODELS
    ]
    header = ("NAME", "SIZE", "CACHED", "WHAT IT IS", "LICENCE")
    console.write(console.table(header, rows, right=("SIZE",)))
    return 0
