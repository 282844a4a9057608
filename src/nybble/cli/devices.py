"""``nybble devices``: what was found, what is chosen, and why."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING

from nybble.cli import console

if TYPE_CHECKING:
    from nybble.devices.report import DeviceReport

EPILOG = "NYBBLE_ISA=avx2 (or another level below) makes the cpu device use a lower level."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``nybble devices``."""
    parser.add_argument("--json", action="store_true", help="print a JSON list")


def run(arguments: argparse.Namespace) -> int:
    """Print each device."""
    from nybble.devices.report import device_reports

    reports = device_reports()
    if arguments.json:
        console.write_json([dataclasses.asdict(report) for report in reports])
    else:
        console.write("\n".join(map(_text, reports)))
    return 0


def _text(report: DeviceReport) -> str:
    state = "chosen" if report.chosen else "available" if report.available else "not available"
    text = f"{console.styled(report.name, 'bold')}: {state}: {report.reason}\n"
    facts = report.facts
    shown = {"processor": facts.get("processor")}
    if "threads" in facts:
        shown["threads"] = f"{facts['threads']}: {facts['threads_reason']}"
    if "isa" in facts:
        shown["instruction set"] = f"{facts['isa']}: {facts['isa_reason']}"
    shown |= {name: facts.get(name) for name in ("version", "auto")}
    text += console.pairs((name, value) for name, value in shown.items() if value is not None)
    for level in reversed(report.instruction_sets):
        state = (
            "in use"
            if level.chosen
            else "available"
            if level.available
            else f"not available: {level.why_not}"
        )
        text += f"    {level.name:12}  {state}\n"
    providers = facts.get("providers")
    if isinstance(providers, dict):
        for name, why_not in providers.items():
            text += f"    {name:20}  {f'not available: {why_not}' if why_not else 'available'}\n"
    return text
