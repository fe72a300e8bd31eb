"""Generating training text with the target itself: a user's turn, sampled from the model, then its answer.

A chat model that is prompted for a user's turn writes instructions of the kind that it was tuned on (Magpie, arXiv
2406.08464). A draft has to predict the target's own answers, so no other text is closer.
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
"""Conversations generated together: many more than run at once, so that the engine's batch stays full."""
MIN_TURN = 3
"""Minimum number of tokens of a user's turn; shorter ones are dropped."""
TURN_TEMPERATURE, TURN_TOP_P = 1.0, 0.95
ANSWER_TEMPERATURES = (0.0, 0.0, 0.8)
"""Temperatures of successive answers, in a cycle: drafts are used at any temperature, most often at 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """The tokens around a user's turn; only begin-of-text before it for a model without a chat template."""

    before: tuple[int, ...]
    after: tuple[int, ...]


def write_text(
    llm: LLM, frame: Frame, store: TextStore, settings: TrainSettings, progress: Callable[[int], object]
) -> None:
    """Add shards until there are `settings.tokens` tokens; `progress` is called with their number after each shard.

    A shard depends on the settings and its number alone, so an interrupted run resumes with the same text.
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
    """Add the target's answers to the user's prompts, as the store's first shards, unless they are there."""
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
    # Truncated turns are kept: for a model without a template they are the beginnings of texts.
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
    """Return each prompt's continuation: the text's tokens, and the stop token, if there is one."""
    completions = llm.generate(prompts, params, speculation="off")
    texts = []
    for completion in completions:
        tokens = tuple(completion.token_ids)
        texts.append((tokens, ()) if completion.stop_token is None else (tokens[:-1], tokens[-1:]))
    return texts
