"""Peers: what the leader knows of the other ranks: which have joined, what each has sent, and which has failed. No
sockets, no threads, no torch: `watch` has those."""

from __future__ import annotations

import os
import socket
import subprocess
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec

from pilotfish.engine.child_process import how_it_ended
from pilotfish.engine.config import EngineConfig
from pilotfish.engine.memory.usage import RankMemory
from pilotfish.engine.ranks.link import JOIN_SECONDS
from pilotfish.engine.ranks.topology import ranks_of
from pilotfish.engine.ranks.wire import Beat, Died, Hello, Prepared, RankFailed, RankLoading, ToLeader

CONSEQUENCE_SECONDS = 2.0
"""How long the cause of a failed collective may take to appear before the failure itself counts as the cause."""
EXIT_SECONDS = 0.3
"""How long the reason of a process that ended by itself may take to arrive."""
HOST_SETTINGS = frozenset({"node_rank", "num_threads", "master_addr", "seed"})
"""Settings in which hosts may differ."""

Answer = TypeVar("Answer", bound=msgspec.Struct)


@dataclass(slots=True)
class Peer:
    """Another rank. Times are those of the watch's clock."""

    rank: int
    process: subprocess.Popen[bytes] | None = None
    """The rank's process if it runs on this host; others have a parent on their own host."""
    host: str = ""
    pid: int | None = None
    heard: float | None = None
    beat: Beat = field(default_factory=Beat)
    loading: dict[str, float] = field(default_factory=dict)
    """Progress (0 to 1) by activity."""
    answers: dict[type, msgspec.Struct] = field(default_factory=dict)
    exit: int | None = None
    exited: float = 0.0
    failure: RankFailed | None = None
    failed: float = 0.0

    @property
    def name(self) -> str:
        known = ", ".join(part for part in (f"pid {self.pid}" if self.pid else "", self.host) if part)
        return f"rank {self.rank} ({known})" if known else f"rank {self.rank}"


