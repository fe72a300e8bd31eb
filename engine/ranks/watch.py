"""Watch: rank 0's thread that hears the other ranks, and ends the engine, with the culprit's name, when one of them
ends, falls silent or hangs. No torch. Starting the ranks and giving them passes is `engine.ranks.lead`'s.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket as sockets
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec
import zmq

from pilotfish.engine.config import EngineConfig
from pilotfish.engine.process.child import PatientClock, beat_seconds, how_it_ended
from pilotfish.engine.ranks.control_messages import (
    Beat,
    Died,
    End,
    FromLead,
    Hello,
    RankFailed,
    RankLoading,
    ToLead,
    Welcome,
    ranks_of,
)
from pilotfish.engine.ranks.link import JOIN_SECONDS
from pilotfish.engine.request import RankMemory
from pilotfish.errors import RankError

logger = logging.getLogger(__name__)

POLL_MS = 50
CONSEQUENCE_SECONDS = 2.0
"""So long may the cause of a failed collective take to show, before the failure itself counts as the cause."""
EXIT_SECONDS = 0.3
"""So long may the reason take to arrive of a process that ended by itself."""
LAST_WORDS_SECONDS = 2.0
"""So long may the main thread take to notice that the engine has failed, before its words are said for it."""
TEARDOWN_SECONDS = 15.0
"""So long may it take to end the process once it has."""
LATE_SECONDS = 2.0
"""So long are processes of other hosts waited for that have not come when the engine ends at its start."""
LINGER_MS = 500

LastWords = Callable[[str], None]
Answer = TypeVar("Answer", bound=msgspec.Struct)

OWN = frozenset({"node_rank", "num_threads", "master_addr", "seed"})
"""Settings in which hosts may differ."""


@dataclass(slots=True)
class Peer:
    """Another rank, as rank 0 knows it."""

    rank: int
    process: subprocess.Popen[bytes] | None = None
    """Of this host's ranks alone; others have a parent on their own host."""
    host: str = ""
    pid: int | None = None
    heard: float | None = None
    beat: Beat = field(default_factory=Beat)
    loading: dict[str, float] = field(default_factory=dict)
    """Share that is done, by what is being done."""
    answers: dict[type, msgspec.Struct] = field(default_factory=dict)
    exit: int | None = None
    exited: float = 0.0
    failure: RankFailed | None = None
    failed: float = 0.0

    @property
    def name(self) -> str:
        known = ", ".join(part for part in (f"pid {self.pid}" if self.pid else "", self.host) if part)
        return f"rank {self.rank} ({known})" if known else f"rank {self.rank}"


