"""What the engine did in the last moments, for the page's live view. Steps are added up only while somebody looks."""

from __future__ import annotations

from collections import Counter

import msgspec

from pilotfish.engine.stats import StepStats

_SUMMED = ("rows", "prompt_tokens", "generated_tokens", "prefix_queried_tokens", "prefix_hit_tokens", "preemptions")
_PREDICTED = ("predicted_goodput", "predicted_plain_goodput")
_LATEST = ("running", "waiting", "blocks_total", "blocks_used", "blocks_cached")


class LiveState(msgspec.Struct, kw_only=True):
    """The engine now, and what it did in the last `seconds`. Fields are as in `StepStats`."""

    state: str
    seconds: float
    in_flight: int
    """Sequences that were admitted and not yet answered in full."""
    max_num_seqs: int
    running: int = 0
    waiting: int = 0
    blocks_total: int = 0
    blocks_used: int = 0
    blocks_cached: int = 0
    steps: int = 0
    rows: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    tokens: dict[str, int]
    """Tokens of decoding sequences by the drafter of their step, "none" for plain decoding."""
    chosen: dict[str, int]
    drafted_at: dict[str, list[int]]
    accepted_at: dict[str, list[int]]
    predicted_goodput: float = 0.0
    predicted_plain_goodput: float = 0.0
    phases: dict[str, float]
    """Seconds by phase of the steps."""


class LiveSums:
    """Adds up steps until `take` begins anew."""

    def __init__(self) -> None:
        self._last: StepStats | None = None
        self._begin()

    def _begin(self) -> None:
        self._sums: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        self._chosen: Counter[str] = Counter()
        self._phases: dict[str, float] = {}
        self._drafted_at: dict[str, list[int]] = {}
        self._accepted_at: dict[str, list[int]] = {}

    def step(self, stats: StepStats) -> None:
        """Add a step of the engine."""
        self._last = stats
        self._sums["steps"] += 1
        for name in _SUMMED:
            self._sums[name] += getattr(stats, name)
        self._chosen.update(stats.chosen)
        for drafter, lengths in stats.step_tokens.items():
            self._tokens[drafter] += sum(lengths)
        for phase, seconds in stats.seconds.items():
            self._phases[phase] = self._phases.get(phase, 0.0) + seconds
        for known, tally in ((self._drafted_at, stats.drafted_at), (self._accepted_at, stats.accepted_at)):
            for drafter, counts in tally.items():
                own = known.setdefault(drafter, [])
                own.extend([0] * (len(counts) - len(own)))
                for i, count in enumerate(counts):
                    own[i] += count

    def take(self, state: str, seconds: float, in_flight: int, max_num_seqs: int) -> LiveState:
        """Return the state after `seconds`, and begin anew."""
        last = self._last
        taken = LiveState(
            state=state,
            seconds=seconds,
            in_flight=in_flight,
            max_num_seqs=max_num_seqs,
            **self._sums,
            tokens=self._tokens,
            chosen=self._chosen,
            drafted_at=self._drafted_at,
            accepted_at=self._accepted_at,
            phases=self._phases,
        )
        for name in () if last is None else (*_LATEST, *(_PREDICTED if self._sums else ())):
            setattr(taken, name, getattr(last, name))
        self._begin()
        return taken
