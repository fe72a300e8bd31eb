"""The scheduler without a model: whatever arrives, ends and is aborted, and however few blocks there are."""

from dataclasses import dataclass, field
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.engine.config import SchedulingPolicy
from pilotfish.engine.draft import Draft
from pilotfish.engine.memory.block_pool import BlockPool
from pilotfish.engine.memory.block_table import BlockTable
from pilotfish.engine.pace import PrefillPace
from pilotfish.engine.params import SamplingParams
from pilotfish.engine.request import Request
from pilotfish.engine.scheduler import Scheduler
from pilotfish.engine.sequence import Sequence
from pilotfish.engine.shares import QUANTUM, Shares

BLOCK = 4


@dataclass
class World:
    """Runs plans as the engine does, with made-up tokens; checks each plan."""

    num_blocks: int
    max_num_seqs: int
    budget: int
    prefix_caching: bool = True
    pace: PrefillPace | None = None
    policy: SchedulingPolicy = "fair"
    ended: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pool = BlockPool(self.num_blocks, BLOCK, self.prefix_caching)
        self.scheduler = Scheduler(self.pool, self.max_num_seqs, self.budget, self.pace, Shares(self.policy))
        self.sequences: dict[str, Sequence] = {}
        self.arrived = 0

    def add(self, prompt: int, answer: int, **whose: Any) -> Sequence:
        room = self.num_blocks * BLOCK
        prompt = min(prompt, room - 1)
        params = SamplingParams(max_tokens=max(1, min(answer, room - prompt)))
        identity = str(self.arrived)
        self.arrived += 1
        request = Request(id=identity, prompt_ids=tuple(i % 3 for i in range(prompt)), params=params, **whose)
        sequence = Sequence(request, 0, BlockTable(self.pool))
        self.sequences[identity] = sequence
        self.scheduler.add(sequence)
        return sequence

    def end(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        del self.sequences[sequence.id]
        self.ended.append(sequence.id)

    def step(self, draft: int, accept: int) -> None:
        scheduler = self.scheduler
        scheduler.arrange()
        decoding = scheduler.decoding()
        before = {s.id: (len(s.tokens), s.computed) for s in self.sequences.values()}
        drafts = {}
        for sequence in decoding:
            left = sequence.params.max_tokens - sequence.output_len - 1
            if min(draft, left) > 0:
                drafts[sequence] = Draft((1,) * min(draft, left))
        plan = scheduler.plan(drafts)
        self.check(plan, decoding, before)
        for planned in plan.spans:
            sequence = planned.sequence
            if planned.draws:
                scheduler.shares.served(sequence, 1)
                sequence.tokens.extend([1] * (min(accept, len(planned.draft.tokens)) + 1))
                sequence.computed = len(sequence.tokens) - 1
            else:
                sequence.computed = planned.stop
            sequence.blocks.commit(sequence.tokens, sequence.computed)
            if sequence.output_len >= sequence.params.max_tokens:
                self.end(sequence)

    def check(self, plan, decoding, before) -> None:
        assert plan.rows <= self.budget
        planned = [span.sequence for span in plan.spans]
        assert len(set(map(id, planned))) == len(planned)
        assert len(self.scheduler.running) <= self.max_num_seqs
        # Whoever decodes gets its row in every step, whatever prompts there are, unless it was preempted.
        for sequence in decoding:
            assert sequence in planned or sequence in self.scheduler.waiting
        # The first of all is never the one to go without, except that it may wait for the memory of its equals.
        if self.sequences:
            first = min(self.sequences.values(), key=lambda s: s.place)
            assert first in planned or (self.scheduler.shares.differ and first in self.scheduler.waiting and planned)
        for span in plan.spans:
            sequence = span.sequence
            assert span.start == sequence.computed
            assert span.stop > span.start
            assert len(sequence.blocks.blocks) * BLOCK >= span.stop
            assert span.draws == (span.stop >= len(sequence.tokens))
            assert span.stop <= len(sequence.tokens) + len(span.draft.tokens)
        running, waiting = [[s.place for s in each] for each in (self.scheduler.running, self.scheduler.waiting)]
        assert (running, waiting) == (sorted(running), sorted(waiting))
        if self.scheduler.shares.differ:
            return
        ages = [int(sequence.id) for sequence in (*self.scheduler.running, *self.scheduler.waiting)]
        assert ages == sorted(ages)  # nobody overtakes
        if plan.preemptions:
            assert not plan.admitted


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 60), st.integers(1, 40)),
        st.tuples(st.just("step"), st.integers(0, 6), st.integers(0, 6)),
        st.tuples(st.just("abort"), st.integers(0, 10), st.just(0)),
    ),
    max_size=60,
)
WHOSE = st.fixed_dictionaries(
    {
        "tenant": st.sampled_from("ab"),
        "weight": st.sampled_from([1.0, 3.0]),
        "user": st.sampled_from("xyz"),
        "priority": st.integers(-1, 1),
    }
)
ANYONE: dict[str, Any] = {}


