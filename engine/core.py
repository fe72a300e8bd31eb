"""EngineCore: one step of the engine, over all running requests. No processes, no HTTP, no text.

A step is a value: `launch` starts its pass, `finish` waits for the pass and commits its tokens, `settle` does the
bookkeeping that can wait. So the next step may be launched before the last one is settled.
"""

from __future__ import annotations

import logging
import secrets
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import msgspec
import torch

from pilotfish.checkpoints.catalog import Progress
from pilotfish.engine.answer_grammar import AnswerGrammar, plan_masks
from pilotfish.engine.build import Engine, build
from pilotfish.engine.config import EngineConfig, with_step_limits
from pilotfish.engine.device import PassTimer, give_back_memory, gpu_memory
from pilotfish.engine.device.attempt import Attempt
from pilotfish.engine.device.transfer import ids_to_device
from pilotfish.engine.execution.batch import Draw, Span
from pilotfish.engine.execution.runner import DrawnTokens
from pilotfish.engine.memory.block_table import BlockTable
from pilotfish.engine.memory.cache_events import CacheOrigin
from pilotfish.engine.memory.usage import MemoryMeter
from pilotfish.engine.models.features import FeatureTap
from pilotfish.engine.params import MAX_SEED
from pilotfish.engine.request import GRAMMAR_LIMIT, Delta, EngineInfo, FinishReason, Request, check_request, drafters_of
from pilotfish.engine.sampling.device_sampler import why_not_keyed
from pilotfish.engine.sampling.logit_spans import LogitSpan
from pilotfish.engine.sampling.logprobs import token_logprobs
from pilotfish.engine.scheduler import PlannedSpan, Scheduler, StepPlan
from pilotfish.engine.sequence import Sequence
from pilotfish.engine.shares import Shares
from pilotfish.engine.speculation.control.candidates import Choice
from pilotfish.engine.speculation.drafters.feature_router import KeptRows
from pilotfish.engine.speculation.speculator import StepDrafts
from pilotfish.engine.stats import PASS, Committed, StepStats, Ways, request_stats, step_stats
from pilotfish.engine.verification.verifier import Verdict, drawn_verdicts
from pilotfish.errors import ModelError, ParameterError
from pilotfish.text.grammar.matcher import CompiledGrammar

logger = logging.getLogger(__name__)

OUT_OF_MEMORY = "The GPU's memory did not suffice for a step of this request, which was given up. Try it again."
"""What a client is told; the log has torch's reason, and what to lower."""

PATIENCE = 0.002
"""Seconds that a step waits for the compiling of a grammar when there is nothing else to do."""