class Peers:
    """All ranks but the leader. Only one thread at a time may use it."""

    def __init__(self, config: EngineConfig) -> None:
        self.leader = f"rank 0 (pid {os.getpid()}, {socket.gethostname()})"
        self._config = config
        self._ranks = [Peer(rank) for rank in range(1, config.tensor_parallel_size)]
        self._nodes: set[int] = set()
        """Hosts whose parent process has joined."""

    def adopt(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        """Note that `process` is a rank of this host."""
        peer = self._ranks[rank - 1]
        peer.host, peer.pid, peer.process = socket.gethostname(), process.pid, process

    def kill(self) -> None:
        """Kill the ranks of this host that still run."""
        for peer in self._ranks:
            if peer.process is not None and peer.process.poll() is None:
                peer.process.kill()

    # Messages.

    def complete(self) -> bool:
        """Whether all expected processes have joined."""
        return len(self._nodes) == self._config.nnodes - 1 and all(peer.heard is not None for peer in self._ranks)

    def why_not(self, hello: Hello) -> str | None:
        """Why a process cannot join, if so: most often because its settings differ from the leader's."""
        ours, theirs = msgspec.structs.asdict(self._config), msgspec.structs.asdict(hello.config)
        different = [name for name in ours if name not in HOST_SETTINGS and ours[name] != theirs[name]]
        if different:
            listed = ", ".join(f"{name} is {theirs[name]!r} there and {ours[name]!r} on rank 0" for name in different)
            return f"{listed}; start the same command on each host, but for node_rank"
        if hello.rank >= 0 and (hello.rank == 0 or hello.rank not in ranks_of(hello.config)):
            return "its rank does not belong to its host"
        if hello.rank < 0 and hello.config.node_rank in {0, *self._nodes}:
            return f"another host is node {hello.config.node_rank}"
        if hello.rank >= 1 and self._ranks[hello.rank - 1].heard is not None:
            return f"{self._ranks[hello.rank - 1].name} is there already"
        return None

    def greet(self, hello: Hello, now: float) -> None:
        """Admit a process that `why_not` has nothing against."""
        if hello.rank < 0:
            self._nodes.add(hello.config.node_rank)
        else:
            peer = self._ranks[hello.rank - 1]
            peer.host, peer.pid, peer.heard = hello.host, hello.pid, now

    def hear(self, sender: int, message: ToLeader, now: float) -> None:
        """Note a message from rank `sender`, or -1 for a host's parent process."""
        rank = message.rank if isinstance(message, Died) else sender
        if not 1 <= rank <= len(self._ranks):
            return
        peer = self._ranks[rank - 1]
        match message:
            case Died(code=code):
                if code:  # 0: it was told to end
                    peer.exit, peer.exited = code, now
                return
            case Beat():
                peer.beat = message if message.memory else msgspec.structs.replace(message, memory=peer.beat.memory)
            case RankLoading(what=what, share=share):
                peer.loading[what] = share
            case RankFailed():
                peer.failure, peer.failed = message, now
            case _:
                peer.answers[type(message)] = message
                if isinstance(message, Prepared):
                    peer.beat = msgspec.structs.replace(peer.beat, memory=message.memory)
        peer.heard = now

    def answers(self, kind: type[Answer]) -> list[Answer] | None:
        """The message of this kind from each rank, by rank from 1 on; None until all have sent it."""
        if not all(kind in peer.answers for peer in self._ranks):
            return None
        return [peer.answers[kind] for peer in self._ranks]  # type: ignore[misc]

    def waited_for(self, kind: type[msgspec.Struct]) -> str:
        """The ranks that have not sent a message of this kind yet, and their progress."""
        late = [peer for peer in self._ranks if kind not in peer.answers]
        doing = {next(reversed(peer.loading.items())) for peer in late if peer.loading}
        ranks = ", ".join(str(peer.rank) for peer in late)
        at = "; ".join(f"{what}: {share:.0%}" for what, share in sorted(doing))
        return f"{'rank' if len(late) == 1 else 'ranks'} {ranks}" + (f" ({at})" if at else "")

    def slowest(self, what: str, own: float) -> float:
        """The least progress with `what` of any rank that is at it; `own` is the leader's."""
        return min([own, *(peer.loading[what] for peer in self._ranks if what in peer.loading)])

    def memory(self) -> tuple[RankMemory, ...]:
        """The last reading of each rank that has sent one."""
        return tuple(peer.beat.memory for peer in self._ranks if peer.beat.memory is not None)

    # Failures.

    def failure(self, now: float) -> str | None:
        """Why the engine cannot go on, if so: the root cause of several failures."""
        for peer in self._ranks:
            if peer.exit is None and peer.process is not None:
                peer.exit, peer.exited = peer.process.poll(), now
        for peer in self._ranks:
            if peer.failure is not None and not peer.failure.consequence:
                return f"{peer.name} failed: {peer.failure.error}"
            if peer.exit is not None and peer.failure is None:
                late = now - peer.exited > EXIT_SECONDS
                if peer.exit < 0 or late:
                    return f"{peer.name} {how_it_ended(peer.exit)}"
        for peer in self._ranks:
            if peer.heard is None and now > JOIN_SECONDS:
                return f"{peer.name} has not joined within {now:.0f} s"
            if peer.heard is not None and now - peer.heard > self._config.rank_timeout:
                return f"{peer.name} was silent for {now - peer.heard:.0f} s: it is stopped, or cannot be reached"
        for peer in self._ranks:
            if peer.failure is not None and now - peer.failed > CONSEQUENCE_SECONDS:
                return f"{peer.name} failed: {peer.failure.error}"
        return None

    def who_hangs(self, number: int, own: int, waited: float) -> str:
        """Describe the ranks that are behind in pass `number` after `waited` seconds without progress; `own` is the
        number of collectives that the leader has entered."""
        entered = {self.leader: own} | {peer.name: peer.beat.collectives for peer in self._ranks}
        least, most = min(entered.values()), max(entered.values())
        if least == most:
            return f"pass {number} has not ended in {waited:.0f} s, and no rank is behind: a device or a link hangs"
        names = " and ".join(name for name, count in entered.items() if count == least)
        return (
            f"{names} hung in pass {number} for {waited:.0f} s: it has entered {least} collectives, others "
            f"{most}, and wait for it"
        )
