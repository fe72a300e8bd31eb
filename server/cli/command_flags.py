"""Flags that the measuring commands share, and what is made of them."""

from __future__ import annotations

import argparse

from pilotfish.engine.config import EngineConfig
from pilotfish.server.cli.flags import add_flags

OMITTED = frozenset({"model", "prefix_caching"})
"""Engine settings that the commands have their own say in."""


def add_common(
    parser: argparse.ArgumentParser, questions: int, max_tokens: int, omit: frozenset[str] = OMITTED
) -> None:
    parser.add_argument(
        "--arm",
        action="append",
        default=[],
        metavar="NAME",
        help="vanilla (always there), auto (what a request gets that names no drafter) or a drafter's name; repeatable "
        "(default: vanilla and all drafters there are)",
    )
    parser.add_argument(
        "--prompts",
        nargs="+",
        default=[],
        metavar="FILE",
        help='JSON lines with "prompt", or "turns" whose first is taken (default: prompts that come with Pilotfish)',
    )
    parser.add_argument(
        "--questions",
        type=positive,
        default=questions,
        metavar="N",
        help=f"most prompts of a file, spread evenly over it (default: {questions})",
    )
    parser.add_argument(
        "--max-tokens",
        type=positive,
        default=max_tokens,
        metavar="N",
        help=f"most tokens of an answer (default: {max_tokens})",
    )
    parser.add_argument("--ignore-eos", action="store_true", help="make every answer as long as that")
    add_flags(parser, EngineConfig, "engine", omit)


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def positives(text: str) -> list[int]:
    """ "1,8" -> [1, 8], each once."""
    return list(dict.fromkeys(positive(part) for part in text.split(",")))
