"""`pilotfish pull`, `list` and `rm`: the models that are kept on this machine."""

from __future__ import annotations

import argparse
from typing import Any

from pilotfish.server.cli.command import Command
from pilotfish.server.cli.table import aligned


def _model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="a name of the catalogue, or a hub name like org/name"
    )


def _pull(options: dict[str, Any]) -> int:
    from pilotfish.checkpoints.catalog import resolve
    from pilotfish.server.console import Console

    console = Console()
    for model in options["models"]:
        files = resolve(model, console.progress)
        console.line(f"{files.name}: {files.path}")
    return 0


def _list_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--all", action="store_true", help="also those of the catalogue that are not here yet")


def _list(options: dict[str, Any]) -> int:
    from pilotfish.checkpoints.cache import kept_models
    from pilotfish.checkpoints.catalog import CATALOG

    kept = kept_models()
    body = [(each.name, _megabytes(each.size), str(each.path)) for each in kept]
    names = {each.name for each in kept}
    if options["all"]:
        body += [(each.name, _megabytes(each.size), "not downloaded") for each in CATALOG if each.name not in names]
    if not body:
        print(
            "No model is kept here yet: pilotfish list --all shows the catalogue, pilotfish pull MODEL downloads one."
        )
        return 0
    print(*aligned(("model", "MB", "files"), body, left=("model", "files")), sep="\n")
    return 0


def _rm(options: dict[str, Any]) -> int:
    from pilotfish.checkpoints.cache import remove

    for model in options["models"]:
        print(f"{model}: {_megabytes(remove(model))} MB deleted")
    return 0


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.0f}"


PULL = Command(
    name="pull",
    help="download a model",
    description="Download models, and keep them for the next start.",
    example="pilotfish pull smollm2-135m",
    add_arguments=_model,
    run=_pull,
)
LIST = Command(
    name="list",
    help="list the models that are kept here",
    description="List the models that are kept on this machine, with their sizes.",
    example="pilotfish list --all",
    add_arguments=_list_arguments,
    run=_list,
)
RM = Command(
    name="rm",
    help="delete a model that is kept here",
    description="Delete the files of models that are kept on this machine.",
    example="pilotfish rm gemma-3-270m",
    add_arguments=_model,
    run=_rm,
)
