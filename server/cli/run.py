"""`pilotfish run`: one answer, from a model in this process or from a server."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from pilotfish.engine.config import EngineConfig
from pilotfish.errors import ConfigError
from pilotfish.server.cli.command import Command
from pilotfish.server.cli.talk import add_talking_flags, partner, settings_of, show, terminal

MODEL = EngineConfig().model


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", help="what to answer (default: standard input)")
    add_talking_flags(parser)


def _run(options: dict[str, Any]) -> int:
    prompt = options["prompt"]
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read()
    if not (prompt or "").strip():
        raise ConfigError("there is no prompt: give one, or pipe it in")
    system = [{"role": "system", "content": options["system"]}] if options["system"] else []
    settings = settings_of(options)
    with partner(options, MODEL) as answering:
        messages = [*system, {"role": "user", "content": prompt}]
        show(terminal(), answering.answer(messages, settings), options["colours"])
    return 0


COMMAND = Command(
    name="run",
    help="answer one prompt",
    description=f"Answer one prompt, with a model in this process ({MODEL} by default) or a server.",
    example='pilotfish run "What is a pilot fish?" --colours\n'
    'git diff | pilotfish run --system "Summarize this change."',
    add_arguments=_add_arguments,
    run=_run,
)
