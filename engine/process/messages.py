"""Messages between the server process and the engine process: msgspec structs in MessagePack over pyzmq."""

from __future__ import annotations

import msgspec

from pilotfish.engine.config import EngineConfig
from pilotfish.engine.request import Delta, EngineInfo, Request
from pilotfish.engine.stats import StepStats
from pilotfish.logs import Logs


class EngineTask(msgspec.Struct, frozen=True, kw_only=True):
    """The task that an engine process is started with.

    Each side binds the socket that it reads and connects the one that it writes: a connected PUSH socket queues
    messages at once, so no sender waits for the other side to exist.
    """

    config: EngineConfig
    directory: str
    """Private folder of the process and its parent, which holds their sockets."""
    logs: Logs = Logs()

    @property
    def to_engine(self) -> str:
        return f"ipc://{self.directory}/engine"

    @property
    def from_engine(self) -> str:
        return f"ipc://{self.directory}/client"


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    """Queue a request."""

    request: Request


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """End these requests, if they have not ended yet."""

    request_ids: tuple[str, ...]


class ChangeAdapter(msgspec.Struct, frozen=True, tag="change_adapter"):
    """Load a low-rank adapter from a folder, or unload it."""

    name: str
    folder: str | None
    """None: unload it."""


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """Stop at once; requests that still run end with finish_reason "abort"."""


class Loading(msgspec.Struct, frozen=True, tag="loading"):
    """Progress of start-up: an activity, and the share of it that is done (0 to 1)."""

    what: str
    share: float


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The engine is loaded and takes requests."""

    info: EngineInfo


class Outputs(msgspec.Struct, frozen=True, tag="outputs"):
    """A step's deltas and stats; without stats, the refusal of a request."""

    deltas: tuple[Delta, ...]
    stats: StepStats | None = None


class AdapterChanged(msgspec.Struct, frozen=True, tag="adapter_changed"):
    """The answer to a ChangeAdapter; they come in the order of these."""

    adapters: tuple[str, ...]
    """Names of the adapters that are loaded now."""
    error: str | None = None
    param: str = ""
    """The parameter that the error is about."""


class Alive(msgspec.Struct, frozen=True, tag="alive"):
    """A heartbeat of the engine process, which may be busy with a long step."""


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The engine cannot start or go on; the process ends after this message."""

    error: str


ToEngine = Submit | Abort | ChangeAdapter | Shutdown
FromEngine = Loading | Ready | Outputs | AdapterChanged | Alive | Failed
