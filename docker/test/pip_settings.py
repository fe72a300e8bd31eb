"""Writes the settings that pip has on this machine, from files and environment, as one pip.conf for a build elsewhere:
`pip_settings.py FILE [LEFT_OUT...]`. Prints the options (`--volume`, then `FROM:TO:ro`, one a line) that show a build
the local files and folders which they name.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

KEPT = ("cert", "extra-index-url", "find-links", "index-url", "trusted-host")


def settings() -> dict[str, list[str]]:
    """Return the settings in KEPT as `pip config list` prints them, words by name."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, list[str]] = {}
    for line in listed.splitlines():
        key, _, value = line.partition("=")
        name = key.rpartition(".")[2]
        if name in KEPT:
            found.setdefault(name, []).extend(ast.literal_eval(value).split())
    return found


def main(target: Path, left_out: list[str]) -> None:
    lines, volumes = ["[global]"], []
    for name, words in settings().items():
        if name in left_out:
            continue
        kept = []
        for word in dict.fromkeys(words):
            if word.startswith("/") and Path(word).exists():
                # Elsewhere, since the build's own packages may want to write to the same place.
                volumes.append(f"{word}:/run/pip/{len(volumes)}:ro")
                kept.append(f"/run/pip/{len(volumes) - 1}")
            elif not word.startswith("file:"):
                kept.append(word)
        if kept:
            lines.append(f"{name} = {' '.join(kept)}")
    target.write_text("\n".join(lines) + "\n")
    for volume in volumes:
        print(f"--volume\n{volume}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
