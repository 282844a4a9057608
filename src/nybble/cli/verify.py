"""``nybble verify``: whether an output is still what its manifest says."""

from __future__ import annotations

import argparse

from nybble.cli import console

EPILOG = """\
PATH is a folder or file that "nybble convert" wrote, or its manifest (nybble.json in a folder,
FILE.nybble.json beside a file). Exit code 1: a file is missing or changed, or there is one too many.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``nybble verify``."""
    parser.add_argument("path", metavar="PATH", help="what was written")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Compare, and print what differs."""
    from nybble.convert.verify import verify

    found = verify(arguments.path)
    outputs = found.manifest.outputs
    problems = {"missing": found.missing, "changed": found.changed, "extra": found.extra}
    if arguments.json:
        console.write_json(
            {
                "manifest": str(found.path),
                "ok": found.ok,
                "files": len(outputs),
                "nbytes": sum(item.nbytes for item in outputs),
                **{kind: list(names) for kind, names in problems.items()},
            }
        )
    elif found.ok:
        size = console.size(sum(item.nbytes for item in outputs))
        console.write(
            f"ok: {len(outputs)} file{'s' * (len(outputs) != 1)}, {size}, as {found.path.name} says\n"
        )
    else:
        for kind, names in problems.items():
            for name in names:
                console.write(f"{kind}: {console.printable(name)}\n")
    return 0 if found.ok else 1
