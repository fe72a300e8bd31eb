"""The speculator asks drafters for drafts of a sensible length, and watches what comes of them. Who drafts how much is
the controller's choice; without one, sequences take the first proposal there is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pilotfish.engine.sequence import Sequence
from pilotfish.engine.speculation.control.candidates import Choice, Step, Turn
from pilotfish.engine.speculation.control.controller import Controller
from pilotfish.engine.speculation.drafters.drafter import Draft, Drafter, DraftRequest, ModelDrafter
from pilotfish.engine.speculation.drafters.feature_router import FeatureRouter


@dataclass(frozen=True, slots=True)
class Drafted:
    """What was done for a step before it was planned."""

    choice: Choice
    """What was chosen, and what it promised."""
    context: int = 0
    """Tokens in the KV cache of those that decode."""
    prompts: bool = False
    """Rows of prompts are in it."""
    seconds: float = 0.0
    """That drafts took which cost time."""


class Speculator:
    """Drafts of at most `num_draft_tokens`, less where answer or context end sooner, by whom and as long as the
    controller finds worth it. If there is no controller, a sequence takes the first proposal of its drafters, all of
    it, and those that are free come first. `clock`: seconds since some moment."""

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
        """What drafters read of the target."""
        self._num_draft_tokens = num_draft_tokens
        self._max_model_len = max_model_len
        self._controller = controller
        self._clock = clock
        self._seconds = 0.0  # of the last step's costly drafts
        self._context = 0  # of the last step
        self.drafted = Drafted(Choice({}))
        """What was done for the last step."""

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.lookups, *self.model_drafters)

    def draft(self, sequences: list[Sequence], other_rows: int = 0) -> dict[Sequence, Draft]:
        """Drafts for those of `sequences`, all of which decode in the next step, that have one. The step has
        `other_rows` besides, for prompts."""
        self._seconds = 0.0
        self._context = sum(len(sequence.tokens) for sequence in sequences)
        turns = []
        for sequence in sequences:
            # Verification commits one token more than are drafted.
            left = min(sequence.params.max_tokens - sequence.output_len, self._max_model_len - len(sequence.tokens)) - 1
            limit = min(self._num_draft_tokens, left)
            if sequence.drafters and limit > 0:
                turns.append(Turn(sequence, limit))
        if self._controller is None:
            choice = Choice(self._first_proposals(turns))
        else:
            step = Step(len(sequences) + other_rows, len(sequences), turns, self._context)
            choice = self._chosen(self._controller, step)
        self.drafted = Drafted(choice, self._context, other_rows > 0, self._seconds)
        return choice.drafts

    def observe_step(self, drafted: Drafted, rows: int, seconds: dict[str, float], tokens: int) -> None:
        """The step that this was done for computed so many rows and committed so many tokens; `seconds` by its
        phases."""
        if self._controller is not None:
            self._controller.observe_step(rows, seconds["forward"], drafted.context, drafted.prompts)
            beside = sum(seconds.values()) - seconds["forward"] - drafted.seconds
            self._controller.observe_overhead(beside, seconds["sample"], tokens)

    def observe_tokens(self, sequence: Sequence, tokens: list[int]) -> None:
        """The target's tokens at the places that were last drafted for."""
        if self._controller is not None:
            self._controller.observe_tokens(sequence, tokens)

    def release(self, sequence: Sequence) -> None:
        for drafter in (*self.lookups.values(), *self.model_drafters.values()):
            drafter.release(sequence)
        if self._controller is not None:
            self._controller.release(sequence)

    def _chosen(self, controller: Controller, step: Step) -> Choice:
        if controller.sleeps(step):
            return Choice({})
        begun = self._clock()
        for name, drafter in self.lookups.items():
            self._propose(drafter, [turn for turn in step.turns if name in turn.sequence.drafters])
        for turn in step.turns:
            for name in turn.sequence.drafters:
                if name in self.model_drafters:
                    turn.backlog[name] = self.model_drafters[name].backlog(turn.sequence)
        by_sequence = {turn.sequence: turn for turn in step.turns}
        for name, requests in controller.ask(step).items():
            costly = self.model_drafters[name]
            start = self._clock()
            drafts = costly.propose(requests)
            took = self._clock() - start
            self._seconds += took
            context = sum(len(request.sequence.tokens) for request in requests)
            controller.observe_drafting(name, costly.passes, took, context)
            for request, draft in zip(requests, drafts, strict=True):
                if draft.tokens:
                    by_sequence[request.sequence].drafts.append(draft)
        choice = controller.choose(step)
        controller.observe_thinking(self._clock() - begun - self._seconds)
        return choice

    def _first_proposals(self, turns: list[Turn]) -> dict[Sequence, Draft]:
        for turn in turns:
            for name in turn.sequence.drafters:
                if name in self.lookups and not turn.drafts:
                    self._propose(self.lookups[name], [turn])
        for name, drafter in self.model_drafters.items():
            self._propose(drafter, [turn for turn in turns if name in turn.sequence.drafters and not turn.drafts])
        return {turn.sequence: turn.drafts[0] for turn in turns if turn.drafts}

    def _propose(self, drafter: Drafter, turns: list[Turn]) -> None:
        if turns:
            drafts = drafter.propose([DraftRequest(turn.sequence, turn.limit) for turn in turns])
            for turn, draft in zip(turns, drafts, strict=True):
                if draft.tokens:
                    turn.drafts.append(draft)
