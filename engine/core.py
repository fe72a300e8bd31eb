"""EngineCore: one step of the engine, over all running requests. No processes, no HTTP, no text."""

from __future__ import annotations

import logging
import secrets
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import msgspec
import torch

from pilotfish.engine.build import Engine, build
from pilotfish.engine.config import EngineConfig
from pilotfish.engine.device import PassTimer
from pilotfish.engine.execution.batch import Span
from pilotfish.engine.execution.loader import Progress
from pilotfish.engine.memory.block_table import BlockTable
from pilotfish.engine.memory.usage import MemoryMeter
from pilotfish.engine.models.features import FeatureTap
from pilotfish.engine.params import MAX_SEED
from pilotfish.engine.process.messages import StepStats
from pilotfish.engine.request import Delta, EngineInfo, FinishReason, Request, RequestStats, check_request, drafters_of
from pilotfish.engine.sampling.logit_spans import LogitSpan
from pilotfish.engine.sampling.logprobs import prompt_logprobs
from pilotfish.engine.scheduler import PlannedSpan, Scheduler, StepPlan
from pilotfish.engine.sequence import Sequence
from pilotfish.engine.speculation.speculator import Drafted
from pilotfish.engine.speculation.tally import by_position
from pilotfish.engine.verification.coupled import Verdict
from pilotfish.errors import ParameterError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepResult:
    deltas: list[Delta]
    stats: StepStats


