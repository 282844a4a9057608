"""Writes docs/commands.md from the commands' own --help; ``--check`` only says whether it is current.

python scripts/make_docs.py
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "commands.md"

INTRODUCTION = """\
# Commands

<!-- Written by scripts/make_docs.py from the commands' --help: change the help, then run it. -->

Results go to standard output, notes and progress to standard error, so every command can stand in a
pipe. Exit codes: 0 done, 1 failed with a message, 2 wrong use, 130 interrupted by Ctrl-C, 141 the
reader of standard output went away. Colours appear only on a terminal, and not with `NO_COLOR`.
"""


def page() -> str:
    """The whole page."""
    os.environ.update(COLUMNS="100", NO_COLOR="1")
    from nybble.cli.main import COMMANDS, command_parser, main_parser

    helps = {"nybble": main_parser().format_help()}
    helps |= {f"nybble {name}": command_parser(name)[0].format_help() for name in COMMANDS}
    sections = (f"\n## {name}\n\n```text\n{text.rstrip()}\n```\n" for name, text in helps.items())
    return INTRODUCTION + "".join(sections)


def main(arguments: list[str]) -> int:
    """Write the page, or compare it."""
    if "--check" in arguments:
        current = PAGE.exists() and PAGE.read_text(encoding="utf-8") == page()
        if not current:
            print(f"{PAGE} is not current: run python scripts/make_docs.py", file=sys.stderr)
        return 0 if current else 1
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
