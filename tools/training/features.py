"""The features that a draft learns from: the target's hidden states over the training text, and its certainty of each
next token.

The engine's own runner computes them, in one pass over the text, so that a draft is trained on the very numbers that it
reads when it drafts. They are kept on disk, because training goes over them several times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from pilotfish.engine.build import Engine
from pilotfish.engine.execution.batch import Span
from pilotfish.engine.models.features import FeatureTap
from pilotfish.tools.training.shards import Shards
from pilotfish.tools.training.text import Conversation, TextStore

PASS_ROWS = 256
"""Token rows of a pass of the target."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """A conversation with the target's features of it."""

    tokens: torch.Tensor  # (length,) int64
    prompt_len: int
    features: torch.Tensor  # (length, layers * hidden_size) bfloat16: FeatureTap's, of the draft's layers
    final: torch.Tensor  # (length, hidden_size) bfloat16: after the last layer, before the final norm
    normalizer: torch.Tensor  # (length,) float32: log of the sum of exp(logits), over the whole vocabulary
    likeliest: torch.Tensor  # (length,) int64: the target's most likely next token


class FeatureStore:
    """Shards of lessons, numbered as the text's: the fields of `Lesson` by name, concatenated, and their `lengths`."""

    COLUMNS = ("tokens", "features", "final", "normalizer", "likeliest")

    def __init__(self, folder: Path, layers: tuple[int, ...]) -> None:
        self._shards = Shards(folder / "-".join(map(str, layers)))
        self.layers = layers

    @property
    def shards(self) -> int:
        return len(self._shards)

    def write(self, shard: int, lessons: list[Lesson]) -> None:
        tensors = {name: torch.cat([getattr(each, name) for each in lessons]) for name in self.COLUMNS}
        tensors |= {name: tensors[name].int() for name in ("tokens", "likeliest")}
        tensors["lengths"] = torch.tensor([len(each.tokens) for each in lessons], dtype=torch.int32)
        tensors["prompt_lens"] = torch.tensor([each.prompt_len for each in lessons], dtype=torch.int32)
        self._shards.write(shard, tensors)

    def read(self, shard: int) -> list[Lesson]:
        tensors = self._shards.read(shard)
        tensors |= {name: tensors[name].long() for name in ("tokens", "likeliest")}
        lengths, prompt_lens = tensors["lengths"].tolist(), tensors["prompt_lens"].tolist()
        rows = zip(*(tensors[name].split(lengths) for name in self.COLUMNS), strict=True)
        return [
            Lesson(prompt_len=prompt_len, **dict(zip(self.COLUMNS, row, strict=True)))
            for prompt_len, row in zip(prompt_lens, rows, strict=True)
        ]


def write_features(
    engine: Engine, text: TextStore, store: FeatureStore, progress: Callable[[int, int], object]
) -> None:
    """Add the shards that the text has and the features lack; `progress` gets the shards done and their total."""
    for shard in range(store.shards, text.shards):
        lessons = [lesson for batch in _batches(text.read(shard)) for lesson in _run(engine, batch, store.layers)]
        store.write(shard, lessons)
        progress(shard + 1, text.shards)


def _batches(conversations: list[Conversation]) -> Iterator[list[Conversation]]:
    """Group conversations into passes of at most PASS_ROWS tokens, cutting longer ones."""
    batch: list[Conversation] = []
    rows = 0
    for conversation in conversations:
        tokens = conversation.tokens[:PASS_ROWS]
        if len(tokens) <= conversation.prompt_len:
            continue  # nothing is left of the answer
        if rows + len(tokens) > PASS_ROWS:
            yield batch
            batch, rows = [], 0
        batch.append(Conversation(tokens, conversation.prompt_len))
        rows += len(tokens)
    if batch:
        yield batch


@torch.inference_mode()
def _run(engine: Engine, batch: list[Conversation], layers: tuple[int, ...]) -> list[Lesson]:
    last = engine.runner.model.config.num_layers
    tap = FeatureTap(layers if last in layers else (*layers, last))
    tables = [engine.pool.allocate(-(-len(each.tokens) // engine.info.block_size)) or [] for each in batch]
    lengths = [len(each.tokens) for each in batch]
    try:
        logits = engine.runner.run(
            [
                Span(each.tokens, 0, table, logit_rows=len(each.tokens))
                for each, table in zip(batch, tables, strict=True)
            ],
            tap,
        )
    finally:
        for table in tables:
            engine.pool.release(table)
    assert tap.features is not None
    hidden = tap.features.shape[1] // len(tap.layers)
    normalizers = torch.cat([torch.logsumexp(part.float(), dim=1) for part in logits.split(64)]).split(lengths)
    likeliest = logits.argmax(1).split(lengths)
    taken = tap.features.to(torch.bfloat16).split(lengths)
    index = tap.layers.index(last)
    return [
        Lesson(
            tokens=torch.tensor(each.tokens),
            prompt_len=each.prompt_len,
            features=taken[i][:, : len(layers) * hidden].contiguous(),
            final=taken[i][:, index * hidden : (index + 1) * hidden].contiguous(),
            normalizer=normalizers[i].clone(),
            likeliest=likeliest[i].clone(),
        )
        for i, each in enumerate(batch)
    ]
