"""``nybble remove``: delete models, or what is left of a broken download, from the cache."""

from __future__ import annotations

import argparse

from nybble.cli import console

EPILOG = "Only the cache is touched: a file of your own is never deleted."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``nybble remove``."""
    parser.add_argument(
        "models", metavar="NAME", nargs="+", help="name, source or path, as nybble list shows it"
    )


def run(arguments: argparse.Namespace) -> int:
    """Delete one model after another."""
    from nybble import hub

    for name in arguments.models:
        freed = hub.remove(name)
        console.note(f"removed {name}: {console.size(freed)} freed")
    return 0
