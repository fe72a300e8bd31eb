"""AsyncEngine: the server's handle on an engine process. It starts the process, sends requests, delivers outputs, and
notices when it ends. No torch. The process itself is in `main`; the same engine without a process is `engine.llm`.
`supervisor` starts it again when it dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import shutil
import socket
import tempfile
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Literal

import msgspec
import zmq

from pilotfish.engine import child_process
from pilotfish.engine.config import EngineConfig
from pilotfish.engine.process.messages import (
    Abort,
    AdapterChanged,
    ChangeAdapter,
    EngineTask,
    Failed,
    FromEngine,
    Loading,
    Outputs,
    Ready,
    Shutdown,
    Submit,
    ToEngine,
)
from pilotfish.engine.request import Delta, EngineInfo, Request, check_request
from pilotfish.engine.stats import StepStats
from pilotfish.errors import EngineDeadError, EngineNotReadyError, ParameterError
from pilotfish.logs import Logs

logger = logging.getLogger(__name__)

EngineState = Literal["starting", "ready", "stopping", "dead"]

ENGINE_COMMAND = child_process.command_of("pilotfish.engine.process.main")

STOP_SECONDS = 5.0
"""How long the process may take to end after each of: Shutdown, the end of its standard input, SIGKILL."""
LAST_WORDS_SECONDS = 1.0
"""How long the last messages of a process that has ended by itself may take to arrive."""
MESSAGES_PER_READ = 64
"""Messages that are handled before control returns to the event loop."""


class AsyncEngine:
    """An engine in a process of its own. All methods belong to the event loop that `start` ran in.

    `state` goes from "starting" to "ready" to "stopping" to "dead", or to "dead" from any of them; `error` then says
    why. `on_stats` and `on_loading` are called from the event loop, once for each step and each report of progress;
    `on_end` when the state becomes "dead", before requests in flight hear of it. `logs` is the logging of the process;
    `command` starts it, and must call `engine.process.main.run`. Raises ConfigError for settings that contradict each
    other.
    """

    def __init__(
        self,
        config: EngineConfig,
        on_stats: Callable[[StepStats], None] | None = None,
        on_loading: Callable[[str, float], None] | None = None,
        *,
        on_end: Callable[[], None] | None = None,
        logs: Logs = Logs(),  # noqa: B008 - it cannot change
        command: Sequence[str] = ENGINE_COMMAND,
    ) -> None:
        self.config = config.check()
        self.state: EngineState = "starting"
        self.info: EngineInfo | None = None
        self.error: str | None = None
        self._on_stats = on_stats
        self._on_loading = on_loading
        self._on_end = on_end
        self._logs = logs
        self._command = tuple(command)
        self._seeds = random.SystemRandom() if config.seed is None else random.Random(config.seed)
        self._requests: dict[str, asyncio.Queue[Delta | EngineDeadError] | None] = {}
        """By id, until the engine has reported the end; None once nobody reads the deltas."""
        self._changing: deque[asyncio.Future[None]] = deque()
        """Answers that are waited for, in the order in which adapters were asked to change."""
        self._settled = asyncio.Event()
        """Set when the engine is ready, or never will be."""
        self._ended = asyncio.Event()
        """Set when it is dead."""
        self._connection: _Connection | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._watch: asyncio.Task[None] | None = None
        self._listening: asyncio.Task[None] | None = None
        self._heard = False
        """Whether the engine has sent a message since this was last set to False."""

    @property
    def in_flight(self) -> int:
        """Number of requests that the engine has not ended yet; an aborted one counts until its memory is free."""
        return len(self._requests)

    @property
    def pid(self) -> int | None:
        """The id of the engine process, while it runs."""
        if self._process is None or self._process.returncode is not None:
            return None
        return self._process.pid

    def draw_seed(self) -> int:
        """A seed for a request without one: the next of a fixed sequence if `config.seed` is set, else random."""
        return self._seeds.getrandbits(63)

    async def start(self) -> None:
        """Start the process and return at once; `wait_ready` waits for its model. Call it once.

        Raises OSError if no process can be started.
        """
        task = EngineTask(config=self.config, directory=tempfile.mkdtemp(prefix="pilotfish-"), logs=self._logs)
        try:
            self._connection = _Connection(task, self._receive)
            process = await asyncio.create_subprocess_exec(
                *self._command, stdin=asyncio.subprocess.PIPE, env=child_process.environment()
            )
        except BaseException:
            self._disconnect(task.directory)
            self._die("the engine process could not be started")
            raise
        self._process = process
        self._watch = asyncio.create_task(self._watch_process(process, task.directory))
        self._listening = asyncio.create_task(self._watch_silence(process))
        # The pipe stays open from here on: its end tells the engine that this process is gone.
        assert process.stdin is not None
        process.stdin.write(child_process.encode_task(task))

    async def wait_ready(self) -> EngineInfo:
        """Wait for the model to be loaded. Raises EngineDeadError, with its reason, if the engine is dead."""
        await self._settled.wait()
        if self.info is None or self.state == "dead":
            raise EngineDeadError(self.error)
        return self.info

    def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        """Yield the request's deltas, one per step; the last has a finish_reason.

        Raises, at the call: ParameterError for a request that the engine can never serve, or whose id is in use;
        EngineNotReadyError while the engine loads or stops; EngineDeadError. The request is sent when the first delta
        is awaited, which can raise the same if the state has changed by then; any delta can raise EngineDeadError.
        Closing the generator, or cancelling the task that waits on it, aborts the request.
        """
        check_request(request, self._ready(request))
        params = request.params
        if params.seed is None:
            params = msgspec.structs.replace(params, seed=self.draw_seed())
        arrival = request.arrival or time.monotonic()
        return self._stream(msgspec.structs.replace(request, params=params, arrival=arrival))

    async def change_adapter(self, name: str, folder: str | None) -> None:
        """Load a low-rank adapter from a folder, or unload it (None). Raises ParameterError, with what is wrong, and
        EngineDeadError."""
        if self.state != "ready":
            raise EngineNotReadyError("the engine is not ready")
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._changing.append(answer)
        self._send(ChangeAdapter(name, folder))
        await answer

    def kill(self) -> None:
        """Kill the process; requests in flight end with EngineDeadError. `stop` waits for its end."""
        if self._process is not None and self._process.returncode is None:
            self.state = "stopping"
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def stop(self) -> None:
        """End every request with finish_reason "abort", and the process; wait for its end. Callable at any time."""
        if self._watch is None or self._process is None:
            self._die("the engine was stopped before it was started")
            return
        if self.state == "ready":
            self.state = "stopping"
            self._send(Shutdown())
            await asyncio.wait({self._watch}, timeout=STOP_SECONDS)
        elif self.state == "starting":  # it reads no messages while it loads
            self.state = "stopping"
        elif self.state == "stopping":  # another call has sent Shutdown
            await asyncio.wait({self._watch}, timeout=STOP_SECONDS)
        assert self._process.stdin is not None
        for end in (self._process.stdin.close, self._process.kill):
            if not self._watch.done():
                with contextlib.suppress(ProcessLookupError):
                    end()
                await asyncio.wait({self._watch}, timeout=STOP_SECONDS)

    def _ready(self, request: Request) -> EngineInfo:
        """The engine's info if it can take this request now; else raise as `generate` says."""
        if self.state == "dead":
            raise EngineDeadError(self.error)
        if self.state != "ready" or self.info is None:
            raise EngineNotReadyError(
                "the model is still loading" if self.state == "starting" else "the engine is stopping"
            )
        if request.id in self._requests:
            raise ParameterError(
                "request_id", f"request id {request.id!r} is in use by a request that has not ended yet"
            )
        return self.info

    async def _stream(self, request: Request) -> AsyncGenerator[Delta, None]:
        self._ready(request)
        queue: asyncio.Queue[Delta | EngineDeadError] = asyncio.Queue()
        self._requests[request.id] = queue
        self._send(Submit(request))
        try:
            while True:
                item = await queue.get()
                if isinstance(item, EngineDeadError):
                    raise item
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            # The id stays in use until the engine reports the end, which must not go to another request.
            if self._requests.get(request.id) is queue:
                self._requests[request.id] = None
                self._send(Abort((request.id,)))

    def _send(self, message: ToEngine) -> None:
        assert self._connection is not None
        self._connection.send(message)

    def _receive(self, message: FromEngine) -> None:
        self._heard = True
        match message:
            case Outputs(deltas=deltas, stats=stats):
                for delta in deltas:
                    self._deliver(delta)
                if stats is not None and self._on_stats is not None:
                    self._on_stats(stats)
            case Loading(what=what, share=share):
                if self._on_loading is not None:
                    self._on_loading(what, share)
            case Ready(info=info):
                self._connected(info)
            case AdapterChanged():
                self._changed(message)
            case Failed(error=error):
                self._die(error)

    def _connected(self, info: EngineInfo) -> None:
        if self.state != "starting":
            return
        assert self._connection is not None
        self._connection.connect()
        self.info, self.state = info, "ready"
        self._settled.set()

    def _changed(self, message: AdapterChanged) -> None:
        if self.info is not None:
            self.info = msgspec.structs.replace(self.info, adapters=message.adapters)
        answer = self._changing.popleft()
        if answer.done():  # nobody waits for it any more
            return
        if message.error is None:
            answer.set_result(None)
        else:
            answer.set_exception(ParameterError(message.param, message.error))

    def _deliver(self, delta: Delta) -> None:
        ended = delta.finish_reason is not None
        queue = self._requests.pop(delta.request_id, None) if ended else self._requests.get(delta.request_id)
        if queue is not None:
            queue.put_nowait(delta)

    async def _watch_process(self, process: asyncio.subprocess.Process, directory: str) -> None:
        """Wait for the end of the process, whatever its cause; then end everything that waits for it."""
        code = await process.wait()
        if self._listening is not None:
            self._listening.cancel()
        stopped = self.state == "stopping"
        if code >= 0:  # else it could not send any
            await self._last_words()
        self._die("the engine was stopped" if stopped else f"the engine process {child_process.how_it_ended(code)}")
        self._disconnect(directory)

    async def _watch_silence(self, process: asyncio.subprocess.Process) -> None:
        """End a process that sends nothing for `rank_timeout` seconds while requests are in flight: it hangs."""
        timeout, clock = self.config.rank_timeout, child_process.PatientClock()
        since = clock.now()
        while True:
            await asyncio.sleep(child_process.heartbeat_seconds(timeout))
            now = clock.now()
            if self._heard or not self._requests:
                self._heard, since = False, now
            elif now - since > timeout:
                reason = (
                    f"rank 0 (the engine process, pid {process.pid} on {socket.gethostname()}) was silent for "
                    f"{now - since:.0f} s with requests in flight, and was ended"
                )
                logger.error("%s", reason)
                self._die(reason)
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                return

    async def _last_words(self) -> None:
        """Wait for messages that the process sent before it ended, which ZeroMQ's thread may still be reading."""
        if self.state == "stopping" and not self._requests:
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), LAST_WORDS_SECONDS)

    def _die(self, reason: str) -> None:
        """End every request in flight with this reason, unless there has been one already."""
        if self.state == "dead":
            return
        self.state, self.error = "dead", reason
        if self._on_end is not None:
            self._on_end()
        for queue in self._requests.values():
            if queue is not None:
                queue.put_nowait(EngineDeadError(reason))
        self._requests.clear()
        for answer in self._changing:
            if not answer.done():
                answer.set_exception(EngineDeadError(reason))
        self._changing.clear()
        self._settled.set()
        self._ended.set()

    def _disconnect(self, directory: str) -> None:
        if self._connection is not None:
            self._connection.close()
        shutil.rmtree(directory, ignore_errors=True)