class EngineCore:
    """Loads the model; then `add` requests and call `step` while there is work.

    Raises ConfigError or ModelError where the settings or the model's files are wrong, and RankError, here or from a
    step, if a rank of a divided model ends. One thread at a time may use it.
    """

    def __init__(
        self,
        config: EngineConfig,
        progress: Callable[[str, float], None] | None = None,
        build: Callable[[EngineConfig, Progress], Engine] = build,
    ) -> None:
        self._engine: Engine = build(config.check(), progress or (lambda what, share: None))
        # However this core goes, no rank is left behind.
        self._finalizer = weakref.finalize(self, self._engine.close)
        self._memory = MemoryMeter(self._engine.info.device, others=self._engine.other_memory)
        self.info: EngineInfo = msgspec.structs.replace(self._engine.info, memory=self._memory.read_all())
        self._scheduler = Scheduler(self._engine.pool, config.max_num_seqs, config.max_batch_tokens)
        self._sequences: dict[str, Sequence] = {}
        self._ended: list[Delta] = []  # to be reported with the next step's deltas
        self._timer = PassTimer(torch.device(self.info.device))
        self._under_way: _Step | None = None
        self._finished: _Step | None = None
        self.asynchronous = self.info.device.startswith("cuda")
        """A pass goes on by itself once it is launched."""

    def close(self) -> None:
        """End the other ranks, if there are any. May be called again; there are no steps after it."""
        self._finalizer()

    def add(self, request: Request) -> None:
        """Queue a request. Raises ParameterError for one that this engine can never serve."""
        check_request(request, self.info)
        if request.id in self._sequences:
            raise ParameterError("request_id", f"a request with id {request.id!r} is running already")
        seed = request.params.seed if request.params.seed is not None else secrets.randbelow(MAX_SEED)
        sequence = Sequence(
            request=request,
            seed=seed,
            blocks=BlockTable(self._engine.pool),
            drafters=drafters_of(request, self.info),
        )
        self._sequences[request.id] = sequence
        self._scheduler.add(sequence)

    def abort(self, request_id: str) -> None:
        """End a request now, if it is there; its last delta comes with the next step's."""
        if (sequence := self._sequences.get(request_id)) is not None:
            self._ended.append(self._end(sequence, "abort"))

    def has_work(self) -> bool:
        return bool(self._sequences or self._ended)

    def step(self) -> StepResult:
        """Draft, plan, run, verify, commit."""
        self.launch()
        deltas = self.finish()
        return StepResult(deltas, self.settle())

    @torch.inference_mode()
    def launch(self) -> None:
        """A step's first half: draft, plan, and set the pass going. On a GPU it runs on by itself from here: what does
        not need its outcome may be done meanwhile, `settle` of the step before, `add` and `abort` too."""
        engine, clock = self._engine, _Phases()
        with clock.phase("draft"):
            drafts = engine.speculator.draft(self._scheduler.decoding(), self._scheduler.prompt_rows())
        with clock.phase("plan"):
            plan = self._scheduler.plan(drafts)
            self._note_admissions(plan)
        tap, logits = engine.speculator.features.tap(), None
        self._timer.begin()
        if plan.spans:
            logits = engine.runner.run([_span(planned) for planned in plan.spans], tap)
        self._timer.launched()
        self._under_way = _Step(plan, engine.speculator.drafted, tap, logits, clock)

    @torch.inference_mode()
    def finish(self) -> list[Delta]:
        """A step's second half: wait for the pass, verify, commit."""
        step, self._under_way = self._under_way, None
        assert step is not None  # launch() comes first
        verdicts = self._verify(step.plan, step.logits) if step.logits is not None else []
        if step.logits is not None:
            self._engine.check()
        forward = step.clock.seconds["forward"] = self._timer.seconds()
        step.clock.seconds["sample"] = max(0.0, self._timer.elapsed() - forward)
        with step.clock.phase("commit"):
            deltas, self._ended = self._ended, []
            step.committed = self._commit(step.plan, verdicts)
            deltas += [delta for _, _, delta in step.committed]
            if step.tap is not None and step.tap.features is not None:
                self._hand_on(step.plan, step.tap.features)
        self._finished = step
        return deltas

    def settle(self) -> StepStats:
        """What is left of the step that was finished last, and does not hurry: others may find its blocks, the
        controller learns what it took, and it is counted."""
        step, self._finished = self._finished, None
        assert step is not None  # finish() comes first
        for sequence in self._alive(step.plan):
            sequence.blocks.commit(sequence.tokens, sequence.computed)
        if step.plan.spans:
            tokens = sum(len(verdict.tokens) for _, verdict, _ in step.committed)
            self._engine.speculator.observe_step(step.drafted, step.plan.rows, step.clock.seconds, tokens)
        return self._stats(step)

    def _alive(self, plan: StepPlan) -> Iterator[Sequence]:
        """The plan's sequences that have not ended since."""
        return (p.sequence for p in plan.spans if self._sequences.get(p.sequence.id) is p.sequence)

    def _note_admissions(self, plan: StepPlan) -> None:
        now = time.monotonic()
        for sequence in plan.admitted:
            if not sequence.scheduled:
                sequence.scheduled = now
                sequence.cached_prompt_tokens = sequence.computed

    def _verify(self, plan: StepPlan, logits: torch.Tensor) -> list[Verdict]:
        """Verdicts for the plan's drawing spans, in their order. Rows of prompt logprobs are taken out first."""
        drawing = [planned for planned in plan.spans if planned.draws]
        if any(_wants_prompt_logprobs(planned) for planned in plan.spans):
            logits = logits[self._take_prompt_logprobs(plan, logits)]
        if not drawing:
            return []
        spans = [LogitSpan(p.sequence, p.draft.tokens, rows=len(p.draft.tokens) + 1) for p in drawing]
        return self._engine.verifier.verify(logits, spans, [planned.draft for planned in drawing])

    def _take_prompt_logprobs(self, plan: StepPlan, logits: torch.Tensor) -> list[int]:
        """Note the prompt logprobs of this step's rows; returns the rows that draw."""
        drawing_rows: list[int] = []
        row = 0
        for planned in plan.spans:
            rows = _logit_rows(planned)
            if _wants_prompt_logprobs(planned):
                sequence, known = planned.sequence, planned.sequence.prompt_logprobs
                if not known:
                    known.append(None)  # nothing predicts the first token
                # Row i of the span predicts the token at start + i + 1; a preempted sequence knows some already.
                first, stop = len(known), min(planned.stop + 1, sequence.prompt_len)
                if first < stop:
                    offset = row + first - planned.start - 1
                    wanted = sequence.params.prompt_logprobs or 0
                    known.extend(
                        prompt_logprobs(logits[offset : offset + stop - first], sequence.tokens[first:stop], wanted)
                    )
            if planned.draws:
                draws = len(planned.draft.tokens) + 1
                drawing_rows.extend(range(row + rows - draws, row + rows))
            row += rows
        return drawing_rows

    def _commit(self, plan: StepPlan, verdicts: list[Verdict]) -> list[_Committed]:
        """Of each span that drew: what it drew, and what came of it. Those who ended during the pass are left out."""
        committed = []
        drawn = iter(verdicts)
        for planned in plan.spans:
            verdict = next(drawn) if planned.draws else None
            if self._sequences.get(planned.sequence.id) is not planned.sequence:
                continue
            if verdict is not None:
                committed.append((planned, verdict, self._commit_tokens(planned, verdict)))
            else:
                planned.sequence.computed = planned.stop
        return committed

    def _hand_on(self, plan: StepPlan, features: torch.Tensor) -> None:
        """Give the features of the rows that stay to the drafters that read them."""
        row, kept = 0, []
        for planned in plan.spans:
            sequence = planned.sequence
            if self._sequences.get(sequence.id) is sequence:
                kept.append((sequence, planned.start, row, row + sequence.computed - planned.start))
            row += planned.stop - planned.start
        self._engine.speculator.features.hand_on(features, kept)

    def _commit_tokens(self, planned: PlannedSpan, verdict: Verdict) -> Delta:
        """Append what was drawn, up to a stop; the keys and values of rejected tokens are overwritten later."""
        sequence = planned.sequence
        self._engine.speculator.observe_tokens(sequence, verdict.tokens)
        first = sequence.output_len == 0
        tokens, reason, stop_token = self._until_stop(sequence, verdict.tokens)
        sequence.tokens.extend(tokens)
        sequence.computed = len(sequence.tokens) - 1
        if reason is not None:
            sequence.blocks.commit(sequence.tokens, sequence.computed)  # others' is `settle`'s
        sequence.steps += 1
        drafter, drafted = planned.draft.drafter, len(planned.draft.tokens)
        accepted = min(verdict.accepted, len(tokens))
        if drafted:
            sequence.drafted[drafter] = sequence.drafted.get(drafter, 0) + drafted
            sequence.accepted += accepted
        if first:
            sequence.first_token = time.monotonic()
        delta = Delta(
            request_id=sequence.id,
            token_ids=tuple(tokens),
            logprobs=None if verdict.logprobs is None else verdict.logprobs[: len(tokens)],
            prompt_logprobs=tuple(sequence.prompt_logprobs) if first and sequence.prompt_logprobs else None,
            scheduled=sequence.scheduled if first else None,
            cached_prompt_tokens=sequence.cached_prompt_tokens if first else 0,
            drafted=drafted,
            accepted=accepted,
            drafter=drafter,
        )
        return delta if reason is None else self._end(sequence, reason, delta, stop_token)

    def _until_stop(self, sequence: Sequence, tokens: list[int]) -> tuple[list[int], FinishReason | None, int | None]:
        """The tokens up to the first that ends the sequence, why it ends, and the token that it ends on."""
        params = sequence.params
        stops = set(params.stop_token_ids) if params.ignore_eos else {*params.stop_token_ids, *self.info.eos_token_ids}
        room = min(params.max_tokens - sequence.output_len, self.info.max_model_len - len(sequence.tokens))
        for i, token in enumerate(tokens[:room]):
            if token in stops and sequence.output_len + i >= params.min_tokens:
                return tokens[: i + 1], "stop", token
        return (tokens[:room], "length", None) if len(tokens) >= room else (tokens, None, None)

    def _end(
        self, sequence: Sequence, reason: FinishReason, delta: Delta | None = None, stop_token: int | None = None
    ) -> Delta:
        """Give everything back and write the last delta."""
        del self._sequences[sequence.id]
        self._scheduler.remove(sequence)
        self._engine.speculator.release(sequence)
        now = time.monotonic()
        drafted = sequence.drafted
        stats = RequestStats(
            arrival=sequence.request.arrival or sequence.scheduled,
            scheduled=sequence.scheduled or now,
            first_token=sequence.first_token or now,
            finished=now,
            prompt_tokens=sequence.prompt_len,
            cached_prompt_tokens=sequence.cached_prompt_tokens,
            generated_tokens=sequence.output_len,
            drafter=max(drafted, key=lambda name: drafted[name], default="none"),
            drafted_tokens=sum(drafted.values()),
            accepted_tokens=sequence.accepted,
            steps=sequence.steps,
            preemptions=sequence.preemptions,
        )
        delta = delta or Delta(request_id=sequence.id)
        return msgspec.structs.replace(delta, finish_reason=reason, stop_token=stop_token, stats=stats)

    def _stats(self, step: _Step) -> StepStats:
        plan, seconds = step.plan, step.clock.seconds
        drafted: dict[str, int] = {}
        accepted: dict[str, int] = {}
        chosen: dict[str, int] = {}
        step_tokens: dict[str, list[int]] = {}
        for planned, verdict, delta in step.committed:
            name = planned.draft.drafter or "none"
            if _decodes(planned):
                chosen[name] = chosen.get(name, 0) + 1
                step_tokens.setdefault(name, []).append(len(delta.token_ids))
            if planned.draft.tokens:
                drafted[name] = drafted.get(name, 0) + len(planned.draft.tokens)
                accepted[name] = accepted.get(name, 0) + verdict.accepted
        pool, choice = self._engine.pool, step.drafted.choice
        return StepStats(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            sequences=len(plan.spans),
            rows=plan.rows,
            prompt_tokens=sum(
                max(0, min(p.stop, p.sequence.prompt_len) - p.start)
                for p in plan.spans
                if p.start < p.sequence.prompt_len
            ),
            generated_tokens=sum(len(delta.token_ids) for _, _, delta in step.committed),
            drafted=drafted,
            accepted=accepted,
            chosen=chosen,
            predicted_goodput=choice.goodput if chosen else 0.0,
            predicted_plain_goodput=choice.plain if chosen else 0.0,
            drafted_at=by_position((p.draft.drafter, len(p.draft.tokens)) for p, _, _ in step.committed),
            accepted_at=by_position((p.draft.drafter, verdict.accepted) for p, verdict, _ in step.committed),
            step_tokens={name: tuple(counts) for name, counts in step_tokens.items()},
            preemptions=plan.preemptions,
            prefix_queried_tokens=sum(len(sequence.request.prompt_ids) for sequence in plan.admitted),
            prefix_hit_tokens=sum(sequence.cached_prompt_tokens for sequence in plan.admitted),
            blocks_total=pool.num_blocks,
            blocks_used=pool.used,
            blocks_cached=pool.cached,
            seconds=seconds,
            memory=self._memory.read_if_due(),
        )


