"""The statistics of steps and requests. No torch: the server reads them, too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from pilotfish.engine.memory.usage import RankMemory
from pilotfish.engine.request import Delta, RequestStats

if TYPE_CHECKING:
    from pilotfish.engine.memory.block_pool import BlockPool
    from pilotfish.engine.scheduler import PlannedSpan, Scheduler, StepPlan
    from pilotfish.engine.sequence import Sequence
    from pilotfish.engine.speculation.control.candidates import Choice
    from pilotfish.engine.speculation.drafters.drafter import PastUse
    from pilotfish.engine.verification.verifier import Verdict


class Ways(NamedTuple):
    """How a step's pass was computed, and its tokens were drawn."""

    passed: str
    """"captured", or why no captured pass was replayed; "" without a pass."""
    drawn: dict[int, str]
    """By the index of each span that draws: "pass", or why its tokens were drawn after it."""


PASS = "pass"


class StepStats(msgspec.Struct, frozen=True, kw_only=True):
    """One engine step, for the metrics. Counters cover this step alone; gauges are taken at its end."""

    running: int
    waiting: int
    sequences: int = 0
    """Number of sequences with rows in the step."""
    rows: int
    """Rows (tokens) that the target computed."""
    prompt_tokens: int
    """Rows of prefill chunks among them."""
    generated_tokens: int
    drafted: dict[str, int] = {}
    """Tokens verified in this step, by drafter."""
    accepted: dict[str, int] = {}
    drafted_at: dict[str, tuple[int, ...]] = {}
    """`drafted` and `accepted` by position in the draft, the first position first."""
    accepted_at: dict[str, tuple[int, ...]] = {}
    step_tokens: dict[str, tuple[int, ...]] = {}
    """By drafter ("none" without a draft), the tokens that were added to each sequence that decoded with it."""
    chosen: dict[str, int] = {}
    """Decoding sequences by the drafter that was chosen for them in this step; "none" for plain decoding."""
    predicted_goodput: float = 0.0
    """Tokens per second that the controller predicted for its choice, and for plain decoding; 0 where nothing was
    predicted (a step without decoding, or an engine without the controller)."""
    predicted_plain_goodput: float = 0.0
    preemptions: int = 0
    """Sequences that lost their blocks to one that comes before them."""
    pauses: int = 0
    """Sequences that wait, with their blocks, for one that comes before them."""
    prefix_queried_tokens: int = 0
    """Prompt tokens of sequences admitted in this step, and those of them that were in the prefix cache."""
    prefix_hit_tokens: int = 0
    past_bytes: int = 0
    """Bytes of past texts that are kept to draft from; then the sequences for which they were searched in this step,
    and those of them for which they had a draft."""
    past_queries: int = 0
    past_hits: int = 0
    passed: str = ""
    """Whether a captured pass was replayed, "captured", or why not: "no_graphs", "adapters", "size", "logits"; "" where
    there was no pass."""
    drawn_rows: dict[str, int] = {}
    """Rows that drew by where: "pass", in the pass itself, or after it for a reason: "host" (it can draw none),
    "logprobs", "grammar", "penalties", "truncation"."""
    constrained_rows: int = 0
    """Rows that drew, or verified, a token of an answer under a grammar or a budget of reasoning."""
    blocks_total: int
    blocks_used: int
    """Blocks that a sequence holds."""
    blocks_cached: int
    """Blocks that no sequence holds, kept for the prefix cache."""
    seconds: dict[str, float] = {}
    """Seconds by phase: draft, plan, forward, sample, commit."""
    memory: tuple[RankMemory, ...] = ()
    """Memory of every rank, every few seconds; () in the steps between."""


class Committed(NamedTuple):
    """A span that drew tokens, its verdict, and what its request received."""

    planned: PlannedSpan
    verdict: Verdict
    delta: Delta


def step_stats(
    plan: StepPlan,
    committed: list[Committed],
    choice: Choice,
    scheduler: Scheduler,
    pool: BlockPool,
    seconds: dict[str, float],
    memory: tuple[RankMemory, ...],
    how: Ways,
    past: PastUse,
) -> StepStats:
    """Return the statistics of a step whose tokens are committed."""
    step_tokens: dict[str, list[int]] = {}
    for planned, _, delta in committed:
        if planned.decodes:
            step_tokens.setdefault(planned.draft.drafter or "none", []).append(len(delta.token_ids))
    drawn_rows: dict[str, int] = {}
    for i, where in how.drawn.items():
        drawn_rows[where] = drawn_rows.get(where, 0) + len(plan.spans[i].draft.tokens) + 1
    chosen = {name: len(counts) for name, counts in step_tokens.items()}
    drafted_at = by_position([(planned.draft.drafter, len(planned.draft.tokens)) for planned, _, _ in committed])
    accepted_at = by_position([(planned.draft.drafter, verdict.accepted) for planned, verdict, _ in committed])
    return StepStats(
        running=len(scheduler.running),
        waiting=len(scheduler.waiting),
        sequences=len(plan.spans),
        rows=plan.rows,
        prompt_tokens=sum([planned.prompt_rows for planned in plan.spans]),
        generated_tokens=sum([len(delta.token_ids) for _, _, delta in committed]),
        drafted={name: sum(counts) for name, counts in drafted_at.items()},
        accepted={name: sum(accepted_at.get(name, ())) for name in drafted_at},
        chosen=chosen,
        predicted_goodput=choice.goodput if chosen else 0.0,
        predicted_plain_goodput=choice.plain_goodput if chosen else 0.0,
        drafted_at=drafted_at,
        accepted_at=accepted_at,
        step_tokens={name: tuple(counts) for name, counts in step_tokens.items()},
        preemptions=plan.preemptions,
        pauses=plan.pauses,
        prefix_queried_tokens=sum(len(sequence.request.prompt_ids) for sequence in plan.admitted),
        prefix_hit_tokens=sum(sequence.cached_prompt_tokens for sequence in plan.admitted),
        past_bytes=past.nbytes,
        past_queries=past.queries,
        past_hits=past.hits,
        passed=how.passed,
        drawn_rows=drawn_rows,
        constrained_rows=sum(len(p.draft.tokens) + 1 for p, _, _ in committed if p.sequence.grammar is not None),
        blocks_total=pool.num_blocks,
        blocks_used=pool.used,
        blocks_cached=pool.cached,
        seconds=seconds,
        memory=memory,
    )


def by_position(counts: Iterable[tuple[str, int]]) -> dict[str, tuple[int, ...]]:
    """Count, for each drafter, the drafts that reach each position (the first position first), from the (drafter,
    tokens) of each draft. Drafted and accepted tokens are counted alike: both start at the draft's first position.
    """
    tally: dict[str, list[int]] = {}
    for (drafter, tokens), drafts in Counter(counts).items():
        if not tokens:
            continue
        positions = tally.setdefault(drafter, [])
        positions.extend([0] * (tokens - len(positions)))
        for position in range(tokens):
            positions[position] += drafts
    return {drafter: tuple(positions) for drafter, positions in tally.items()}


def request_stats(sequence: Sequence, now: float) -> RequestStats:
    """Return the statistics of a request that ends at `now`, time.monotonic() seconds."""
    drafted = sequence.drafted
    return RequestStats(
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
