"""Command: one subcommand of `pilotfish`, and helpers for its arguments."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pilotfish.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    name: str
    help: str
    """Its line in the list of commands."""
    description: str
    example: str
    """Command lines, shown below the flags."""
    status: str = ""
    """The meaning of its exit statuses."""
    add_arguments: Callable[[argparse.ArgumentParser], object]
    run: Callable[[dict[str, Any]], int]
    """Takes the parsed arguments by name and returns the exit status. Raises PilotfishError."""

    def add_to(self, commands: Any) -> argparse.ArgumentParser:
        """Add this command's parser to `commands`, the result of `add_subparsers`."""
        parser: argparse.ArgumentParser = commands.add_parser(
            self.name,
            help=self.help,
            description=textwrap.fill(self.description, 79),
            epilog=f"{textwrap.fill(self.status, 79)}\n\nexample:\n{textwrap.indent(self.example, '  ')}".strip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_arguments(parser)
        parser.set_defaults(run=self.run)
        return parser


def add_number(
    parser: argparse.ArgumentParser, flag: str, default: float, text: str, kind: Callable[[str], Any] | None = None
) -> None:
    """Add a flag with a number; its help is `text` and the default. `kind` parses the number (default: `positive`)."""
    help_text = f"{text} (default: {default:g})"
    parser.add_argument(flag, type=kind or positive, default=default, metavar="N", help=help_text)


def make_folder(name: str) -> Path:
    """Create the folder named by --out, and its parents. Raises ConfigError."""
    try:
        Path(name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out is {name!r}, where no folder can be made: {error}") from error
    return Path(name)


def positive(text: str) -> int:
    """Parse an integer of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def positives(text: str) -> list[int]:
    """Parse "1,8" into [1, 8], each number once."""
    return list(dict.fromkeys(positive(part) for part in text.split(",")))