class _Connection:
    """The client's ends of the two sockets, read by the event loop itself.

    zmq.asyncio makes a future for each message, which takes four times as long when messages have piled up. ZeroMQ's
    file descriptor signals changes, not messages, and any call on a socket may consume a signal: so this reads until
    nothing is left, from a socket that does nothing else.
    """

    def __init__(self, task: EngineTask, receive: Callable[[FromEngine], None]) -> None:
        self._to_engine = task.to_engine
        self._receive = receive
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(FromEngine).decode
        self._loop = asyncio.get_running_loop()
        self._context = zmq.Context()
        self._reader = self._context.socket(zmq.PULL)
        self._reader.set_hwm(0)
        self._writer = self._context.socket(zmq.PUSH)
        self._writer.set_hwm(0)
        self._reader.bind(task.from_engine)
        self._loop.add_reader(self._reader.fileno(), self._read)

    def connect(self) -> None:
        """Connect to the engine once it listens; before that, ZeroMQ would retry at its own intervals."""
        self._writer.connect(self._to_engine)

    def send(self, message: ToEngine) -> None:
        self._writer.send(self._encode(message), zmq.NOBLOCK)

    def _read(self) -> None:
        for _ in range(MESSAGES_PER_READ):
            if self._reader.closed:
                return
            try:
                data = self._reader.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                self._receive(self._decode(data))
            except Exception:  # a callback's: the next message has nothing to do with it
                logger.exception("a message from the engine could not be handled")
        self._loop.call_soon(self._read)

    def close(self) -> None:
        if not self._loop.is_closed():
            self._loop.remove_reader(self._reader.fileno())
        self._context.destroy(linger=0)
