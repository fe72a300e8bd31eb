"""The speculator collects drafts for each step and reports their outcome. The controller chooses drafters and draft
lengths; without a controller, each sequence takes the first proposal there is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from pilotfish.engine.draft import Draft, shortened
from pilotfish.engine.sequence import Sequence
from pilotfish.engine.speculation.control.candidates import Candidate, Choice, UpcomingStep
from pilotfish.engine.speculation.control.controller import Controller
from pilotfish.engine.speculation.drafters.drafter import (
    Drafter,
    DraftRequest,
    LongDrafter,
    ModelDrafter,
    PastUse,
    RememberingDrafter,
)
from pilotfish.engine.speculation.drafters.feature_router import FeatureRouter


@dataclass(frozen=True, slots=True)
class StepDrafts:
    """The drafts for a step and how they were made. The step passes it back with its outcome."""

    choice: Choice
    context: int = 0
    """Tokens in the KV cache of the sequences that decode."""
    prompts: bool = False
    """Whether the step has rows of prompts."""
    seconds: float = 0.0
    """Seconds that the model-based drafters took."""

    @property
    def drafts(self) -> Mapping[Sequence, Draft]:
        """The drafts to verify, none of them empty."""
        return self.choice.drafts


class Speculator:
    """Drafts at most `num_draft_tokens` tokens for a sequence (a `LongDrafter` more), fewer where its answer or
    context ends sooner, with the drafters and draft lengths that the controller chooses. Without a controller, a
    sequence takes the whole of its drafters' first proposal, lookup drafters first. `clock` returns seconds.
    """

    def __init__(
        self,
        lookups: Iterable[Drafter],
        model_drafters: Iterable[ModelDrafter],
        num_draft_tokens: int,
        max_model_len: int,
        controller: Controller | None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.lookups = {drafter.name: drafter for drafter in lookups}
        self.model_drafters = {drafter.name: drafter for drafter in model_drafters}
        self.features = FeatureRouter(self.model_drafters.values())
        """Passes the target's hidden states to the drafters that read them."""
        self._num_draft_tokens = num_draft_tokens
        self._lengths = lengths_of(self.lookups.values())
        self._max_model_len = max_model_len
        self._controller = controller
        self._clock = clock

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.lookups, *self.model_drafters)

    def draft(self, sequences: list[Sequence], prompt_rows: int = 0) -> StepDrafts:
        """Draft for `sequences`, all of which decode in the next step; `prompt_rows` are its rows of prompts."""
        context = sum(len(sequence.tokens) for sequence in sequences)
        candidates = []
        for sequence in sequences:
            # Verification commits one token more than are drafted.
            left = min(sequence.params.max_tokens - sequence.output_len, self._max_model_len - len(sequence.tokens)) - 1
            limit = min(self._num_draft_tokens, left)
            if sequence.drafters and limit > 0:
                candidates.append(Candidate(sequence, limit, left=left))
        if self._controller is None:
            choice, seconds = Choice(self._first_proposals(candidates)), 0.0
        else:
            step = UpcomingStep(len(sequences) + prompt_rows, len(sequences), candidates, context)
            choice, seconds = self._chosen(self._controller, step)
        return StepDrafts(choice, context, prompt_rows > 0, seconds)

    def observe_tokens(self, drafts: StepDrafts, sequence: Sequence, tokens: list[int]) -> None:
        """Report the target's tokens at the positions that the step's drafts were for."""
        if self._controller is not None:
            self._controller.observe_tokens(drafts.choice, sequence, tokens)

    def observe_step(self, drafts: StepDrafts, rows: int, seconds: Mapping[str, float], tokens: int) -> None:
        """Report a step's rows, its `seconds` by phase, and its committed tokens."""
        if self._controller is not None:
            self._controller.observe_step(rows, seconds["forward"], drafts.context, drafts.prompts)
            beside = sum(seconds.values()) - seconds["forward"] - drafts.seconds
            self._controller.observe_overhead(beside, seconds["sample"], tokens)

    def take_past_use(self) -> PastUse:
        """Return what memories of past texts hold, and their uses since the last call."""
        uses = [each.take_use() for each in self.lookups.values() if isinstance(each, RememberingDrafter)]
        return PastUse(*map(sum, zip(*uses, strict=True))) if uses else PastUse()

    def release(self, sequence: Sequence) -> None:
        for drafter in (*self.lookups.values(), *self.model_drafters.values()):
            drafter.release(sequence)
        if self._controller is not None:
            self._controller.release(sequence)

    def _chosen(self, controller: Controller, step: UpcomingStep) -> tuple[Choice, float]:
        """Return the controller's choice, and the seconds that model-based drafters took for it."""
        if controller.should_skip(step):
            return Choice({}), 0.0
        begun, drafting = self._clock(), 0.0
        for name, drafter in self.lookups.items():
            self._propose(drafter, [each for each in step.candidates if name in each.sequence.drafters])
        for candidate in step.candidates:
            for name in candidate.sequence.drafters:
                if name in self.model_drafters:
                    candidate.backlog[name] = self.model_drafters[name].backlog(candidate.sequence)
        by_sequence = {candidate.sequence: candidate for candidate in step.candidates}
        for name, requests in controller.ask(step).items():
            asked = self.model_drafters[name]
            start = self._clock()
            drafts = asked.propose(requests)
            took = self._clock() - start
            drafting += took
            context = sum(len(request.sequence.tokens) for request in requests)
            controller.observe_drafting(name, asked.passes, took, context)
            for request, draft in zip(requests, drafts, strict=True):
                _add(by_sequence[request.sequence], draft)
        choice = controller.choose(step)
        controller.observe_choosing(choice, self._clock() - begun - drafting)
        return choice, drafting

    def _first_proposals(self, candidates: list[Candidate]) -> dict[Sequence, Draft]:
        for candidate in candidates:
            for name in candidate.sequence.drafters:
                if name in self.lookups and not candidate.drafts:
                    self._propose(self.lookups[name], [candidate])
        for name, drafter in self.model_drafters.items():
            self._propose(drafter, [each for each in candidates if name in each.sequence.drafters and not each.drafts])
        return {candidate.sequence: candidate.drafts[0] for candidate in candidates if candidate.drafts}

    def _propose(self, drafter: Drafter, candidates: list[Candidate]) -> None:
        if candidates:
            longest = self._lengths.get(drafter.name, 0)
            limits = [min(longest, each.left) if longest else each.limit for each in candidates]
            requests = [DraftRequest(each.sequence, limit) for each, limit in zip(candidates, limits, strict=True)]
            for candidate, draft in zip(candidates, drafter.propose(requests), strict=True):
                _add(candidate, draft)


def lengths_of(lookups: Iterable[Drafter]) -> dict[str, int]:
    """Return the maximum tokens of the drafts of those that have one of their own, by name."""
    return {drafter.name: drafter.longest for drafter in lookups if isinstance(drafter, LongDrafter)}


def _add(candidate: Candidate, draft: Draft) -> None:
    """Add a proposal, up to the first token that the answer's grammar refuses: it would only cost rows."""
    grammar = candidate.sequence.grammar
    if grammar is not None and draft.tokens:
        draft = shortened(draft, grammar.count_allowed(draft.tokens))
    if draft.tokens:
        candidate.drafts.append(draft)
