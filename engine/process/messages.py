"""What crosses between the API process and the engine process: msgspec structs in MessagePack over pyzmq."""

from __future__ import annotations

import msgspec

from pilotfish.engine.request import Delta, EngineInfo, RankMemory, Request


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    request: Request


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    request_ids: tuple[str, ...]


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """Stop at once; what still runs ends with finish_reason "abort"."""


class StepStats(msgspec.Struct, frozen=True, kw_only=True):
    """One engine step, for the metrics. Counters are of this step alone; gauges are as it ended."""

    running: int
    waiting: int
    sequences: int = 0
    """Those that the step computed something of."""
    rows: int
    """Token rows that the target computed."""
    prompt_tokens: int
    """Of those, rows of prefill chunks."""
    generated_tokens: int
    drafted: dict[str, int] = {}
    """Tokens verified in this step, by drafter."""
    accepted: dict[str, int] = {}
    drafted_at: dict[str, tuple[int, ...]] = {}
    """Of `drafted` and `accepted`, by position in the draft, the first position first."""
    accepted_at: dict[str, tuple[int, ...]] = {}
    step_tokens: dict[str, tuple[int, ...]] = {}
    """For each sequence that decoded, the tokens that were added to it; by who drafted for it, "none" if nobody."""
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


class Loading(msgspec.Struct, frozen=True, tag="loading"):
    """How far start-up is: what is being done, and the share of it that is done (0 to 1)."""

    what: str
    share: float


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    info: EngineInfo


class Outputs(msgspec.Struct, frozen=True, tag="outputs"):
    deltas: tuple[Delta, ...]
    stats: StepStats | None = None


class Alive(msgspec.Struct, frozen=True, tag="alive"):
    """The engine's process runs; it may be at work on a long step."""


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The engine cannot start or go on; the process ends after this message."""

    error: str


ToEngine = Submit | Abort | Shutdown
FromEngine = Loading | Ready | Outputs | Alive | Failed
