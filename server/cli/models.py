"""`pilotfish models`: what can be served. See docs/models.md."""

from __future__ import annotations

import argparse
from typing import Any

from pilotfish.server.cli.command import Command
from pilotfish.server.cli.table import aligned

HEAD = ("models", "model_type", "GGUF", "on the CPU", "tests run")


def lines() -> list[str]:
    """The table's lines, a family in each, from the engine's registry."""
    from pilotfish.engine.models.registry import FAMILIES

    body = [
        (
            family.models,
            _listed(family.model_types),
            _listed(family.gguf_architectures),
            family.cpu,
            _listed(("tiny ones", *family.run), ""),
        )
        for family in FAMILIES
    ]
    others = ("any other decoder", "transformers' causal language models", "-", "torch", "tiny ones of six")
    return aligned(HEAD, [*body, others], left=HEAD)


def _listed(names: tuple[str, ...], quote: str = "`") -> str:
    return ", ".join(f"{quote}{name}{quote}" for name in names) or "-"


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def _run(options: dict[str, Any]) -> int:
    print(*lines(), sep="\n")
    return 0


COMMAND = Command(
    name="models",
    help="list the models that can be served",
    description=(
        "Lists the families of models that the engine computes itself: their names in config.json and in GGUF files, "
        "and how the CPU computes them. Any drafter goes with any of them. Other decoders are computed by "
        "transformers' code."
    ),
    example="pilotfish models",
    add_arguments=_add_arguments,
    run=_run,
)
