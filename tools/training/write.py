"""The target writes its own training text: a user's turn, drawn from what the model expects there, then its answer.

That a chat model asked for nothing but a user's turn writes instructions of the kind that it was tuned on is Magpie's
observation (arXiv 2406.08464). A draft is to predict the target's own answers, so no other text comes closer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

from pilotfish.engine.llm import LLM
from pilotfish.engine.params import SamplingParams
from pilotfish.tools.training.settings import TrainSettings
from pilotfish.tools.training.text import Conversation, TextStore

SHARD = 256
"""Conversations written at a time: many more than run at once, so that the engine's batch stays full."""
MIN_TURN = 3
"""Least tokens of a user's turn; a shorter one is not a question."""
TURN_TEMPERATURE, TURN_TOP_P = 1.0, 0.95
ANSWER_TEMPERATURES = (0.0, 0.0, 0.8)
"""Temperatures of successive answers: drafts are used at any temperature, most often at 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """The tokens around a user's turn. A model without a chat template has only its begin-of-text before it."""

    before: tuple[int, ...]
    after: tuple[int, ...]


def write_text(
    llm: LLM, frame: Frame, store: TextStore, settings: TrainSettings, progress: Callable[[int], object]
) -> None:
    """Add shards until there are `settings.tokens` tokens. `progress` gets their number after each shard.

    A shard depends on the settings and its number alone, so that an interrupted run goes on to the same text.
    """
    written = store.token_count()
    progress(written)
    while written < settings.tokens:
        shard = store.shards
        conversations = _write_shard(llm, frame, settings, shard)
        store.write(shard, conversations)
        written += sum(len(each.tokens) for each in conversations)
        progress(written)


def answer_prompts(
    llm: LLM,
    prompts: Sequence[tuple[int, ...]],
    store: TextStore,
    settings: TrainSettings,
    progress: Callable[[int], object],
) -> None:
    """Write the target's answers to the user's own prompts, as the store's first shards, unless they are there."""
    chunks = [prompts[start : start + SHARD] for start in range(0, len(prompts), SHARD)]
    for shard in range(store.shards, len(chunks)):
        store.write(shard, _answer(llm, chunks[shard], settings, settings.seed * 1_000_003 - (shard + 1) * SHARD))
        progress(store.token_count())


def _write_shard(llm: LLM, frame: Frame, settings: TrainSettings, shard: int) -> list[Conversation]:
    seeds = [settings.seed * 1_000_003 + shard * SHARD + i for i in range(SHARD)]
    most = settings.turn_tokens
    params = [
        SamplingParams(temperature=TURN_TEMPERATURE, top_p=TURN_TOP_P, max_tokens=most, seed=seed) for seed in seeds
    ]
    turns = _complete(llm, [frame.before] * SHARD, params)
    # One that the limit cut off is kept: for a model without a template it is a text's beginning.
    prompts = [(*frame.before, *turn, *frame.after) for turn, _ in turns if len(turn) >= MIN_TURN]
    prompts = list(dict.fromkeys(prompts))
    return _answer(llm, prompts, settings, seeds[0])


def _answer(
    llm: LLM, prompts: Sequence[tuple[int, ...]], settings: TrainSettings, first_seed: int
) -> list[Conversation]:
    most = settings.answer_tokens
    temperatures = islice(cycle(ANSWER_TEMPERATURES), len(prompts))
    params = [SamplingParams(temperature=t, max_tokens=most, seed=first_seed + i) for i, t in enumerate(temperatures)]
    answers = _complete(llm, prompts, params)
    return [
        Conversation((*prompt, *answer, *end), len(prompt))
        for prompt, (answer, end) in zip(prompts, answers, strict=True)
    ]


def _complete(
    llm: LLM, prompts: Sequence[tuple[int, ...]], params: list[SamplingParams]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return what follows each prompt: the text's tokens, and the token that ended it, if one did."""
    completions = llm.generate(prompts, params, speculation="off")
    texts = []
    for completion in completions:
        ended = completion.stop_token is not None
        tokens = tuple(completion.token_ids)
        texts.append((tokens[:-1], tokens[-1:]) if ended else (tokens, ()))
    return texts
