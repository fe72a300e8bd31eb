"""Writes the dashboards, docker/grafana/dashboards/*.json, from service.py and speculation.py beside this file:
`python docker/grafana/build.py`. Needs grafana-foundation-sdk, which the extra `deploy` brings. A test holds them
together.
"""

from __future__ import annotations

import json
from pathlib import Path

import service
import speculation
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from panels import Board, render

BOARDS: dict[str, Board] = {"service.json": service.BOARD, "speculation.json": speculation.BOARD}
FOLDER = Path(__file__).parent / "dashboards"


def content(board: Board) -> str:
    """The file's text."""
    return json.dumps(render(board), cls=JSONEncoder, sort_keys=True, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, board in BOARDS.items():
        (FOLDER / name).write_text(content(board), encoding="utf-8")
