"""The recordings of `virtual_clock.py`: the real engine's answers, and what each head would have drafted for them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pilotfish.checkpoints.catalog import resolve
from pilotfish.engine.draft import NO_DRAFT, Draft
from pilotfish.engine.llm import LLM
from pilotfish.engine.params import SamplingParams
from pilotfish.engine.sequence import Sequence
from pilotfish.engine.speculation.control.candidates import Choice
from pilotfish.engine.speculation.drafters.drafter import Drafter, DraftRequest, ModelDrafter
from pilotfish.engine.speculation.speculator import Speculator, StepDrafts
from pilotfish.server.cli.prompts import encode, read_suites
from pilotfish.text.tokenizer import load_tokenizer

LONGEST = 8
"""Maximum draft length, in recordings and replays."""
AT_ONCE = 8
"""Answers that are recorded concurrently."""


@dataclass(frozen=True)
class Recorded:
    """A recorded question: prompt, answer, and by head the draft (tokens, confidences) behind each answer token."""

    prompt: tuple[int, ...]
    answer: list[int]
    drafts: dict[str, list[tuple[list[int], list[float]]]]


class Listener(Speculator):
    """A speculator that drafts nothing, and records what each model-based drafter would propose."""

    def __init__(self, lookups: Iterable[Drafter], model_drafters: Iterable[ModelDrafter], max_model_len: int) -> None:
        super().__init__(lookups, model_drafters, LONGEST, max_model_len, None)
        self.heard: dict[str, dict[str, dict[int, Draft]]] = {}
        """Drafts by sequence, drafter and number of tokens so far."""

    def draft(self, sequences: list[Sequence], prompt_rows: int = 0) -> StepDrafts:
        for name, drafter in self.model_drafters.items():
            drafts = drafter.propose([DraftRequest(sequence, LONGEST) for sequence in sequences])
            for sequence, draft in zip(sequences, drafts, strict=True):
                self.heard.setdefault(sequence.id, {}).setdefault(name, {})[len(sequence.tokens)] = draft
        return StepDrafts(Choice({}))


def record(args: argparse.Namespace) -> None:
    """Write {"model", "max_tokens", "suites": {suite: [{"prompt", "answer", "drafts": {drafter: [[tokens,
    confidences], ...]}}]}}; a drafter's list has an entry for each position of the answer but the first."""
    tokenizer = load_tokenizer(resolve(args.model))
    suites = read_suites(args.prompts, args.questions)
    written: dict[str, Any] = {}
    with LLM(
        model=args.model,
        prefix_caching=False,
        kv_cache_memory=1 << 30,
        max_num_seqs=AT_ONCE,
        num_threads=args.num_threads,
        num_draft_tokens=LONGEST,
    ) as llm:
        core = llm.core
        engine = core.engine
        speculator = engine.speculator
        listener = Listener(speculator.lookups.values(), speculator.model_drafters.values(), llm.info.max_model_len)
        core.engine = replace(engine, speculator=listener)
        for suite, prompts in suites.items():
            requests = llm.requests(
                [encode(tokenizer, prompt) for prompt in prompts],
                SamplingParams(temperature=0.0, max_tokens=args.max_tokens, seed=0),
                speculation="auto",
            )
            answers: dict[str, list[int]] = {request.id: [] for request in requests}
            with tqdm(total=len(requests), desc=suite, unit="req") as bar:
                for delta in llm.stream(requests):
                    answers[delta.request_id] += delta.token_ids
                    bar.update(delta.finish_reason is not None)
            written[suite] = [
                {
                    "prompt": request.prompt_ids,
                    "answer": answers[request.id],
                    "drafts": {
                        name: [
                            _written(heard.get(len(request.prompt_ids) + position, NO_DRAFT))
                            for position in range(1, len(answers[request.id]))
                        ]
                        for name, heard in listener.heard.get(request.id, {}).items()
                    },
                }
                for request in requests
            ]
            listener.heard.clear()
    Path(args.out).write_text(json.dumps({"model": args.model, "max_tokens": args.max_tokens, "suites": written}))


def _written(draft: Draft) -> tuple[tuple[int, ...], list[float]]:
    return draft.tokens, [round(confidence, 4) for confidence in draft.confidences]
