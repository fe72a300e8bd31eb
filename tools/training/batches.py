"""Batches of lessons: which are held out, the order of the others, and padding."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch.nn.utils.rnn import pad_sequence

from pilotfish.tools.training.features import FeatureStore, Lesson

HELD_OUT_EVERY = 32
"""One conversation in this many is held out of training, to measure acceptance on it."""
GROUP = 4
"""Shards that are loaded and shuffled together."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Conversations, padded at their ends to one length. `answers` marks the positions whose next token belongs to the
    answer."""

    tokens: torch.Tensor  # (batch, length) int64
    features: torch.Tensor  # (batch, length, layers * hidden_size) float32
    final: torch.Tensor  # (batch, length, hidden_size) float32
    normalizer: torch.Tensor  # (batch, length) float32
    likeliest: torch.Tensor  # (batch, length) int64
    answers: torch.Tensor  # (batch, length) bool
    seed: int = 0
    """Of what a student draws for this batch."""


def training_batches(store: FeatureStore, epoch: int, seed: int, batch_tokens: int) -> Iterator[Batch]:
    """Yield an epoch's batches, deterministically. Conversations of similar length share a batch."""
    order, draws = random.Random(f"{seed}/{epoch}"), random.Random(f"{seed}/{epoch}/draws")
    shards = list(range(store.shards))
    order.shuffle(shards)
    for start in range(0, len(shards), GROUP):
        lessons = [
            lesson
            for shard in shards[start : start + GROUP]
            for position, lesson in enumerate(store.read(shard))
            if position % HELD_OUT_EVERY
        ]
        order.shuffle(lessons)
        batches = _cut(lessons, batch_tokens)
        order.shuffle(batches)
        for batch in batches:
            yield replace(pad(batch), seed=draws.getrandbits(32))


def held_out_batches(store: FeatureStore, batch_tokens: int, most: int) -> list[Batch]:
    """Return at most `most` of the held-out conversations, as batches."""
    lessons: list[Lesson] = []
    for shard in range(store.shards):
        lessons += [lesson for position, lesson in enumerate(store.read(shard)) if position % HELD_OUT_EVERY == 0]
        if len(lessons) >= most:
            break
    return [pad(batch) for batch in _cut(lessons[:most], batch_tokens)]


def _cut(lessons: list[Lesson], batch_tokens: int) -> list[list[Lesson]]:
    """Return batches of about `batch_tokens` tokens, padding included, from windows that are sorted by length."""
    batches: list[list[Lesson]] = []
    for start in range(0, len(lessons), 128):
        current: list[Lesson] = []
        for lesson in sorted(lessons[start : start + 128], key=lambda each: len(each.tokens)):
            if current and len(lesson.tokens) * (len(current) + 1) > batch_tokens:
                batches.append(current)
                current = []
            current.append(lesson)
        if current:
            batches.append(current)
    return batches


def pad(lessons: list[Lesson]) -> Batch:
    def padded(tensors: list[torch.Tensor]) -> torch.Tensor:
        return pad_sequence(tensors, batch_first=True)

    answers = [torch.arange(len(each.tokens)).add_(1).ge_(each.prompt_len).bool() for each in lessons]
    return Batch(
        tokens=padded([each.tokens for each in lessons]),
        features=padded([each.features for each in lessons]).float(),
        final=padded([each.final for each in lessons]).float(),
        normalizer=padded([each.normalizer for each in lessons]),
        likeliest=padded([each.likeliest for each in lessons]),
        answers=padded(answers),
    )
