"""SupervisedEngine: an engine that gets up again. It stands for one AsyncEngine after another, with the same interface:
when the process dies, another is started, and requests that had produced nothing are sent to it once more.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal

import msgspec

from pilotfish.engine.config import EngineConfig
from pilotfish.engine.process.client import ENGINE_COMMAND, AsyncEngine
from pilotfish.engine.request import Delta, EngineInfo, Request, check_request
from pilotfish.engine.stats import StepStats
from pilotfish.errors import EngineDeadError, EngineNotReadyError, EngineRestartingError, PilotfishError
from pilotfish.logs import Logs

logger = logging.getLogger(__name__)

SupervisedState = Literal["starting", "ready", "restarting", "stopping", "dead"]

LONGEST_DELAY = 30.0
FIRST_GUESS = 5.0
"""Seconds that a start takes, before one has been seen."""
SHORTEST_WAIT = 0.5
"""Seconds after which a client is asked to come back at the earliest."""


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """At most `most` restarts within `window` seconds; 0: none."""

    most: int = 5
    window: float = 600.0

    def delay(self, recent: int) -> float:
        """Seconds before a restart that `recent` others precede within the window: none before the first, then 1, 2,
        4 and so on."""
        return min(LONGEST_DELAY, 2.0 ** (recent - 1)) if recent else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineEvents:
    """What is called from the event loop when something happens to the engine."""

    stats: Callable[[StepStats], None] = lambda stats: None
    """After each step."""
    loading: Callable[[str, float], None] = lambda what, share: None
    """At each report of progress while it loads."""
    ready: Callable[[EngineInfo], None] = lambda info: None
    """Each time that it takes requests from now on."""
    restarting: Callable[[], None] = lambda: None
    """When it has died and is started again."""
    replayed: Callable[[], None] = lambda: None
    """For each request that is sent once more."""


class SupervisedEngine:
    """An engine process that is started again when it dies, as often as `policy` allows. All methods belong to the
    event loop that `start` ran in, and are those of `AsyncEngine`.

    `state` goes from "starting" to "ready", and to "restarting" and back to "ready" as often as the process dies. It is
    "dead" for good, with its reason in `error`, after `stop`, after a first start that failed, and after more deaths
    than `policy` allows.
    """

    def __init__(
        self,
        config: EngineConfig,
        policy: RestartPolicy = RestartPolicy(),
        events: EngineEvents = EngineEvents(),
        *,
        logs: Logs = Logs(),  # noqa: B008
        command: Sequence[str] = ENGINE_COMMAND,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config.check()
        self.state: SupervisedState = "starting"
        self.error: str | None = None
        self._policy = policy
        self._events = events
        self._logs = logs
        self._command = command
        self._clock = clock
        self._seeds = random.SystemRandom() if config.seed is None else random.Random(config.seed)
        self._info: EngineInfo | None = None
        """Of the process that was last ready."""
        self._restarts: list[float] = []
        """When the restarts within the window were."""
        self._adapters: dict[str, str | None] = {}
        """Folders of the adapters that were loaded since the start, None for those that were unloaded."""
        self._settled = asyncio.Event()
        """Set while the state is neither "starting" nor "restarting"."""
        self._restarting: asyncio.Task[None] | None = None
        self._began = 0.0
        self._due = 0.0
        """When the process will probably be ready."""
        self._start_seconds = FIRST_GUESS
        self._engine = self._make()

    def _make(self) -> AsyncEngine:
        engine = AsyncEngine(
            self.config,
            self._events.stats,
            self._events.loading,
            on_end=lambda: self._ended(engine),
            logs=self._logs,
            command=self._command,
        )
        return engine

    @property
    def info(self) -> EngineInfo | None:
        """Of the process that is or was last ready; None before the first."""
        return self._engine.info if self.state == "ready" else self._info

    @property
    def in_flight(self) -> int:
        """Number of requests that the process has not ended yet."""
        return self._engine.in_flight

    @property
    def pid(self) -> int | None:
        """The id of the engine process, while it runs."""
        return self._engine.pid

    @property
    def retry_after(self) -> float:
        """Seconds until the process will probably be ready."""
        return max(SHORTEST_WAIT, self._due - self._clock())

    def draw_seed(self) -> int:
        """A seed for a request without one: the next of a fixed sequence if `config.seed` is set, else random."""
        return self._seeds.getrandbits(63)

    async def start(self) -> None:
        """Start the process and return at once; `wait_ready` waits for its model. Call it once.

        Raises OSError if no process can be started.
        """
        self._began = self._clock()
        self._due = self._began + self._start_seconds
        await self._engine.start()
        self._restarting = asyncio.create_task(self._watch_start(self._engine))

    async def wait_ready(self) -> EngineInfo:
        """Wait for the engine to take requests. Raises EngineDeadError, with its reason, if it is dead."""
        await self._settled.wait()
        if self.state != "ready" or self.info is None:
            raise EngineDeadError(self.error)
        return self.info

    def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        """As `AsyncEngine.generate`. While the engine is restarted, the request waits for it. If the process dies
        before the first delta, the request is sent once more, to the next process, with the same seed; after that
        EngineRestartingError is raised, or EngineDeadError if there is no other process."""
        if request.params.seed is None:
            params = msgspec.structs.replace(request.params, seed=self.draw_seed())
            request = msgspec.structs.replace(request, params=params)
        if not request.arrival:
            request = msgspec.structs.replace(request, arrival=time.monotonic())
        if self.state == "restarting" and self._info is not None:
            check_request(request, self._info)
            return self._stream(request, None)
        return self._stream(request, self._generate(request))

    def _generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        if self.state == "dead":
            raise EngineDeadError(self.error)
        return self._engine.generate(request)

    async def _stream(
        self, request: Request, deltas: AsyncGenerator[Delta, None] | None
    ) -> AsyncGenerator[Delta, None]:
        began = replayed = False
        while True:
            if deltas is None:
                await self._settled.wait()
                deltas = self._generate(request)
            try:
                async with aclosing(deltas):
                    async for delta in deltas:
                        began = True
                        yield delta
                return
            except EngineDeadError as error:
                if self.state in ("stopping", "dead"):
                    raise EngineDeadError(self.error or str(error)) from error
                if began or replayed:
                    raise EngineRestartingError(str(error), self.retry_after) from error
            replayed, deltas = True, None
            self._events.replayed()

    async def change_adapter(self, name: str, folder: str | None) -> None:
        """Load a low-rank adapter from a folder, or unload it (None), also in the processes to come. Raises
        ParameterError, with what is wrong, EngineNotReadyError and EngineDeadError."""
        if self.state != "ready":
            raise EngineNotReadyError("the engine is not ready")
        await self._engine.change_adapter(name, folder)
        self._adapters[name] = folder

    def kill(self) -> None:
        """Kill the process, and start no other; requests in flight end with EngineDeadError. `stop` waits for its
        end."""
        self._stopping()
        self._engine.kill()

    async def stop(self) -> None:
        """End every request with finish_reason "abort", and the process; wait for its end. Callable at any time."""
        self._stopping()
        if self._restarting is not None:  # it may be starting a process at this moment
            await asyncio.gather(self._restarting, return_exceptions=True)
        await self._engine.stop()
        self._die(self._engine.error or "the engine was stopped")

    def _stopping(self) -> None:
        """From now on there is no other process."""
        if self.state != "dead":
            self.state = "stopping"
        if self._restarting is not None:
            self._restarting.cancel()
        self._settled.set()

    def _die(self, reason: str) -> None:
        if self.state != "dead":
            self.state, self.error = "dead", reason
        self._settled.set()

    def _ended(self, engine: AsyncEngine) -> None:
        """Decide what follows the end of a process, before its requests hear of it."""
        if engine is not self._engine or self.state in ("stopping", "dead"):
            return
        reason = engine.error or "the engine has ended"
        if self._info is None:  # the first start: the settings or the model are wrong, or the machine is
            self._die(reason)
            return
        now = self._clock()
        self._restarts = [moment for moment in self._restarts if now - moment < self._policy.window]
        recent = len(self._restarts)
        if recent >= self._policy.most:
            if self._policy.most:
                often = f"has been restarted {recent} times within {self._policy.window:g} s, and is not again"
                logger.error("the engine has ended: %s. It %s: the server has to be restarted", reason, often)
            else:
                logger.error("the engine has ended: %s. The server has to be restarted", reason)
            self._die(reason)
            return
        if self.state == "ready":
            self._info = engine.info
        delay = self._policy.delay(recent)
        self._restarts.append(now)
        self.state = "restarting"
        self._settled.clear()
        self._due = now + delay + self._start_seconds
        logger.error(
            "the engine has ended: %s. It is restarted%s (%d of at most %d times within %g s); %d requests were in "
            "flight: those that had produced nothing are sent once more",
            reason,
            f" in {delay:g} s" if delay else "",
            recent + 1,
            self._policy.most,
            self._policy.window,
            engine.in_flight,
        )
        self._events.restarting()
        self._restarting = asyncio.create_task(self._restart(engine, delay))

    async def _restart(self, old: AsyncEngine, delay: float) -> None:
        await old.stop()  # its memory must be free
        await asyncio.sleep(delay)
        self._began = self._clock()
        self._due = self._began + self._start_seconds
        engine = self._engine = self._make()
        with contextlib.suppress(OSError):  # `_ended` knows of it
            await engine.start()
            await self._watch_start(engine)

    async def _watch_start(self, engine: AsyncEngine) -> None:
        """Wait until the process is ready; if it dies instead, `_ended` knows."""
        try:
            await engine.wait_ready()
            await self._load_adapters(engine)
        except EngineDeadError:
            return
        if engine.info is None or engine.state != "ready":
            return
        again = self._info is not None
        self._start_seconds = self._clock() - self._began
        self._info = engine.info
        self.state = "ready"
        self._settled.set()
        if again:
            logger.warning("the engine takes requests again, %.1f s after it was started", self._start_seconds)
        self._events.ready(engine.info)

    async def _load_adapters(self, engine: AsyncEngine) -> None:
        """Change the adapters as they were changed in the processes before."""
        for name, folder in self._adapters.items():
            loaded = engine.info is not None and name in engine.info.adapters
            try:
                if loaded:  # by the settings, perhaps from another folder
                    await engine.change_adapter(name, None)
                if folder is not None:
                    await engine.change_adapter(name, folder)
            except EngineDeadError:
                raise
            except PilotfishError as error:
                logger.error("the adapter %r could not be loaded again: %s", name, error)