@settings(max_examples=150)
@given(
    EVENTS,
    st.integers(2, 30),
    st.integers(1, 6),
    st.integers(0, 20),
    st.booleans(),
    st.sampled_from([0.0, 0.01, 0.1]),
    st.sampled_from(["fair", "priority", "fcfs"]),
    st.lists(WHOSE, max_size=8),
)
def test_everything_ends_once_and_nothing_leaks(
    events, num_blocks, max_num_seqs, extra, prefix_caching, bound, policy, whose
) -> None:
    pace = PrefillPace(bound)
    pace.observe(16, 136, True, 0.05)
    world = World(num_blocks, max_num_seqs, max_num_seqs + extra, prefix_caching, pace, policy)
    for i, (what, first, second) in enumerate(events):
        if what == "add":
            world.add(first, second, **(whose[i % len(whose)] if whose else ANYONE))
        elif what == "step":
            world.step(first, second)
        elif world.sequences:
            world.end(list(world.sequences.values())[first % len(world.sequences)])
    for _ in range(40_000):
        if not world.sequences:
            break
        world.step(2, 1)
    assert not world.sequences  # no deadlock, no livelock
    assert sorted(map(int, world.ended)) == list(range(world.arrived))
    assert world.pool.used == 0
    assert world.pool.available == num_blocks