_Committed = tuple[PlannedSpan, Verdict, Delta]


@dataclass(slots=True)
class _Step:
    """A step between its launch and its account."""

    plan: StepPlan
    drafted: Drafted
    tap: FeatureTap | None
    logits: torch.Tensor | None
    clock: _Phases
    committed: list[_Committed] = field(default_factory=list)


def _wants_prompt_logprobs(planned: PlannedSpan) -> bool:
    sequence = planned.sequence
    return sequence.params.prompt_logprobs is not None and len(sequence.prompt_logprobs) < sequence.prompt_len


def _decodes(planned: PlannedSpan) -> bool:
    """It was decoding before this step: the end of a prompt draws a token, too, and so does what a preempted sequence
    computes once more."""
    rows = planned.stop - planned.start
    return planned.start >= planned.sequence.prompt_len and rows == len(planned.draft.tokens) + 1


def _logit_rows(planned: PlannedSpan) -> int:
    if _wants_prompt_logprobs(planned):
        return planned.stop - planned.start
    return len(planned.draft.tokens) + 1 if planned.draws else 0


def _span(planned: PlannedSpan) -> Span:
    sequence = planned.sequence
    token_ids = [*sequence.tokens[planned.start : planned.stop], *planned.draft.tokens]
    return Span(token_ids, planned.start, sequence.blocks.blocks, _logit_rows(planned))


class _Phases:
    """Seconds of each phase of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
