"""Prints what Pilotfish needs to be installed, one requirement a line, from pyproject.toml: for the Dockerfile.

    requirements.py FILE torch            only torch
    requirements.py FILE rest [EXTRA...]  everything, with the extras named
    requirements.py FILE extras [EXTRA...]  what these extras add

Separate, because torch is the largest layer by far and changes least. No package is installed here.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path


def requirements(pyproject: Path, extras: list[str], alone: bool = False) -> list[str]:
    """The dependencies of the project (`alone`: without), and of these extras. Exits with a message for an extra that
    does not exist."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    found = [] if alone else list(project["dependencies"])
    known = project.get("optional-dependencies", {})
    for extra in extras:
        if extra not in known:
            sys.exit(f"EXTRAS names {extra!r}, but pyproject.toml has only {', '.join(sorted(known))}")
        found += known[extra]
    return found


def name_of(requirement: str) -> str:
    """`torch` of "torch==2.13.0"."""
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower()


if __name__ == "__main__":
    _, file, what, *names = sys.argv
    lines = requirements(Path(file), names, alone=what == "extras")
    print("\n".join(line for line in lines if name_of(line) == "torch") if what == "torch" else "\n".join(lines))
