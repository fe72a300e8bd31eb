"""What a step did and what happened to a request, in numbers. No torch: the server reads them, too."""

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
    from pilotfish.engine.verification.verifier import Verdict


class StepStats(msgspec.Struct, frozen=True, kw_only=True):
    """One engine step, for the metrics. Counters are of this step alone; gauges are as it ended."""

    running: int
    waiting: int
    sequences: int = 0
    """Sequences that the step computed something of."""
    rows: int
    """Token rows that the target computed."""
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
    """For each sequence that decoded, the tokens that were added to it; by its drafter, "none" without a draft."""
    chosen: dict[str, int] = {}
    """Decoding sequences by the drafter that was chosen for them in this step; "none" for plain decoding."""
    predicted_goodput: float = 0.0
    """Tokens per second that the controller expected of this step with what it chose, and of plain decoding; 0 where
    nothing was predicted (a step without decoding, or an engine without the controller)."""
    predicted_plain_goodput: float = 0.0
    preemptions: int = 0
    prefix_queried_tokens: int = 0
    """Prompt tokens of sequences admitted in this step, and how many of them the prefix cache had."""
    prefix_hit_tokens: int = 0
    blocks_total: int
    blocks_used: int
    """Held by a sequence."""
    blocks_cached: int
    """Not held, but kept for the prefix cache."""
    seconds: dict[str, float] = {}
    """By phase: plan, draft, forward, sample, commit."""
    memory: tuple[RankMemory, ...] = ()
    """Now and then, for every rank; () in other steps."""


class Committed(NamedTuple):
    """A span that drew tokens: what was verified, and what its request got."""

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
) -> StepStats:
    """The account of a step, once its tokens are committed."""
    step_tokens: dict[str, list[int]] = {}
    for planned, _, delta in committed:
        if planned.decodes:
            step_tokens.setdefault(planned.draft.drafter or "none", []).append(len(delta.token_ids))
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
        prefix_queried_tokens=sum(len(sequence.request.prompt_ids) for sequence in plan.admitted),
        prefix_hit_tokens=sum(sequence.cached_prompt_tokens for sequence in plan.admitted),
        blocks_total=pool.num_blocks,
        blocks_used=pool.used,
        blocks_cached=pool.cached,
        seconds=seconds,
        memory=memory,
    )


def by_position(counts: Iterable[tuple[str, int]]) -> dict[str, tuple[int, ...]]:
    """From (drafter, tokens) of some drafts, how many drafts of each drafter reach each position, the first position
    first. Drafted and accepted tokens are counted alike: both are the beginning of a draft.
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
    """The account of a request that ends at `now`, time.monotonic() seconds."""
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
