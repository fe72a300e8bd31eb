"""`pilotfish doctor`: what this machine has, what would make it faster, and what to do."""

from __future__ import annotations

import argparse
import json
from typing import Any

import msgspec

from pilotfish.server.cli.command import Command

MARKS = {"ok": "  ", "advice": "! ", "wrong": "X "}


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def _run(options: dict[str, Any]) -> int:
    from pilotfish.tools.doctor import examine

    findings = examine()
    if options["json"]:
        print(json.dumps(msgspec.to_builtins(findings), indent=1))
    else:
        width = max(len(finding.what) for finding in findings)
        for finding in findings:
            print(f"{MARKS[finding.verdict]}{finding.what.ljust(width)}  {finding.value}")
        todo = [finding for finding in findings if finding.advice]
        print("\nWhat to do:" if todo else "\nNothing to do.")
        for finding in todo:
            print(f"- {finding.what}: {finding.advice}")
    return int(any(finding.verdict == "wrong" for finding in findings))


COMMAND = Command(
    name="doctor",
    help="examine this machine",
    description="Examine this machine: cores, instruction sets, memory and its bandwidth, GPUs, kernels, and what "
    "would make it faster. `pilotfish selftest` checks that what it computes is right.",
    example="pilotfish doctor",
    status="Exit status: 0, or 1 if something is wrong, such as a GPU that torch cannot use.",
    add_arguments=_add_arguments,
    run=_run,
)
