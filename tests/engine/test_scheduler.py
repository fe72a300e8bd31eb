"""The scheduler without a model: whatever arrives, ends and is aborted, and however few blocks there are."""

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.engine.draft import Draft
from pilotfish.engine.memory.block_pool import BlockPool
from pilotfish.engine.memory.block_table import BlockTable
from pilotfish.engine.pace import PrefillPace
from pilotfish.engine.params import SamplingParams
from pilotfish.engine.request import Request
from pilotfish.engine.scheduler import Scheduler
from pilotfish.engine.sequence import Sequence

BLOCK = 4


@dataclass
class World:
    """Runs plans as the engine does, with made-up tokens; checks each plan."""

    num_blocks: int
    max_num_seqs: int
    budget: int
    prefix_caching: bool = True
    pace: PrefillPace | None = None
    ended: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pool = BlockPool(self.num_blocks, BLOCK, self.prefix_caching)
        self.scheduler = Scheduler(self.pool, self.max_num_seqs, self.budget, self.pace)
        self.sequences: dict[str, Sequence] = {}
        self.arrived = 0

    def add(self, prompt: int, answer: int) -> None:
        room = self.num_blocks * BLOCK
        prompt = min(prompt, room - 1)
        params = SamplingParams(max_tokens=max(1, min(answer, room - prompt)))
        identity = str(self.arrived)
        self.arrived += 1
        request = Request(id=identity, prompt_ids=tuple(i % 3 for i in range(prompt)), params=params)
        sequence = Sequence(request, 0, BlockTable(self.pool))
        self.sequences[identity] = sequence
        self.scheduler.add(sequence)

    def end(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        del self.sequences[sequence.id]
        self.ended.append(sequence.id)

    def step(self, draft: int, accept: int) -> None:
        scheduler = self.scheduler
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
        # The oldest of all is never the one to go without.
        if self.sequences:
            oldest = min(self.sequences.values(), key=lambda s: int(s.id))
            assert oldest in planned
        for span in plan.spans:
            sequence = span.sequence
            assert span.start == sequence.computed
            assert span.stop > span.start
            assert len(sequence.blocks.blocks) * BLOCK >= span.stop
            assert span.draws == (span.stop >= len(sequence.tokens))
            assert span.stop <= len(sequence.tokens) + len(span.draft.tokens)
        ages = [int(sequence.id) for sequence in self.scheduler.running]
        assert ages == sorted(ages)
        assert [int(s.id) for s in self.scheduler.waiting] == sorted(int(s.id) for s in self.scheduler.waiting)
        if ages and self.scheduler.waiting:
            assert ages[-1] < int(self.scheduler.waiting[0].id)  # nobody overtakes
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


@settings(max_examples=150)
@given(
    EVENTS, st.integers(2, 30), st.integers(1, 6), st.integers(0, 20), st.booleans(), st.sampled_from([0.0, 0.01, 0.1])
)
def test_everything_ends_once_and_nothing_leaks(events, num_blocks, max_num_seqs, extra, prefix_caching, bound) -> None:
    pace = PrefillPace(bound)
    pace.observe(16, 136, True, 0.05)
    world = World(num_blocks, max_num_seqs, max_num_seqs + extra, prefix_caching, pace)
    for what, first, second in events:
        if what == "add":
            world.add(first, second)
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
