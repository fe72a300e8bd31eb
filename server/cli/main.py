"""The `pilotfish` command. `pilotfish serve` has a flag for each field of EngineConfig and ServerConfig; the other
commands are in `server.cli`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from pilotfish import __version__
from pilotfish.engine.config import EngineConfig
from pilotfish.errors import ConfigError, ParameterError, PilotfishError
from pilotfish.server.cli import bench, plan, selftest, train_draft, verify
from pilotfish.server.cli import config_sources as configuration
from pilotfish.server.cli.flags import add_flags
from pilotfish.server.config import ServerConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, 1 if it failed, 2 if it was asked for something impossible."""
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
    except KeyboardInterrupt:  # of serve, while files are downloaded: nothing is running yet
        return 130


def _serve(options: dict[str, Any]) -> int:
    read = configuration.read(options)
    if options["print_config"]:
        print(configuration.as_yaml(read), end="")
        return 0
    # Imported here: --help and mistakes need none of it.
    from pilotfish.server.console import Console
    from pilotfish.server.serve import configure_logging, serve

    configure_logging(read.server)
    return serve(read.engine, read.server, Console(as_log=read.server.log_format == "json"))


def read_settings(options: dict[str, object]) -> tuple[EngineConfig, ServerConfig]:
    """Both configs: see `server.cli.config_sources.read`."""
    read = configuration.read(options)
    return read.engine, read.server


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pilotfish",
        description="An OpenAI-compatible serving engine around speculative decoding that never changes the text.",
    )
    parser.add_argument("--version", action="version", version=f"pilotfish {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    serve = commands.add_parser(
        "serve",
        help="serve a model over HTTP",
        description="Serve a model over an OpenAI-compatible HTTP API. Without any flags: a small model, on port 8000.",
        allow_abbrev=False,
    )
    serve.add_argument(
        "--config",
        metavar="FILE",
        help="a YAML file with any of the settings below, by their names; variables (PILOTFISH_PORT for --port) win "
        "over it, and flags over both",
    )
    serve.add_argument(
        "--print-config",
        action="store_true",
        help="print the settings as they come out of file, variables and flags, without secrets, and do nothing else",
    )
    add_flags(serve, EngineConfig, "engine")
    add_flags(serve, ServerConfig, "server")
    serve.set_defaults(run=_serve)
    bench.add_parser(commands)
    verify.add_parser(commands)
    train_draft.add_parser(commands)
    plan.add_parser(commands)
    selftest.add_parser(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
