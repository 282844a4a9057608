"""``python -m nybble`` is the ``nybble`` command."""

from __future__ import annotations

import sys

from nybble.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
