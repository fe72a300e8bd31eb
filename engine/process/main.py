"""The engine process: one EngineCore behind two sockets, for `messages` to and from `client`, which starts it.

`python -m pilotfish.engine.process.main` is started with an `EngineTask` (see `engine.child_process`), and ends with
its parent. It ignores SIGINT, SIGTERM and SIGHUP, on which its parent acts. If a model is sharded over ranks, this
process is rank 0 and starts the others of its host.
"""

from __future__ import annotations

import gc
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Protocol

import msgspec
import zmq

from pilotfish import logs
from pilotfish.checkpoints.catalog import Progress
from pilotfish.engine import child_process
from pilotfish.engine.child_process import LastWords
from pilotfish.engine.config import EngineConfig
from pilotfish.engine.process.messages import (
    Abort,
    AdapterChanged,
    Alive,
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
from pilotfish.engine.request import Delta, EngineInfo, Request
from pilotfish.engine.stats import StepStats
from pilotfish.errors import ParameterError, PilotfishError, RankError, one_line

if TYPE_CHECKING:
    from pilotfish.engine.core import FinishedStep, LaunchedStep

logger = logging.getLogger(__name__)

LINGER_MS = 2000
"""How long the last messages may take to be sent when the process ends."""


class Core(Protocol):
    """The part of EngineCore that this process uses: importing EngineCore itself would import torch."""

    @property
    def info(self) -> EngineInfo: ...
    def add(self, request: Request) -> None: ...
    def abort(self, request_id: str) -> None: ...
    def change_adapter(self, name: str, folder: str | None) -> None: ...
    @property
    def asynchronous(self) -> bool: ...
    def has_work(self) -> bool: ...
    def launch(self) -> LaunchedStep: ...
    def finish(self, step: LaunchedStep) -> FinishedStep: ...
    def settle(self, step: FinishedStep) -> StepStats: ...


CreateCore = Callable[[EngineConfig, Progress, LastWords], Core]


def run(create_core: CreateCore) -> int:
    """Serve until told to stop, and return the exit status: 0 after a Shutdown, 1 after a failure (sent as Failed).

    `create_core` is called once, after the watch on the parent has begun: slow imports belong in it.
    """
    child_process.ignore_signals()
    task = child_process.read_task(EngineTask)
    logs.configure(task.logs)
    child_process.end_with_parent(lambda: shutil.rmtree(task.directory, ignore_errors=True))
    connection = _Connection(task)
    threading.Thread(target=_beat, args=(task,), name="heartbeat", daemon=True).start()
    ready = False
    try:
        core = create_core(
            task.config,
            lambda what, share: connection.send(Loading(what, share)),
            lambda reason: _last_words(task, reason),
        )
        # Exclude everything that is loaded from later collections, which would stall a step for long.
        gc.collect()
        gc.freeze()
        connection.send(Ready(core.info))
        ready = True
        _serve(core, connection)
    except Exception as error:
        if isinstance(error, RankError) and ready:  # the traceback is in the other process's log
            logger.error("the engine failed: %s", error)
        elif isinstance(error, PilotfishError) and not ready:  # wrong settings or files: a traceback adds nothing
            logger.error("the engine cannot start: %s", error)
        else:
            logger.exception("the engine failed")
        connection.send(Failed(one_line(error)))
        return 1
    finally:
        connection.close()
    return 0


def _serve(core: Core, connection: _Connection) -> None:
    """Step while there is work, else wait for messages; return after a Shutdown."""
    requests = _Requests(core, connection)
    unsent: FinishedStep | None = None
    while not requests.stopping:
        requests.take_in(wait=not core.has_work())
        if not core.has_work():
            continue
        step = core.launch()
        if core.asynchronous:  # while the pass runs, send the last step's outputs and read messages
            if unsent is not None:
                requests.send(unsent)
                unsent = None
            requests.take_in(wait=False)
        finished = core.finish(step)
        if core.asynchronous and core.has_work() and not requests.stopping:
            unsent = finished
        else:
            requests.send(finished)


class _Requests:
    """Passes requests from the client to the core, and deltas back."""

    def __init__(self, core: Core, connection: _Connection) -> None:
        self._core, self._connection = core, connection
        self._live: set[str] = set()
        self.stopping = False

    def take_in(self, wait: bool) -> None:
        """Handle every message that has arrived; with `wait`, at least one."""
        for message in self._connection.receive(wait):
            match message:
                case Submit(request=request):
                    try:
                        self._core.add(request)
                    except ParameterError as error:
                        refusal = Delta(request_id=request.id, finish_reason="error", error=error.message)
                        self._connection.send(Outputs((refusal,)))
                    else:
                        self._live.add(request.id)
                case Abort(request_ids=request_ids):
                    for request_id in request_ids:
                        self._core.abort(request_id)
                case ChangeAdapter(name=name, folder=folder):
                    self._change_adapter(name, folder)
                case Shutdown():
                    self.stopping = True
                    for request_id in self._live:
                        self._core.abort(request_id)

    def _change_adapter(self, name: str, folder: str | None) -> None:
        error, param = None, ""
        try:
            self._core.change_adapter(name, folder)
        except ParameterError as refusal:
            error, param = refusal.message, refusal.param
        except PilotfishError as refusal:
            error, param = str(refusal), "lora_path"
        self._connection.send(AdapterChanged(self._core.info.adapters, error, param))

    def send(self, step: FinishedStep) -> None:
        """Send a step's deltas and its stats."""
        self._live.difference_update(delta.request_id for delta in step.deltas if delta.finish_reason is not None)
        self._connection.send(Outputs(tuple(step.deltas), self._core.settle(step)))


class _Connection:
    """The engine's ends of the two sockets.

    Their queues have no limit: with one, a server that is slow to read would stall the step of every request, or lose
    text. What can pile up is bounded by what the requests in flight may still generate, a few tens of bytes per token.
    """

    def __init__(self, task: EngineTask) -> None:
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(ToEngine).decode
        self._context = zmq.Context()
        self._reader = self._context.socket(zmq.PULL)
        self._reader.set_hwm(0)
        self._reader.bind(task.to_engine)
        self._writer = self._context.socket(zmq.PUSH)
        self._writer.set_hwm(0)
        self._writer.linger = LINGER_MS
        self._writer.connect(task.from_engine)

    def send(self, message: FromEngine) -> None:
        self._writer.send(self._encode(message))

    def receive(self, wait: bool) -> list[ToEngine]:
        """Return every message that has arrived; with `wait`, at least one."""
        messages: list[ToEngine] = []
        flags = 0 if wait else zmq.NOBLOCK
        try:
            while True:
                messages.append(self._decode(self._reader.recv(flags)))
                flags = zmq.NOBLOCK
        except zmq.Again:
            return messages

    def close(self) -> None:
        self._reader.close(linger=0)
        self._writer.close()
        self._context.term()


def _beat(task: EngineTask) -> None:
    """Send heartbeats to the client, in a thread, until this process ends."""
    interval = child_process.heartbeat_seconds(task.config.rank_timeout)
    with _sending(task, linger_ms=0) as send:
        while True:
            send(Alive())
            time.sleep(interval)


def _last_words(task: EngineTask, reason: str) -> None:
    """See LastWords."""
    with _sending(task, LINGER_MS) as send:
        send(Failed(reason))
    os._exit(1)


@contextmanager
def _sending(task: EngineTask, linger_ms: int) -> Iterator[Callable[[FromEngine], None]]:
    """Returns what sends to the client from another thread, which needs a socket of its own."""
    with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        socket.linger = linger_ms
        socket.connect(task.from_engine)
        yield lambda message: socket.send(msgspec.msgpack.encode(message))


def _create_core(config: EngineConfig, progress: Progress, last_words: LastWords) -> Core:
    progress("importing torch", 0.0)
    from pilotfish.engine.build import build
    from pilotfish.engine.core import EngineCore

    return EngineCore(config, progress, partial(build, last_words=last_words))


if __name__ == "__main__":
    sys.exit(run(_create_core))
