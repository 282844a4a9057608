"""The HTML report in headless Chromium: it draws, in light and dark, and asks nobody for anything.

Chromium is driven through its own command line; ``CHROMIUM`` names it, else usual names are tried. Without
one the tests are skipped; with ``NYBBLE_REQUIRE_BROWSER=1`` they fail.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from nybble.evaluate.report_html import write_report
from support.evaluations import HOSTILE, made_up_evaluation
from support.required import missing

pytestmark = pytest.mark.slow

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip


@pytest.fixture(scope="module")
def chromium() -> str:
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        missing("NYBBLE_REQUIRE_BROWSER", f"no Chromium is here ({', '.join(NAMES)})", "set CHROMIUM to one")
    return found


def run(chromium: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [chromium, *QUIET, f"--user-data-dir={folder / 'profile'}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def test_the_page_is_drawn(chromium: str, tmp_path: Path) -> None:
    from zlib import decompress

    path = tmp_path / "report.html"
    write_report(made_up_evaluation(), path)
    pictures = {}
    for name, options in (("light", ()), ("dark", ("--blink-settings=preferredColorScheme=0",))):
        picture = tmp_path / f"{name}.png"
        run(chromium, tmp_path, *options, "--window-size=1200,2400", f"--screenshot={picture}", path.as_uri())
        pictures[name] = picture.read_bytes()
        assert pictures[name].startswith(b"\x89PNG") and len(pictures[name]) > 30_000
    # The first pixel of the first row tells the page's colour.
    first = {}
    for name, data in pictures.items():
        parts = b"".join(
            data[match.end() : match.end() + int.from_bytes(data[match.start() - 4 : match.start()], "big")]
            for match in re.finditer(b"IDAT", data)
        )
        first[name] = decompress(parts)[1:4]
    assert first["light"] == b"\xff\xff\xff"
    assert first["dark"] == bytes.fromhex("14171b")


def test_the_page_is_what_was_written(chromium: str, tmp_path: Path) -> None:
    """After parsing, nothing of a hostile label became a tag, and no message went to the console."""
    path = tmp_path / "report.html"
    write_report(made_up_evaluation(label=HOSTILE), path)
    done = run(chromium, tmp_path, "--enable-logging=stderr", "--v=0", "--dump-dom", path.as_uri())
    assert done.stdout.count("<svg") == 5 and done.stdout.count("<table") == 1 + 1 + 2
    assert "<script" not in done.stdout and "<img" not in done.stdout
    assert "CONSOLE" not in done.stderr, done.stderr


def test_nothing_overflows(chromium: str, tmp_path: Path) -> None:
    """Every label of a plot lies within its picture: measured by the browser itself."""
    path = tmp_path / "report.html"
    write_report(
        made_up_evaluation(8, label="-with-a-rather-long-name-that-goes-on-and-on-q4_k_m.gguf"), path
    )
    probe = """<script>addEventListener("load",()=>{let bad=[];
    for(const svg of document.querySelectorAll("svg")){const s=svg.getBoundingClientRect();
    for(const t of svg.querySelectorAll("text,circle")){const b=t.getBoundingClientRect();
    if(b.left<s.left-1||b.right>s.right+1||b.top<s.top-1||b.bottom>s.bottom+1)bad.push(t.textContent)}}
    for(const t of document.querySelectorAll(".wide"))if(t.scrollWidth>t.clientWidth+1)bad.push("table");
    const fits=document.documentElement.scrollWidth<=innerWidth;
    document.title="overflow:"+JSON.stringify(bad)+" width:"+fits})
    </script></body>"""
    page = path.read_text(encoding="utf-8")
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page).replace("</body>", probe)
    path.write_text(page, encoding="utf-8")
    done = run(chromium, tmp_path, "--window-size=1200,2400", "--dump-dom", path.as_uri())
    assert "<title>overflow:[] width:true</title>" in done.stdout, re.findall(
        "<title>.*?</title>", done.stdout
    )
