"""Training text: conversations as token ids, in shards on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pilotfish.tools.training.shards import Shards


@dataclass(frozen=True, slots=True)
class Conversation:
    """A prompt and its answer; in `tokens`, the answer begins at `prompt_len`."""

    tokens: tuple[int, ...]
    prompt_len: int


class TextStore:
    """Shards of conversations: `tokens` (concatenated, int32), and `lengths` and `prompt_lens` (one for each
    conversation, int32)."""

    def __init__(self, folder: Path) -> None:
        self._shards = Shards(folder)

    @property
    def shards(self) -> int:
        return len(self._shards)

    def write(self, shard: int, conversations: Sequence[Conversation]) -> None:
        columns = {
            "tokens": [token for each in conversations for token in each.tokens],
            "lengths": [len(each.tokens) for each in conversations],
            "prompt_lens": [each.prompt_len for each in conversations],
        }
        self._shards.write(shard, {name: torch.tensor(ids, dtype=torch.int32) for name, ids in columns.items()})

    def read(self, shard: int) -> list[Conversation]:
        tensors = self._shards.read(shard)
        texts = tensors["tokens"].split(tensors["lengths"].tolist())
        prompt_lens = tensors["prompt_lens"].tolist()
        return [Conversation(tuple(ids.tolist()), start) for ids, start in zip(texts, prompt_lens, strict=True)]

    def __iter__(self) -> Iterator[Conversation]:
        for shard in range(self.shards):
            yield from self.read(shard)

    def token_count(self) -> int:
        return sum(len(conversation.tokens) for conversation in self)
