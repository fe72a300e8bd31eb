"""The flags and engine settings that `pilotfish bench` and `pilotfish verify` share."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from pilotfish.engine.config import EngineConfig
from pilotfish.server.cli.command import add_number
from pilotfish.server.cli.settings import add_flags, load

if TYPE_CHECKING:
    from pilotfish.engine.request import EngineInfo

OMITTED = frozenset({"model", "prefix_caching", "suffix_memory", "suffix_corpus"})
"""Engine settings that the commands choose themselves."""


def add_measuring_flags(
    parser: argparse.ArgumentParser, questions: int, max_tokens: int, omit: frozenset[str] = OMITTED
) -> None:
    parser.add_argument(
        "--arm",
        action="append",
        default=[],
        metavar="NAME",
        help="vanilla (always measured), auto (the default of requests that name no drafter) or a drafter's name; "
        "repeatable (default: vanilla and all loaded drafters)",
    )
    parser.add_argument(
        "--prompts",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help='JSON lines with "prompt", or "turns" whose first is taken (default: prompts that come with Pilotfish)',
    )
    add_number(parser, "--questions", questions, "maximum number of prompts of a file, spread evenly over it")
    add_number(parser, "--max-tokens", max_tokens, "maximum tokens of an answer")
    parser.add_argument("--ignore-eos", action="store_true", help="make every answer exactly --max-tokens long")
    add_flags(parser, EngineConfig, "engine", omit)


def engine_config(options: dict[str, Any]) -> EngineConfig:
    """Make the engine's config, without prefix caching and without a memory of past answers, which would save later
    arms the work of earlier ones."""
    return load(EngineConfig, options, {"prefix_caching": False, "suffix_memory": 0}).check()


def title(name: str, info: EngineInfo) -> str:
    return f"{name}, {info.dtype} on {info.device} ({info.kernels} kernels)"
