"""The `pilotfish` command: its parser, and the exit statuses of errors."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pilotfish import __version__
from pilotfish.errors import ConfigError, ParameterError, PilotfishError
from pilotfish.server.cli import bench, cache, chat, doctor, models, plan, run, selftest, serve, train_draft, verify


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 1 if it failed, 2 for arguments or settings that cannot work."""
    options = vars(_parser().parse_args(arguments))
    try:
        status: int = options["run"](options)
        return status
    except (ConfigError, ParameterError) as error:
        print(f"pilotfish: {error}", file=sys.stderr)
        return 2
    except PilotfishError as error:
        print(f"pilotfish: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # in serve, while files are downloaded and nothing is running yet
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pilotfish",
        description="An OpenAI-compatible serving engine around speculative decoding that never changes the text.",
    )
    parser.add_argument("--version", action="version", version=f"pilotfish {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (serve, run, chat, models):
        module.COMMAND.add_to(commands)
    for command in (cache.PULL, cache.LIST, cache.RM):
        command.add_to(commands)
    for module in (bench, verify, train_draft, plan, selftest, doctor):
        module.COMMAND.add_to(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
