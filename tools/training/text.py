"""Training text: conversations as token ids, in numbered shards on disk, so that writing them can be interrupted."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file


@dataclass(frozen=True, slots=True)
class Conversation:
    """`tokens` is prompt and answer; the answer begins at `prompt_len`."""

    tokens: tuple[int, ...]
    prompt_len: int


class TextStore:
    """A folder of shards, 00000.safetensors and so on: `tokens` (all of them, int32), `lengths` and `prompt_lens`
    (one for each conversation, int32). A shard appears whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def shards(self) -> int:
        """How many there are, from 0 without a gap."""
        count = 0
        while self._path(count).is_file():
            count += 1
        return count

    def write(self, shard: int, conversations: Sequence[Conversation]) -> None:
        tensors = {
            "tokens": np.array([token for each in conversations for token in each.tokens], dtype=np.int32),
            "lengths": np.array([len(each.tokens) for each in conversations], dtype=np.int32),
            "prompt_lens": np.array([each.prompt_len for each in conversations], dtype=np.int32),
        }
        partial = self._path(shard).with_suffix(".partial")
        save_file(tensors, str(partial))
        os.replace(partial, self._path(shard))

    def read(self, shard: int) -> list[Conversation]:
        tensors = load_file(str(self._path(shard)))
        ends = np.cumsum(tensors["lengths"])
        starts = ends - tensors["lengths"]
        return [
            Conversation(tuple(tensors["tokens"][start:end].tolist()), int(prompt_len))
            for start, end, prompt_len in zip(starts, ends, tensors["prompt_lens"], strict=True)
        ]

    def __iter__(self) -> Iterator[Conversation]:
        for shard in range(self.shards):
            yield from self.read(shard)

    def token_count(self) -> int:
        return sum(len(conversation.tokens) for conversation in self)

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:05}.safetensors"
