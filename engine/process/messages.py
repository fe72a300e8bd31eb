"""What crosses between the API process and the engine process: msgspec structs in MessagePack over pyzmq."""

from __future__ import annotations

import msgspec

from pilotfish.engine.request import Delta, EngineInfo, Request
from pilotfish.engine.stats import StepStats


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    request: Request


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    request_ids: tuple[str, ...]


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """Stop at once; what still runs ends with finish_reason "abort"."""


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
