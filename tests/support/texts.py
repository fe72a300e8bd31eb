"""Prompts, sampling parameters and drafters for tests that compare texts, and what is compared of a completion."""

from __future__ import annotations

from pathlib import Path

import msgspec
import torch

from pilotfish.engine.llm import Completion
from pilotfish.engine.params import SamplingParams, Thinking
from pilotfish.engine.request import RequestStats
from pilotfish.text.grammar import compose

OBJECT = compose.json_value(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "count": {"type": "integer", "minimum": 0, "maximum": 99},
            "kind": {"enum": ["alpha", "beta"]},
        },
        "required": ["name", "count", "kind"],
        "additionalProperties": False,
        "x-guidance": {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False},
    }
)
GREEDY = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.8, top_p=0.9, seed=7, max_tokens=32, ignore_eos=True)
PARAMS = {
    "greedy": GREEDY,
    "sampled": SAMPLED,
    "hot": SamplingParams(temperature=1.0, seed=3, max_tokens=32, ignore_eos=True),
    "penalties": msgspec.structs.replace(
        SAMPLED, presence_penalty=0.5, frequency_penalty=0.4, repetition_penalty=1.2, min_tokens=20, ignore_eos=False
    ),
    "greedy penalties": msgspec.structs.replace(GREEDY, frequency_penalty=0.7, repetition_penalty=1.1),
    "bias": msgspec.structs.replace(SAMPLED, logit_bias={5: 4.0, 9: -100.0, 17: 2.5}, top_k=40, min_p=0.01),
    "words": msgspec.structs.replace(
        SAMPLED,
        typical_p=0.8,
        allowed_token_ids=tuple(range(3, 60)),
        bad_words=((7,), (9, 11), *((i, i + 1) for i in range(20, 40)), (12, 13, 14)),
    ),
    "schema": msgspec.structs.replace(GREEDY, grammar=OBJECT, max_tokens=64),
    "sampled schema": msgspec.structs.replace(SAMPLED, grammar=OBJECT, frequency_penalty=0.5, max_tokens=64),
    "regex": msgspec.structs.replace(SAMPLED, grammar=compose.pattern(r"([a-z]{2,5} ){3,4}[0-9]+\."), min_tokens=30),
    "thinking": msgspec.structs.replace(SAMPLED, thinking=Thinking(budget=9, end=(61, 62, 63))),
    "stops": msgspec.structs.replace(SAMPLED, stop_token_ids=tuple(range(200, 240)), min_tokens=5, ignore_eos=False),
}


DRAFTERS = ("off", "ngram", "suffix", "draft-model", "eagle3")


def prompts(count: int) -> list[list[int]]:
    """Prompts that repeat themselves, so that lookup finds something; of different lengths."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for i in range(count):
        words = torch.randint(3, 512, (5 + 3 * i,), generator=generator).tolist()
        made.append((words * 4)[: 12 + 9 * i])
    return made


def portfolio(draft: Path, head: Path | None = None) -> tuple[str, ...]:
    models = (f"draft-model={draft}",) if head is None else (f"draft-model={draft}", f"eagle3={head}")
    return ("ngram", "suffix", *models)


def stats_of(completion: Completion) -> RequestStats:
    """The stats that every finished request has."""
    assert completion.stats is not None
    return completion.stats


def texts(completions: list[Completion]) -> list[tuple[list[int], str | None]]:
    return [(completion.token_ids, completion.finish_reason) for completion in completions]
