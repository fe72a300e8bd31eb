"""A model-based drafter of one file: it recognises its files and has weights to load, if only a token to repeat."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

from pilotfish.checkpoints.catalog import ModelFiles
from pilotfish.engine.draft import Draft
from pilotfish.engine.models.decoder_model import DecoderModel
from pilotfish.engine.sequence import Sequence
from pilotfish.engine.speculation.drafters.drafter import DraftRequest, LoadedDraft


def recognise(files: ModelFiles) -> bool:
    return (files.path / "toy.json").is_file()


def load(name: str, files: ModelFiles, target: DecoderModel, *rest: Any) -> LoadedDraft:
    token = json.loads((files.path / "toy.json").read_text())["token"]
    return LoadedDraft(name, token, target.config, partial(_make, name, token))


def _make(name: str, token: int, *rest: Any) -> ToyHead:
    return ToyHead(name, token)


class ToyHead:
    def __init__(self, name: str, token: int) -> None:
        self.name, self.token = name, token
        self.passes: tuple[int, ...] = ()
        self.block = 0

    def propose(self, requests: list[DraftRequest]) -> list[Draft]:
        self.passes = (len(requests),) * max(each.limit for each in requests)
        return [Draft((self.token,) * each.limit, drafter=self.name) for each in requests]

    def backlog(self, sequence: Sequence) -> int:
        return 1

    def try_pass(self, rows: int) -> None:
        pass

    def capture(self, planned: Callable[..., object]) -> None:
        pass

    def release(self, sequence: Sequence) -> None:
        pass
