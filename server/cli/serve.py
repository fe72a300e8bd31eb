"""`pilotfish serve`: a flag for each field of EngineConfig and ServerConfig. See docs/configuration.md."""

from __future__ import annotations

import argparse
from typing import Any

from pilotfish.engine.config import EngineConfig
from pilotfish.server.cli.command import Command
from pilotfish.server.cli.settings import add_flags
from pilotfish.server.cli.sources import as_yaml, read
from pilotfish.server.config import ServerConfig


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="a YAML file with any of the settings below, by their names; environment variables (PILOTFISH_PORT for "
        "--port) win over it, and flags over both",
    )
    parser.add_argument(
        "--print-config",
        action="store_true",
        help="print the settings that file, variables and flags come to, without secrets, and exit",
    )
    add_flags(parser, EngineConfig, "engine")
    add_flags(parser, ServerConfig, "server")


def _run(options: dict[str, Any]) -> int:
    settings = read(options)
    if options["print_config"]:
        print(as_yaml(settings), end="")
        return 0
    # Imported here: --help and mistakes need none of it.
    from pilotfish.server.console import Console
    from pilotfish.server.serve import configure_logging, serve

    configure_logging(settings.server)
    return serve(settings.engine, settings.server, Console(as_log=settings.server.log_format == "json"))


COMMAND = Command(
    name="serve",
    help="serve a model over HTTP",
    description="Serve a model over an OpenAI-compatible HTTP API. Without any flags: a small model, on port 8000.",
    example="pilotfish serve --model meta-llama/Llama-3.1-8B-Instruct --api-key secret --port 9000",
    add_arguments=_add_arguments,
    run=_run,
)