@dataclass(frozen=True, slots=True)
class StepResult:
    deltas: list[Delta]
    stats: StepStats


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A step whose pass was launched and may still be running."""

    plan: StepPlan
    drafts: StepDrafts
    tap: FeatureTap | None
    logits: torch.Tensor | None
    """(logit rows of the plan's spans, vocab); None without spans."""
    drawn: DrawnTokens | None
    """What the pass draws itself; None if it does not."""
    how: Ways
    masks: Future[None] | None
    """The computation of grammars' masks, if the step has any."""
    timer: PassTimer
    seconds: dict[str, float]
    """Seconds by phase, of the phases so far."""


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """A step whose tokens are committed."""

    launched: LaunchedStep
    deltas: list[Delta]
    """The step's deltas, and the last deltas of requests that were aborted since the step before."""
    committed: list[Committed]


class EngineCore:
    """Loads the model; then `add` requests and call `step` while there is work.

    Raises ConfigError or ModelError where the settings or the model's files are wrong, and RankError, here or from a
    step, if a rank of a sharded model ends. One thread at a time may use it.
    """

    def __init__(
        self,
        config: EngineConfig,
        progress: Callable[[str, float], None] | None = None,
        build: Callable[[EngineConfig, Progress], Engine] = build,
    ) -> None:
        self.engine: Engine = build(config.check(), progress or (lambda what, share: None))
        """The parts that the core drives."""
        # Ends the other ranks even if `close` is never called.
        self._finalizer = weakref.finalize(self, self.engine.close)
        self._memory = MemoryMeter(self.engine.info.device, others=self.engine.other_memory)
        self.info: EngineInfo = msgspec.structs.replace(self.engine.info, memory=self._memory.read_all())
        self._device = torch.device(self.info.device)
        limits = with_step_limits(config, gpu_memory(self._device))
        self._scheduler = Scheduler(
            self.engine.pool,
            limits.max_num_seqs,
            limits.max_batch_tokens,
            self.engine.pace,
            Shares(config.scheduling_policy),
        )
        self._adapters = dict(self.engine.loaded)
        """Numbers of the adapters that requests may name."""
        self._leaving: set[int] = set()
        """Numbers of those that were unloaded while sequences had them."""
        self._sequences: dict[str, Sequence] = {}
        self._deadlines: dict[str, float] = {}
        """When requests end at the latest, of those that say so."""
        self._ended: list[Delta] = []  # to be reported with the next step's deltas
        self._compiling: dict[Sequence, Future[CompiledGrammar]] = {}
        """Sequences that wait for their grammars, in the order in which they came."""
        self.engine.publish_cache()
        self._masking = ThreadPoolExecutor(1, thread_name_prefix="masks")
        self._new_timer = partial(PassTimer, self._device)
        self.asynchronous = self.info.device.startswith("cuda")
        """Whether a pass runs on by itself once it is launched."""

    def close(self) -> None:
        """End the other ranks, if there are any. May be called again; there are no steps after it."""
        self._masking.shutdown(wait=False)
        self._finalizer()

    def add(self, request: Request) -> None:
        """Queue a request. Raises ParameterError for one that this engine can never serve."""
        check_request(request, self.info)
        if request.id in self._sequences:
            raise ParameterError("request_id", f"a request with id {request.id!r} is running already")
        params = request.params
        seed = params.seed if params.seed is not None else secrets.randbelow(MAX_SEED)
        goes_on = params.ignore_eos and params.grammar is None
        adapter = self._adapters[request.adapter] if request.adapter else 0
        # A number is never given again, so what an adapter of the same name has cached before is not found.
        salt = b"%s\0adapter %d" % (request.salt, adapter) if adapter else request.salt
        sequence = Sequence(
            request=request,
            seed=seed,
            blocks=BlockTable(self.engine.pool, salt, CacheOrigin(request.adapter, request.salt, request.session)),
            adapter=adapter,
            drafters=drafters_of(request, self.info),
            stops=frozenset((*params.stop_token_ids, *(() if goes_on else self.info.eos_token_ids))),
        )
        self._sequences[request.id] = sequence
        if request.deadline:
            self._deadlines[request.id] = request.deadline
        if params.constrained and not self._restrict(sequence):
            return
        self._scheduler.add(sequence)

    def _restrict(self, sequence: Sequence) -> bool:
        """Give a sequence its grammar; return whether it has it, or must wait until it is compiled."""
        params, matcher = sequence.params, None
        if params.grammar is not None:
            started = self.engine.grammars.start(params.grammar)
            if isinstance(started, Future):
                self._compiling[sequence] = started
                return False
            matcher = started
        sequence.grammar = AnswerGrammar(matcher, params.thinking, self.info.vocab_size)
        return True

    def _take_compiled(self) -> None:
        """Queue the sequences whose grammars are compiled. Waits a moment if there is nothing else to do."""
        if len(self._compiling) == len(self._sequences) and not self._ended:
            wait(self._compiling.values(), PATIENCE, FIRST_COMPLETED)
        for sequence, compiled in list(self._compiling.items()):
            grammar = sequence.params.grammar
            if grammar is None or not compiled.done():
                continue
            try:
                matcher = self.engine.grammars.finish(grammar, compiled)
            except (ParameterError, ModelError) as error:
                self._ended.append(self._end(sequence, "error", problem=str(error)))
                continue
            del self._compiling[sequence]
            sequence.grammar = AnswerGrammar(matcher, sequence.params.thinking, self.info.vocab_size)
            self._scheduler.add(sequence)

    def abort(self, request_id: str) -> None:
        """End a request now, if it has not ended; its last delta comes with the next step's."""
        if (sequence := self._sequences.get(request_id)) is not None:
            self._ended.append(self._end(sequence, "abort"))

    def _end_overdue(self) -> None:
        """End the requests whose deadlines have passed."""
        now = time.monotonic()
        for request_id in [request_id for request_id, deadline in self._deadlines.items() if deadline <= now]:
            self._ended.append(self._end(self._sequences[request_id], "timeout"))

    def change_adapter(self, name: str, folder: str | None) -> None:
        """Load a low-rank adapter from a folder, or unload it (None): sequences that have it go on to their ends.
        Raises ParameterError for what this engine does not allow, ModelError for a folder that is no adapter of its
        model."""
        adapters = self.engine.adapters
        if adapters is None:
            raise ParameterError("lora_name", "adapters cannot be changed: set lora_updates")
        if folder is None:
            if name not in self._adapters:
                raise ParameterError("lora_name", f"no adapter {name!r} is loaded")
            self._leaving.add(self._adapters.pop(name))
        elif name in self._adapters:
            raise ParameterError("lora_name", f"an adapter {name!r} is loaded already: unload it first")
        elif self.engine.ranks is not None:
            raise ParameterError("lora_name", "the model is sharded over ranks: name its adapters by lora at the start")
        else:
            self._adapters[name] = adapters.load(Path(folder))
        self.info = msgspec.structs.replace(self.info, adapters=tuple(self._adapters))
        self._drop_adapters()

    def _drop_adapters(self) -> None:
        """Free the adapters that were unloaded and that no sequence has any more."""
        for number in self._leaving - {sequence.adapter for sequence in self._sequences.values()}:
            assert self.engine.adapters is not None
            self.engine.adapters.drop(number)
            self._leaving.remove(number)

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes; sequences that have some of them keep them."""
        self.engine.pool.clear()
        self.engine.publish_cache()

    def has_work(self) -> bool:
        return bool(self._sequences or self._ended)

    def step(self) -> StepResult:
        """Draft, plan, run, verify, commit."""
        finished = self.finish(self.launch())
        return StepResult(finished.deltas, self.settle(finished))

    @torch.inference_mode()
    def launch(self) -> LaunchedStep:
        """Draft, plan, and start the pass. On a GPU it runs on by itself from here, and what does not need its outcome
        may be done meanwhile: `settle` of the step before, `add` and `abort`.

        If the device's memory does not suffice, here or in `finish`, the step's requests end with an error, and the
        engine goes on. (Of a sharded model the other ranks wait in the middle of the pass: then the engine ends.)"""
        engine = self.engine
        seconds: dict[str, float] = {}
        if self._deadlines:
            self._end_overdue()
        if self._compiling:
            self._take_compiled()
        self._scheduler.arrange()
        decoding, drafts = self._scheduler.decoding(), NO_DRAFTS
        with _phase(seconds, "draft"), Attempt() as drafting:
            drafts = engine.speculator.draft(decoding, self._scheduler.prompt_rows())
        if drafting.problem is not None:
            self._give_up(decoding, drafting.problem)
        with _phase(seconds, "plan"):
            plan = self._scheduler.plan(drafts.drafts)
            self._note_admissions(plan)
        tap, timer, logits = engine.speculator.features.tap(), self._new_timer(), None
        masks = self._start_masks(plan)
        where, drawn = self._where_drawn(plan), None
        if PASS in where.values():
            drawn = DrawnTokens()
        timer.begin()
        with Attempt() as computing:
            if drawn is not None:
                spans = [_span(planned, where.get(i) == PASS) for i, planned in enumerate(plan.spans)]
                logits = engine.runner.run(spans, tap, drawn=drawn)
            elif plan.spans:
                logits = engine.runner.run([_span(planned) for planned in plan.spans], tap)
        timer.launched()
        how = Ways(engine.runner.how if plan.spans else "", where)
        step = LaunchedStep(plan, drafts, tap, logits, drawn, how, masks, timer, seconds)
        return step if computing.problem is None else self._without_pass(step, computing.problem)

    def _without_pass(self, step: LaunchedStep, problem: str) -> LaunchedStep:
        """Give up a step's requests; return what is left of it."""
        if step.masks is not None:
            step.masks.result()  # it reads what the requests hold
        # And with them the memory that they take.
        step = replace(step, tap=None, logits=None, drawn=None, masks=None, how=Ways("", {}))
        self._give_up([planned.sequence for planned in step.plan.spans], problem)
        plan = StepPlan(preemptions=step.plan.preemptions, pauses=step.plan.pauses)
        return replace(step, plan=plan, drafts=NO_DRAFTS)

    def _give_up(self, sequences: Iterable[Sequence], problem: str) -> None:
        """End those of `sequences` that are running: the device's memory did not suffice for their step."""
        if self.engine.ranks is not None:
            self.engine.check()
        give_back_memory(self._device)
        ending = [sequence for sequence in sequences if self._sequences.get(sequence.id) is sequence]
        logger.error(
            "a step ran out of the device's memory: its %d requests end with an error (if this happens again, lower "
            "kv_cache_share, max_batch_tokens or max_num_seqs): %s",
            len(ending),
            problem,
        )
        self._ended += [self._end(sequence, "error", problem=OUT_OF_MEMORY) for sequence in ending]

    def _start_masks(self, plan: StepPlan) -> Future[None] | None:
        """Compute what may be drawn at each position under a grammar, while the pass runs."""
        found = [(planned.sequence.grammar, planned.draft.tokens) for planned in plan.spans if planned.draws]
        asked = [(grammar, draft) for grammar, draft in found if grammar is not None and grammar.matcher is not None]
        return self._masking.submit(plan_masks, asked, self.engine.grammars.executor) if asked else None

    @torch.inference_mode()
    def finish(self, step: LaunchedStep) -> FinishedStep:
        """Wait for the pass, verify, commit."""
        verdicts: list[Verdict] = []
        if step.logits is not None:
            if step.masks is not None:
                step.masks.result()
            with Attempt() as verifying:
                verdicts = self._verify(step, step.logits)
            if verifying.problem is not None:
                step = self._without_pass(step, verifying.problem)
            self.engine.check()
        forward = step.seconds["forward"] = step.timer.seconds()
        step.seconds["sample"] = max(0.0, step.timer.elapsed() - forward)
        with _phase(step.seconds, "commit"):
            deltas, self._ended = self._ended, []
            committed = self._commit(step, verdicts)
            deltas += [each.delta for each in committed]
            with Attempt() as publishing:
                if step.tap is not None and step.tap.features is not None:
                    self._publish_features(step.plan, step.tap.features)
        if publishing.problem is not None:
            self._give_up([planned.sequence for planned in step.plan.spans], publishing.problem)
        return FinishedStep(step, deltas, committed)

    def settle(self, step: FinishedStep) -> StepStats:
        """Do a step's bookkeeping: enter its blocks into the prefix cache, report its times to the controller, and
        return its stats."""
        plan, drafts, seconds = step.launched.plan, step.launched.drafts, step.launched.seconds
        if self._leaving:
            self._drop_adapters()
        for planned in plan.spans:
            if self._lives(planned):
                planned.sequence.blocks.commit(planned.sequence.tokens, planned.sequence.computed)
        self.engine.publish_cache()
        if plan.spans:
            tokens = sum([len(verdict.tokens) for _, verdict, _ in step.committed])
            self.engine.speculator.observe_step(drafts, plan.rows, seconds, tokens)
            pairs = plan.pairs if plan.prompts else drafts.context
            self.engine.pace.observe(plan.rows, pairs, plan.prompts, seconds["forward"])
        return step_stats(
            plan,
            step.committed,
            drafts.choice,
            self._scheduler,
            self.engine.pool,
            seconds,
            self._memory.read_if_due(),
            step.launched.how,
            self.engine.speculator.take_past_use(),
        )

    def _lives(self, planned: PlannedSpan) -> bool:
        """Return whether the span's sequence is still running: it may have ended since it was planned."""
        return self._sequences.get(planned.sequence.id) is planned.sequence

    def _note_admissions(self, plan: StepPlan) -> None:
        now = time.monotonic()
        for sequence in plan.admitted:
            if not sequence.scheduled:
                sequence.scheduled = now
                sequence.cached_prompt_tokens = sequence.computed

    def _where_drawn(self, plan: StepPlan) -> dict[int, str]:
        """Return where the tokens of each drawing span are drawn, by its index in the plan: PASS, in the pass itself,
        or after it, and then why."""
        drawing = [(i, planned.sequence) for i, planned in enumerate(plan.spans) if planned.draws]
        if not (self.engine.runner.draws and self.engine.verifier.keyed):
            return dict.fromkeys([i for i, _ in drawing], "host")
        if any(planned.sequence.wants_prompt_logprobs for planned in plan.spans):
            return dict.fromkeys([i for i, _ in drawing], "logprobs")
        return {i: why_not_keyed(sequence.params, self.info.vocab_size) or PASS for i, sequence in drawing}

    def _verify(self, step: LaunchedStep, logits: torch.Tensor) -> list[Verdict]:
        """Return verdicts for the plan's drawing spans, in order. Rows of prompt logprobs are taken out first."""
        plan = step.plan
        if step.drawn is not None and step.drawn.tokens is not None:
            return self._verify_drawn(step, logits, step.drawn.tokens)
        drawing = [planned for planned in plan.spans if planned.draws]
        if any(planned.sequence.wants_prompt_logprobs for planned in plan.spans):
            logits = logits[self._take_prompt_logprobs(plan, logits)]
        if not drawing:
            return []
        spans = [LogitSpan(p.sequence, p.draft.tokens, rows=len(p.draft.tokens) + 1) for p in drawing]
        return self.engine.verifier.verify(logits, spans, [planned.draft for planned in drawing])

    def _verify_drawn(self, step: LaunchedStep, logits: torch.Tensor, drawn: torch.Tensor) -> list[Verdict]:
        """As `_verify`, where the pass has drawn tokens: they count for some spans, and the others go through the
        verifier."""
        tokens: list[int] = drawn.tolist()
        own: list[int] = []
        rest: list[int] = []
        row = 0
        inside: list[PlannedSpan] = []
        others: list[PlannedSpan] = []
        for i, planned in enumerate(step.plan.spans):
            stop = row + planned.logit_rows
            if planned.draws and step.how.drawn[i] == PASS:
                inside.append(planned)
                own += tokens[row:stop]
            elif planned.draws:
                others.append(planned)
                rest += range(row, stop)
            row = stop
        found = iter(drawn_verdicts(own, [planned.draft for planned in inside]))
        if not others:
            return list(found)
        spans = [LogitSpan(p.sequence, p.draft.tokens, rows=len(p.draft.tokens) + 1) for p in others]
        theirs = logits.index_select(0, ids_to_device(rest, logits.device))
        checked = iter(self.engine.verifier.verify(theirs, spans, [planned.draft for planned in others]))
        return [
            next(found if step.how.drawn[i] == PASS else checked)
            for i, planned in enumerate(step.plan.spans)
            if planned.draws
        ]

    def _take_prompt_logprobs(self, plan: StepPlan, logits: torch.Tensor) -> list[int]:
        """Record the prompt logprobs of this step's rows, and return the indices of the rows that draw."""
        drawing_rows: list[int] = []
        row = 0
        for planned in plan.spans:
            rows = planned.logit_rows
            if planned.sequence.wants_prompt_logprobs:
                sequence, known = planned.sequence, planned.sequence.prompt_logprobs
                if not known:
                    known.append(None)  # nothing predicts the first token
                # Row i of the span predicts the token at start + i + 1; a preempted sequence knows some already.
                first, stop = len(known), min(planned.stop + 1, sequence.prompt_len)
                if first < stop:
                    offset = row + first - planned.start - 1
                    wanted = sequence.params.prompt_logprobs or 0
                    known.extend(
                        token_logprobs(logits[offset : offset + stop - first], sequence.tokens[first:stop], wanted)
                    )
            if planned.draws:
                draws = len(planned.draft.tokens) + 1
                drawing_rows.extend(range(row + rows - draws, row + rows))
            row += rows
        return drawing_rows

    def _commit(self, step: LaunchedStep, verdicts: list[Verdict]) -> list[Committed]:
        """Commit the tokens of each span that drew. Sequences that ended during the pass are skipped."""
        committed = []
        drawn = iter(verdicts)
        for planned in step.plan.spans:
            verdict = next(drawn) if planned.draws else None
            if not self._lives(planned):
                continue
            if verdict is not None:
                self.engine.speculator.observe_tokens(step.drafts, planned.sequence, verdict.tokens)
                committed.append(Committed(planned, verdict, self._commit_tokens(planned, verdict)))
            else:
                planned.sequence.computed = planned.stop
        return committed

    def _publish_features(self, plan: StepPlan, features: torch.Tensor) -> None:
        """Pass the features of the committed rows to the drafters that read them."""
        row, kept = 0, []
        for planned in plan.spans:
            if self._lives(planned):
                stop = row + planned.sequence.computed - planned.start
                kept.append(KeptRows(planned.sequence, planned.start, row, stop))
            row += planned.rows
        self.engine.speculator.features.publish(features, kept)

    def _commit_tokens(self, planned: PlannedSpan, verdict: Verdict) -> Delta:
        """Append the drawn tokens, up to a stop. The keys and values of rejected tokens are overwritten later."""
        sequence = planned.sequence
        first = sequence.output_len == 0
        tokens, reason, stop_token = self._until_stop(sequence, verdict.tokens)
        sequence.tokens.extend(tokens)
        sequence.computed = len(sequence.tokens) - 1
        self._scheduler.shares.served(sequence, len(tokens))
        problem = None
        if sequence.grammar is not None:
            sequence.grammar.advance(tokens)
            if reason is None and (limit := sequence.grammar.problem):
                reason, problem = "error", f"{GRAMMAR_LIMIT}: {limit}"
        if reason is not None:
            sequence.blocks.commit(sequence.tokens, sequence.computed)  # else in `settle`
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
            rejected=tuple(planned.draft.tokens[accepted:]),
        )
        return delta if reason is None else self._end(sequence, reason, delta, stop_token, problem)

    def _until_stop(self, sequence: Sequence, tokens: list[int]) -> tuple[list[int], FinishReason | None, int | None]:
        """Return the tokens up to the first that ends the sequence, the finish reason, and the stop token."""
        params = sequence.params
        room = min(params.max_tokens - sequence.output_len, self.info.max_model_len - len(sequence.tokens))
        for i, token in enumerate(tokens[:room]):
            over = params.grammar is not None and token in self.info.eos_token_ids  # nothing else may follow
            if token in sequence.stops and (over or sequence.output_len + i >= params.min_tokens):
                return tokens[: i + 1], "stop", token
        return (tokens[:room], "length", None) if len(tokens) >= room else (tokens, None, None)

    def _end(
        self,
        sequence: Sequence,
        reason: FinishReason,
        delta: Delta | None = None,
        stop_token: int | None = None,
        problem: str | None = None,
    ) -> Delta:
        """Release all that the sequence holds, and return its last delta. `problem`: what an error says."""
        del self._sequences[sequence.id]
        self._deadlines.pop(sequence.id, None)
        if self._compiling.pop(sequence, None) is None:
            self._scheduler.remove(sequence)
        self.engine.speculator.release(sequence)
        stats = request_stats(sequence, time.monotonic())
        delta = delta or Delta(request_id=sequence.id)
        return msgspec.structs.replace(delta, finish_reason=reason, stop_token=stop_token, error=problem, stats=stats)


NO_DRAFTS = StepDrafts(Choice({}))


def _span(planned: PlannedSpan, drawn: bool = False) -> Span:
    sequence = planned.sequence
    token_ids = [*sequence.tokens[planned.start : planned.stop], *planned.draft.tokens]
    draw = Draw(sequence.seed, sequence.params.temperature) if drawn else None
    return Span(token_ids, planned.start, sequence.blocks.blocks, planned.logit_rows, sequence.adapter, draw)


@contextmanager
def _phase(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Record the seconds that the body takes."""
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start
