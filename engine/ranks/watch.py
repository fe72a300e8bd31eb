"""Watch: the leader's thread that listens to the other ranks, and ends the engine, with the culprit's name, when one of
them ends, falls silent or hangs. No torch. `peers` determines the culprit."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import threading
import time
from collections.abc import Callable

import msgspec
import zmq

from pilotfish.engine.child_process import LastWords, PatientClock, heartbeat_seconds
from pilotfish.engine.config import EngineConfig
from pilotfish.engine.memory.usage import RankMemory
from pilotfish.engine.ranks.peers import CONSEQUENCE_SECONDS, Answer, Peers
from pilotfish.engine.ranks.wire import Beat, End, FromLeader, Hello, ToLeader, Welcome
from pilotfish.errors import RankError

logger = logging.getLogger(__name__)

POLL_MS = 50
LAST_WORDS_SECONDS = 2.0
"""How long the main thread has to notice that the engine has failed, before its last words are sent for it."""
TEARDOWN_SECONDS = 15.0
"""How long it has to end the process once it has noticed."""
LATE_SECONDS = 2.0
"""How long to wait, when the engine ends at its start, for processes of other hosts that have not joined."""
LINGER_MS = 500


class Watch:
    """Watches from when it is made until `close`. `endpoint`: where it listens, as for zmq's bind. `welcome` is the
    answer to each process that joins. `abort` makes a collective fail in which the main thread waits. `last_words`, if
    given, tells the client and ends this process. Raises zmq.ZMQError if it cannot listen there.

    Times are those of a PatientClock, which stands still while this process does.
    """

    def __init__(
        self,
        config: EngineConfig,
        endpoint: str,
        welcome: Welcome,
        abort: Callable[[], None],
        last_words: LastWords | None = None,
    ) -> None:
        self._config = config
        self._welcome = welcome
        self._abort = abort
        self._last_words = last_words
        self._peers = Peers(config)
        self._identities: dict[bytes, int] = {}
        """Ranks by the identity of their socket; -1 for a host's parent process."""
        self._changed = threading.Condition()
        """Guards the peers and the reason."""
        self._reason: str | None = None
        self._error = ""
        """The argument of `close`."""
        self._noticed = threading.Event()
        self._closing = threading.Event()
        self._clock = PatientClock()
        self._now = 0.0
        self._entered: Callable[[], int] = lambda: 0
        self._passes = 0
        self._finished: Callable[[], bool] = lambda: True
        self._last_progress: tuple[int, int] = (0, 0)
        self._progress_at = 0.0
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = LINGER_MS
        self._socket.ipv6 = True
        self._socket.set_hwm(0)
        try:
            self._socket.bind(endpoint)
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self._thread = threading.Thread(target=self._run, name="rank-watch", daemon=True)
        self._thread.start()

    # Called by the main thread.

    def adopt(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        """Note that `process` is a rank of this host."""
        with self._changed:
            self._peers.adopt(rank, process)

    def counts(self, entered: Callable[[], int]) -> None:
        """Set what returns the number of collectives that the leader has entered."""
        self._entered = entered

    def begin(self) -> None:
        """Note that the leader begins work that all ranks do together. Raises RankError if the engine has failed."""
        self.check()
        self._finished = lambda: False

    def begin_pass(self) -> int:
        """As `begin`, for a pass; return its number."""
        self.begin()
        self._passes += 1
        return self._passes

    def end(self, finished: Callable[[], bool]) -> None:
        """Note that the leader has done its part, or queued it on its device: `finished` tells whether it is done."""
        self._finished = finished

    def check(self) -> None:
        """Raise RankError if the engine has failed."""
        if self._reason is not None:
            self._noticed.set()
            raise RankError(self._reason)

    def fail(self, reason: str) -> None:
        """End the engine for a reason that the leader found itself."""
        with self._changed:
            if self._reason is None and not self._closing.is_set():
                self._end_engine(reason)

    def why(self, seconds: float = CONSEQUENCE_SECONDS + 1) -> RankError:
        """Wait for the cause of a failed collective of the leader's to be known, and return it."""
        with self._changed:
            self._changed.wait_for(lambda: self._reason is not None, seconds)
        self._noticed.set()
        return RankError(
            self._reason or "rank 0 could not complete a collective; no other rank is known to have failed"
        )

    def wait_for(self, kind: type[Answer], tell: Callable[[str], None] = lambda waited_for: None) -> list[Answer]:
        """Wait for a message of this kind from each rank, and return them by rank, from 1 on. `tell` is called
        repeatedly with the ranks that it waits for. Raises RankError if a rank ends instead."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._reason is not None or self._peers.answers(kind) is not None, 0.2)
                self.check()
                answers = self._peers.answers(kind)
                waited_for = self._peers.waited_for(kind)
            if answers is not None:
                return answers
            tell(waited_for)

    def slowest(self, what: str, own: float) -> float:
        """See `Peers.slowest`."""
        with self._changed:
            return self._peers.slowest(what, own)

    def memory(self) -> tuple[RankMemory, ...]:
        """The last reading of each rank above 0 that has sent one."""
        with self._changed:
            return self._peers.memory()

    def close(self, error: str = "") -> None:
        """Stop watching, and tell the ranks to end; `error` is the reason, "" if the engine was stopped."""
        self._error = error
        self._noticed.set()
        self._closing.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(5)

    # The thread.

    def _run(self) -> None:
        decode = msgspec.msgpack.Decoder(ToLeader).decode
        interval, due = heartbeat_seconds(self._config.rank_timeout), 0.0
        with contextlib.closing(self._socket), contextlib.suppress(zmq.ContextTerminated):
            while not self._closing.is_set():
                while self._socket.poll(POLL_MS):
                    identity, data = self._socket.recv_multipart()
                    try:
                        message = decode(data)
                    except msgspec.MsgspecError:
                        logger.warning("rank 0 ignored a message that no rank could have sent")
                        continue
                    with self._changed:
                        self._hear(identity, message)
                        self._changed.notify_all()
                self._now = self._clock.now()
                if self._now >= due:
                    self._tell(Beat())
                    due = self._now + interval
                with self._changed:
                    reason = self._look() if self._reason is None else None
                    if reason is not None and not self._closing.is_set():
                        self._end_engine(reason)
                if self._reason is not None:
                    self._after_the_end()
                    break
            self._tell_the_end(self._reason or self._error)
        self._context.destroy(linger=LINGER_MS)

    def _tell(self, message: FromLeader, *identities: bytes) -> None:
        """Send a message to these processes; by default to all that have joined."""
        data = msgspec.msgpack.encode(message)
        for identity in identities or self._identities:
            self._socket.send_multipart([identity, data])

    def _tell_the_end(self, reason: str) -> None:
        """Tell all processes why the engine ends, also those of other hosts that are only about to join."""
        self._tell(End(reason))
        expected = self._config.tensor_parallel_size - 1 + self._config.nnodes - 1
        deadline = time.monotonic() + LATE_SECONDS
        while self._config.nnodes > 1 and len(self._identities) < expected and time.monotonic() < deadline:
            if self._socket.poll(POLL_MS):
                identity, _ = self._socket.recv_multipart()
                if identity not in self._identities:
                    self._identities[identity] = -1
                    self._tell(End(reason), identity)

    def _hear(self, identity: bytes, message: ToLeader) -> None:
        if isinstance(message, Hello):
            self._greet(identity, message)
        elif (sender := self._identities.get(identity)) is not None:
            self._peers.hear(sender, message, self._clock.now())

    def _greet(self, identity: bytes, hello: Hello) -> None:
        """Admit a process, or refuse it."""
        who = f"rank {hello.rank}" if hello.rank >= 0 else f"node {hello.config.node_rank}"
        who += f" (pid {hello.pid}, {hello.host})"
        if self._peers.complete():  # such as one that a service manager restarted
            logger.warning("%s was sent away: the engine has all its ranks", who)
            refusal = "the engine has all its ranks already; end it before you start its nodes again"
            self._tell(End(refusal), identity)
            return
        self._identities[identity] = hello.rank
        if (reason := self._peers.why_not(hello)) is not None:
            self._end_engine(f"{who} cannot take part: {reason}")
            return
        self._peers.greet(hello, self._clock.now())
        self._tell(self._welcome, identity)
        if hello.config.node_rank:
            logger.info("%s has joined", who)

    def _look(self) -> str | None:
        """Why the engine cannot go on, if so. Finding out may itself fail: a failed device cannot be queried."""
        try:
            return self._peers.failure(self._now) or self._hanging()
        except Exception as error:
            logger.exception("the watch failed")
            return f"{self._peers.leader} failed: {type(error).__name__}: {error}"

    def _hanging(self) -> str | None:
        """Which ranks are behind in a pass that makes no progress, if there is one."""
        own = self._entered()
        if self._finished() or (self._passes, own) != self._last_progress:
            self._last_progress, self._progress_at = (self._passes, own), self._now
            return None
        waited = self._now - self._progress_at
        return self._peers.who_hangs(self._passes, own, waited) if waited > self._config.rank_timeout else None

    def _end_engine(self, reason: str) -> None:
        """End the engine; the caller holds `_changed`."""
        logger.error("the engine ends: %s", reason)
        self._reason = reason
        self._changed.notify_all()

    def _after_the_end(self) -> None:
        """Tell and kill the ranks, and end this process if the main thread is stuck."""
        self._tell_the_end(self._reason or "")
        self._peers.kill()
        self._abort()
        if self._last_words is None:
            return
        for event, seconds in ((self._noticed, LAST_WORDS_SECONDS), (self._closing, TEARDOWN_SECONDS)):
            if not event.wait(seconds):
                self._last_words(self._reason or "")