class Watch:
    """Watches from when it is made until `close`. `endpoint`: where it listens, as for zmq's bind. `welcome` answers
    each process that comes. `abort` lets a collective fail that the main thread waits in. `last_words`, if there are
    any, tell the client and end this process. Raises zmq.ZMQError if it cannot listen there.

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
        self._host = sockets.gethostname()
        self._peers = [Peer(rank) for rank in range(1, config.tensor_parallel_size)]
        self._identities: dict[bytes, int] = {}
        self._nodes: set[int] = set()
        """Hosts whose process that holds their ranks has come."""
        self._changed = threading.Condition()
        self._reason: str | None = None
        self._error = ""
        """What `close` was given."""
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

    # What the main thread says and asks.

    def adopt(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        """`process` is a rank of this host."""
        peer = self._peers[rank - 1]
        peer.host, peer.pid, peer.process = self._host, process.pid, process

    def counts(self, entered: Callable[[], int]) -> None:
        """`entered` tells how many collectives rank 0 has entered."""
        self._entered = entered

    def begin(self) -> None:
        """Rank 0 begins something that all ranks do together. Raises RankError if the engine has failed."""
        self.check()
        self._finished = lambda: False

    def begin_pass(self) -> int:
        """As `begin`, of a pass, whose number it returns."""
        self.begin()
        self._passes += 1
        return self._passes

    def end(self, finished: Callable[[], bool]) -> None:
        """It has done its part, or has given it to its device: `finished` tells when that is through."""
        self._finished = finished

    def check(self) -> None:
        """Raise RankError if the engine has failed."""
        if self._reason is not None:
            self._noticed.set()
            raise RankError(self._reason)

    def fail(self, reason: str) -> None:
        """Let the engine end for a reason that rank 0 knows itself."""
        with self._changed:
            if self._reason is None and not self._closing.is_set():
                self._end_engine(reason)

    def why(self, seconds: float = CONSEQUENCE_SECONDS + 1) -> RankError:
        """The cause, once it is known, of a collective of rank 0's that failed."""
        with self._changed:
            self._changed.wait_for(lambda: self._reason is not None, seconds)
        self._noticed.set()
        return RankError(
            self._reason or "rank 0 could not complete a collective; no other rank is known to have failed"
        )

    def wait_for(self, kind: type[Answer], tell: Callable[[], None] = lambda: None) -> list[Answer]:
        """Wait for a message of this kind from each rank, and return them by rank, from 1 on. `tell` is called now and
        then. Raises RankError if a rank ends instead."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._reason is not None or self._answered(kind), 0.2)
                self.check()
                if self._answered(kind):
                    return [peer.answers[kind] for peer in self._peers]  # type: ignore[misc]
            tell()

    def slowest(self, what: str, own: float) -> float:
        """The least share of `what` that is done on any rank that does it, rank 0's own included."""
        with self._changed:
            return min([own, *(peer.loading[what] for peer in self._peers if what in peer.loading)])

    def waited_for(self, kind: type[msgspec.Struct]) -> str:
        """The ranks that have not sent a message of this kind yet, and what they are at."""
        with self._changed:
            late = [peer for peer in self._peers if kind not in peer.answers]
            doing = {next(reversed(peer.loading.items())) for peer in late if peer.loading}
        ranks = ", ".join(str(peer.rank) for peer in late)
        at = "; ".join(f"{what}: {share:.0%}" for what, share in sorted(doing))
        return f"{'rank' if len(late) == 1 else 'ranks'} {ranks}" + (f" ({at})" if at else "")

    def memory(self) -> tuple[RankMemory, ...]:
        """The last reading of each rank above 0 that has sent one."""
        return tuple(peer.beat.memory for peer in self._peers if peer.beat.memory is not None)

    def close(self, error: str = "") -> None:
        """Watch no more: ranks may end now. They are told why, if the engine was not just stopped."""
        self._error = error
        self._noticed.set()
        self._closing.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(5)

    # The thread.

    def _run(self) -> None:
        decode = msgspec.msgpack.Decoder(ToLead).decode
        interval, due = beat_seconds(self._config.rank_timeout), 0.0
        with contextlib.closing(self._socket), contextlib.suppress(zmq.ContextTerminated):
            while not self._closing.is_set():
                while self._socket.poll(POLL_MS):
                    identity, data = self._socket.recv_multipart()
                    try:
                        message = decode(data)
                    except msgspec.MsgspecError:
                        logger.warning("something that is no rank speaks to rank 0; it was not listened to")
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

    def _tell(self, message: FromLead) -> None:
        data = msgspec.msgpack.encode(message)
        for identity in self._identities:
            self._socket.send_multipart([identity, data])

    def _tell_the_end(self, reason: str) -> None:
        """Tell everyone why the engine ends; those, too, that are only on their way here from another host."""
        self._tell(End(reason))
        expected = self._config.tensor_parallel_size - 1 + self._config.nnodes - 1
        deadline = time.monotonic() + LATE_SECONDS
        while self._config.nnodes > 1 and len(self._identities) < expected and time.monotonic() < deadline:
            if self._socket.poll(POLL_MS):
                identity, _ = self._socket.recv_multipart()
                if identity not in self._identities:
                    self._identities[identity] = -1
                    self._socket.send_multipart([identity, msgspec.msgpack.encode(End(reason))])

    def _hear(self, identity: bytes, message: ToLead) -> None:
        if isinstance(message, Hello):
            self._greet(identity, message)
            return
        rank = self._identities.get(identity)
        if rank is None:
            return
        if isinstance(message, Died):
            rank = message.rank
        if not 1 <= rank <= len(self._peers):
            return
        peer = self._peers[rank - 1]
        match message:
            case Died(code=code):
                if code:  # 0: it was told to end
                    peer.exit, peer.exited = code, self._now
                return
            case Beat():
                peer.beat = message if message.memory else msgspec.structs.replace(message, memory=peer.beat.memory)
            case RankLoading(what=what, share=share):
                peer.loading[what] = share
            case RankFailed():
                peer.failure, peer.failed = message, self._now
            case _:
                peer.answers[type(message)] = message
        peer.heard = self._clock.now()

    def _greet(self, identity: bytes, hello: Hello) -> None:
        """Take a process in, or refuse it for settings that differ from rank 0's."""
        who = f"rank {hello.rank}" if hello.rank >= 0 else f"node {hello.config.node_rank}"
        who += f" (pid {hello.pid}, {hello.host})"
        if self._complete():  # as one that a service manager started once more
            logger.warning("%s was sent away: the engine has all its ranks", who)
            refusal = End("the engine has all its ranks already; end it before you start its nodes once more")
            self._socket.send_multipart([identity, msgspec.msgpack.encode(refusal)])
            return
        self._identities[identity] = hello.rank
        if (reason := self._why_not(hello)) is not None:
            self._end_engine(f"{who} cannot take part: {reason}")
            return
        if hello.rank < 0:
            self._nodes.add(hello.config.node_rank)
        else:
            peer = self._peers[hello.rank - 1]
            peer.host, peer.pid, peer.heard = hello.host, hello.pid, self._clock.now()
        self._socket.send_multipart([identity, msgspec.msgpack.encode(self._welcome)])
        if hello.config.node_rank:
            logger.info("%s has come", who)

    def _complete(self) -> bool:
        """Everyone has come that is expected."""
        return len(self._nodes) == self._config.nnodes - 1 and all(peer.heard is not None for peer in self._peers)

    def _why_not(self, hello: Hello) -> str | None:
        ours, theirs = msgspec.structs.asdict(self._config), msgspec.structs.asdict(hello.config)
        different = [name for name in ours if name not in OWN and ours[name] != theirs[name]]
        if different:
            listed = ", ".join(f"{name} is {theirs[name]!r} there and {ours[name]!r} on rank 0" for name in different)
            return f"{listed}; start the same command on each host, but for node_rank"
        if hello.rank >= 0 and (hello.rank == 0 or hello.rank not in ranks_of(hello.config)):
            return "its rank does not belong to its host"
        if hello.rank < 0 and hello.config.node_rank in {0, *self._nodes}:
            return f"another host is node {hello.config.node_rank}"
        if hello.rank >= 1 and self._peers[hello.rank - 1].heard is not None:
            return f"{self._peers[hello.rank - 1].name} is there already"
        return None

    def _answered(self, kind: type[msgspec.Struct]) -> bool:
        return all(kind in peer.answers for peer in self._peers)

    def _look(self) -> str | None:
        """As `_cause`, which may itself fail: a device that has failed can no longer be asked how far it is."""
        try:
            return self._cause()
        except Exception as error:
            logger.exception("the watch failed")
            return f"rank 0 (pid {os.getpid()}, {self._host}) failed: {type(error).__name__}: {error}"

    def _cause(self) -> str | None:
        """Why the engine cannot go on, if so; the causes that explain the others first."""
        for peer in self._peers:
            if peer.exit is None and peer.process is not None:
                peer.exit, peer.exited = peer.process.poll(), self._now
        for peer in self._peers:
            if peer.failure is not None and not peer.failure.consequence:
                return f"{peer.name} failed: {peer.failure.error}"
            if peer.exit is not None and peer.failure is None:
                late = self._now - peer.exited > EXIT_SECONDS
                if peer.exit < 0 or late:
                    return f"{peer.name} {how_it_ended(peer.exit)}"
        timeout = self._config.rank_timeout
        for peer in self._peers:
            if peer.heard is None and self._now > JOIN_SECONDS:
                return f"{peer.name} has not come within {self._now:.0f} s"
            if peer.heard is not None and self._now - peer.heard > timeout:
                return f"{peer.name} was silent for {self._now - peer.heard:.0f} s: it is stopped, or cannot be reached"
        for peer in self._peers:
            if peer.failure is not None and self._now - peer.failed > CONSEQUENCE_SECONDS:
                return f"{peer.name} failed: {peer.failure.error}"
        return self._hanging(timeout)

    def _hanging(self, timeout: float) -> str | None:
        """Who is behind in a pass that does not end."""
        own = self._entered()
        if self._finished() or (self._passes, own) != self._last_progress:
            self._last_progress, self._progress_at = (self._passes, own), self._now
            return None
        waited = self._now - self._progress_at
        if waited <= timeout:
            return None
        entered = {f"rank 0 (pid {os.getpid()}, {self._host})": own}
        entered |= {peer.name: peer.beat.collectives for peer in self._peers}
        least, most = min(entered.values()), max(entered.values())
        if least == most:
            return (
                f"pass {self._passes} has not ended in {waited:.0f} s, and no rank is behind: a device or a link hangs"
            )
        names = " and ".join(name for name, count in entered.items() if count == least)
        return (
            f"{names} hung in pass {self._passes} for {waited:.0f} s: it has entered {least} collectives, others "
            f"{most}, and wait for it"
        )

    def _end_engine(self, reason: str) -> None:
        """`_changed` is held."""
        logger.error("the engine ends: %s", reason)
        self._reason = reason
        self._changed.notify_all()

    def _after_the_end(self) -> None:
        """Nothing is left running, and the main thread does not stay stuck."""
        self._tell_the_end(self._reason or "")
        for peer in self._peers:
            if peer.process is not None and peer.process.poll() is None:
                peer.process.kill()
        self._abort()
        if self._last_words is None:
            return
        for event, seconds in ((self._noticed, LAST_WORDS_SECONDS), (self._closing, TEARDOWN_SECONDS)):
            if not event.wait(seconds):
                self._last_words(self._reason or "")