def test_a_long_prompt_takes_what_decoding_leaves() -> None:
    """Beside 7 streams a long prompt is read in chunks of the rest of the budget, and the streams miss no step."""
    world = World(num_blocks=1000, max_num_seqs=8, budget=32)
    for _ in range(7):
        world.add(4, 500)
    world.step(0, 0)
    streams = list(world.sequences.values())
    world.add(600, 5)
    long = list(world.sequences.values())[-1]
    steps = 0
    while long.computed < 599:
        before = [len(stream.tokens) for stream in streams]
        world.step(0, 0)
        steps += 1
        assert [len(stream.tokens) for stream in streams] == [count + 1 for count in before]
    assert steps == -(-600 // (32 - 7))


def test_drafts_leave_room_for_prompts() -> None:
    world = World(num_blocks=1000, max_num_seqs=8, budget=40)
    for _ in range(7):
        world.add(4, 500)
    world.step(0, 0)
    world.add(600, 5)
    long = list(world.sequences.values())[-1]
    world.step(8, 8)
    assert long.computed >= (40 - 7) // 2


# Shares.


def running(world: World, **whose: Any) -> int:
    """How many sequences run that are whose."""
    return sum(
        all(getattr(sequence.request, name) == value for name, value in whose.items())
        for sequence in world.scheduler.running
    )


def test_who_has_just_come_runs_at_once() -> None:
    """Though another has four times as many sequences as may run. The one that is paused keeps what it has computed."""
    world = World(num_blocks=1000, max_num_seqs=8, budget=64)
    for _ in range(32):
        world.add(4, 200, user="hog")
    for _ in range(5):
        world.step(0, 0)
    newcomer = world.add(4, 3, user="other")
    world.step(0, 0)
    assert newcomer.output_len == 1
    assert (running(world, user="hog"), running(world, user="other")) == (7, 1)
    (paused,) = [s for s in world.scheduler.waiting if s.computed]
    kept, blocks = len(paused.tokens), list(paused.blocks.blocks)
    assert paused.id == "7"  # the last that came
    world.step(0, 0)
    world.step(0, 0)
    assert world.ended == [newcomer.id]
    assert (len(paused.tokens), list(paused.blocks.blocks)) == (kept, blocks)
    world.step(0, 0)
    assert (len(paused.tokens), paused.preemptions) == (kept + 1, 0)


def test_under_fcfs_it_waits() -> None:
    world = World(num_blocks=1000, max_num_seqs=2, budget=64, policy="fcfs")
    for _ in range(3):
        world.add(4, 50, user="hog")
    newcomer = world.add(4, 3, user="other")
    for _ in range(40):
        world.step(0, 0)
    assert newcomer.output_len == 0


def test_tenants_share_by_weight_and_their_users_equally() -> None:
    world = World(num_blocks=1000, max_num_seqs=12, budget=256)
    for i in range(60):
        user = "one" if i % 20 else "two"
        world.add(4, 500, tenant="light", user=user)
        world.add(4, 500, tenant="heavy", weight=3.0, user=user)
    for _ in range(20):
        world.step(0, 0)
    assert [running(world, tenant=tenant) for tenant in ("light", "heavy")] == [3, 9]
    assert sorted(running(world, tenant="heavy", user=user) for user in ("one", "two")) == [3, 6]  # all that two has


def test_more_users_than_places_take_turns() -> None:
    """By tokens, so that one with long answers does not keep the others out."""
    world = World(num_blocks=10_000, max_num_seqs=2, budget=64)
    sequences = [world.add(4, 4000, user=str(i)) for i in range(6)]
    for _ in range(3 * 2000):
        world.step(0, 0)
    lengths = [sequence.output_len for sequence in sequences]
    assert min(lengths) > 1000
    assert max(lengths) - min(lengths) <= 2 * QUANTUM
    assert sum(sequence.preemptions for sequence in sequences) == 0


def test_a_short_prompt_does_not_wait_for_long_ones_of_another() -> None:
    world = World(num_blocks=10_000, max_num_seqs=8, budget=64)
    for _ in range(6):
        world.add(3000, 5, user="hog")
    for _ in range(10):
        world.step(0, 0)
    newcomer = world.add(20, 5, user="other")
    world.step(0, 0)
    assert newcomer.output_len == 1


def test_who_has_more_than_its_share_of_the_memory_makes_room() -> None:
    world = World(num_blocks=40, max_num_seqs=8, budget=64, prefix_caching=False)
    for _ in range(5):
        world.add(28, 60, user="hog")
    for _ in range(3):
        world.step(0, 0)
    newcomer = world.add(20, 3, user="other")
    for _ in range(2):
        world.step(0, 0)
    assert newcomer.output_len > 0
    assert all(world.sequences[str(i)].preemptions == 0 for i in range(3))


def test_what_is_paused_is_the_first_to_lose_its_memory() -> None:
    world = World(num_blocks=24, max_num_seqs=2, budget=64, prefix_caching=False)
    first, second = (world.add(20, 70, user="hog") for _ in range(2))
    world.step(0, 0)
    newcomer = world.add(20, 20, user="other")
    world.step(0, 0)
    assert (second in world.scheduler.waiting, second.computed) == (True, 20)
    while newcomer.id not in world.ended:
        world.step(0, 0)
    while second.id not in world.ended:
        world.step(0, 0)
    assert (first.preemptions, newcomer.preemptions) == (0, 0)


def test_lower_priorities_go_first_within_a_tenant() -> None:
    world = World(num_blocks=1000, max_num_seqs=4, budget=64)
    for _ in range(8):
        world.add(4, 100, tenant="a", priority=1)
        world.add(4, 100, tenant="b", priority=5)
    for _ in range(4):
        world.step(0, 0)
    urgent = [world.add(4, 100, tenant="b", priority=-1) for _ in range(6)]
    world.step(0, 0)
    world.step(0, 0)
    assert [running(world, tenant=tenant) for tenant in "ab"] == [2, 2]
    assert running(world, tenant="b", priority=-1) == 2
    assert [sequence.output_len > 0 for sequence in urgent] == [True] * 2 + [False] * 4


def test_under_priority_all_are_one_tenant() -> None:
    world = World(num_blocks=1000, max_num_seqs=2, budget=64, policy="priority")
    for _ in range(4):
        world.add(4, 100, tenant="a", priority=1)
    world.step(0, 0)
    urgent = [world.add(4, 100, tenant="b") for _ in range(2)]
    world.step(0, 0)
    assert world.scheduler.running == urgent


def test_nobody_saves_up_what_it_did_not_use() -> None:
    """Who comes late is ahead by a quantum, not by all that the others were served meanwhile."""
    world = World(num_blocks=10_000, max_num_seqs=1, budget=64)
    first = world.add(4, 8000, user="early")
    for _ in range(2000):
        world.step(0, 0)
    late = world.add(4, 8000, user="late")
    before = first.output_len
    for _ in range(3000):
        world.step(0, 0)
    assert abs(late.output_len - (first.output_len - before)) <= 3 * QUANTUM
