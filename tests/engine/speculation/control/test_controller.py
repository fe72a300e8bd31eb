"""The controller in simulated worlds (`worlds`): never below plain decoding, never far from the best fixed choice."""

from __future__ import annotations

import pytest

from pilotfish.engine.draft import Draft
from pilotfish.engine.speculation.control.candidates import Candidate, Choice, UpcomingStep
from pilotfish.engine.speculation.control.trials import FIRST_RETRY
from tests.support.worlds import (
    LONGEST,
    Cost,
    Right,
    Simulated,
    World,
    arms,
    compute_bound,
    constant,
    memory_bound,
    small_cpu,
)

WORLDS: dict[str, tuple[Cost, Right, Cost | None]] = {
    "always right": (memory_bound, constant(0.97), None),
    "never right": (memory_bound, constant(0.02), None),
    "now and then": (memory_bound, constant(0.5), None),
    "rows cost": (compute_bound, constant(0.5), None),
    "rows cost and never right": (compute_bound, constant(0.05), None),
    "sequences differ": (compute_bound, lambda sequence, step, position: (0.9, 0.1)[sequence % 2], None),
    "changes in mid-text": (memory_bound, lambda sequence, step, position: 0.9 if step % 600 < 300 else 0.05, None),
    "a good draft model": (lambda rows: 0.167, constant(0.85), lambda rows: 0.01),
    "a draft model that costs": (lambda rows: 0.167, constant(0.25), lambda rows: 0.12),
    "a draft model on two cores": (small_cpu, constant(0.8), lambda rows: 2e-3 + 0.2e-3 * rows),
    "a draft that changes in mid-text": (
        memory_bound, lambda sequence, step, position: 0.9 if step % 600 < 300 else 0.05, lambda rows: 2e-3,
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 4, 16])
@pytest.mark.parametrize("name", WORLDS)
def test_never_below_plain_and_near_the_best_length(name: str, count: int) -> None:
    cost, right, draft_cost = WORLDS[name]
    drafters = [Simulated("d", right, draft_cost)]
    fixed = arms(cost, drafters, count)
    got = World(cost, drafters).goodput(count)
    assert got >= 0.97 * fixed["", 0]
    assert got >= 0.93 * max(fixed.values())
    if max(fixed.values()) > 1.3 * fixed["", 0]:
        assert got > 1.2 * fixed["", 0]


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 4, 16])
@pytest.mark.parametrize("cost", [memory_bound, small_cpu])
def test_a_block_is_asked_for_whatever_its_length(cost: Cost, count: int) -> None:
    """A drafter whose later tokens cost nothing more: its drafts are as long as verification pays."""
    drafters = [Simulated("block", constant(0.7), lambda rows: 1.5e-3 + 0.1e-3 * rows, block=8)]
    fixed = arms(cost, drafters, count)
    got = World(cost, drafters).goodput(count)
    assert got >= 0.97 * fixed["", 0]
    assert got >= 0.93 * max(fixed.values())


def test_a_block_s_cost_does_not_depend_on_its_length() -> None:
    """Priced token by token, its drafts would be cut where they still pay."""
    world = World(memory_bound, [Simulated("block", constant(0.9), lambda rows: 4e-3, block=8)])
    sequences = [world.sequence()]
    lengths = []
    for _ in range(60):
        candidate = Candidate(sequences[0], LONGEST, backlog={"block": 9})
        step = UpcomingStep(1, 1, [candidate])
        lengths += [request.limit for request in world.controller.ask(step).get("block", ())]
        world.step(sequences)
    assert lengths
    assert max(lengths) == LONGEST
    step = UpcomingStep(1, 1, [Candidate(sequences[0], LONGEST, backlog={"block": 9})])
    forecast = world.controller._forecast
    one, all_ = (forecast.asking_seconds(step, "block", [0], length) for length in (1, LONGEST))
    assert one == all_ == pytest.approx(4e-3, rel=0.2)


@pytest.mark.slow
def test_load_that_rises_and_falls() -> None:
    """What pays at one stream does not at sixteen; what it does at sixteen must not spoil it for one."""
    drafters = [Simulated("d", constant(0.55))]
    world = World(compute_bound, drafters)
    for count in (1, 16, 1, 16, 1):
        fixed = arms(compute_bound, drafters, count)
        got = world.goodput(count, steps=600)
        assert got >= 0.97 * fixed["", 0]
        assert got >= 0.93 * max(fixed.values())


@pytest.mark.slow
def test_a_draft_that_pays_at_one_stream_alone() -> None:
    def target(rows: int) -> float:
        return 20e-3 + 2e-3 * rows

    drafters = [Simulated("d", constant(0.6), lambda rows: 1e-3 + 0.5e-3 * rows, prompt=50)]
    world = World(target, drafters)
    for count in (1, 16, 1, 16, 1):
        fixed = arms(target, drafters, count)
        assert (max(fixed.values()) > 1.2 * fixed["", 0]) == (count == 1)
        world.asked.clear()
        got = world.goodput(count)
        assert got >= 0.97 * fixed["", 0]
        assert got >= 0.93 * max(fixed.values())
        asked = len(world.asked)
        assert asked > 1250 if count == 1 else asked < 100


def flat(cost: float) -> Cost:
    return lambda rows: cost


def figure(target: str) -> list[Simulated]:
    """Two drafts whose speed-up at 8 tokens is the figure's: per pass of a target that takes 1, from acceptance p and
    speed-up s, (1 + p + ... + p^8) / (1 + 8c) = s."""
    made = []
    for name, probability, speedup in {
        "70B": (("8B", 0.8, 1.15), ("1B", 0.7, 1.52)),
        "405B": (("8B", 0.8, 2.00), ("1B", 0.1, 0.55)),
    }[target]:
        cost = (sum(probability**i for i in range(LONGEST + 1)) / speedup - 1) / LONGEST
        made.append(Simulated(name, constant(probability), flat(cost)))
    return made


@pytest.mark.parametrize(("target", "better"), [("70B", "1B"), ("405B", "8B")])
def test_the_figure(target: str, better: str) -> None:
    """Which draft is right depends on the target: the controller finds it, and is never as slow as the wrong one."""
    drafters, seconds = figure(target), lambda rows: 1.0
    fixed = arms(seconds, drafters, 1)
    multiples = {name: fixed[name, LONGEST] / fixed["", 0] for name in ("8B", "1B")}
    wanted = {"70B": {"8B": 1.15, "1B": 1.52}, "405B": {"8B": 2.00, "1B": 0.55}}[target]
    assert multiples == pytest.approx(wanted, rel=0.04)
    world = World(seconds, drafters)
    got = world.goodput(1)
    assert got >= 0.95 * max(fixed.values())
    shares = [
        sum(name == drafter for _, name in world.asked) / 1500 for drafter in (better, {"1B": "8B", "8B": "1B"}[better])
    ]
    assert shares[0] > 0.9
    assert shares[1] < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("turnover", [0, 64])
@pytest.mark.parametrize("count", [1, 4, 8, 16])
@pytest.mark.parametrize("cost", [memory_bound, compute_bound, small_cpu])
def test_a_hostile_portfolio(cost: Cost, count: int, turnover: int) -> None:
    """A draft as large as the target that knows nothing, a smaller one that knows nothing, lookup in random text."""
    drafters = [
        Simulated("random", constant(0.0), cost, prompt=100, prior=0.6),
        Simulated("half", constant(0.02), lambda rows: 0.3 * cost(rows), prompt=100, prior=0.6),
        Simulated("lookup", constant(0.01), prior=0.35),
    ]
    plain = World(cost, drafters, turnover).goodput(count, ("", 0), steps=600)
    assert World(cost, drafters, turnover).goodput(count, steps=600) >= 0.97 * plain


@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize("measured", [0.1, 0.2])
@pytest.mark.parametrize("cost", [memory_bound, small_cpu])
def test_a_draft_that_costs_more_than_it_seemed(cost: Cost, measured: float, count: int) -> None:
    """It is as large as the target, but was measured while the machine had nothing else to do and the target while it
    had: as far as is known at the start, it must pay. The first 512 steps hardly suffer."""
    drafters = [
        Simulated("random", constant(0.0), cost, prompt=64, prior=0.6, measured=measured),
        Simulated("lookup", constant(0.01), prior=0.35),
    ]
    plain = World(cost, drafters, 64).goodput(count, ("", 0), steps=512)
    world = World(cost, drafters, 64)
    assert world.goodput(count, steps=512) >= 0.97 * plain
    assert world.asked or measured > 0.1


@pytest.mark.parametrize("count", [1, 4, 8, 16])
@pytest.mark.parametrize("probability", [0.2, 0.35, 0.5, 0.65])
def test_short_visits(count: int, probability: float) -> None:
    """From its first step on: eight answers of 64 tokens are soon over."""
    drafters = [Simulated("lookup", constant(probability), prior=0.35)]
    steps = 8 * 64 // count
    plain = sum(World(small_cpu, drafters, 64).goodput(count, ("", 0), steps) for _ in range(1))
    assert World(small_cpu, drafters, 64).goodput(count, steps=steps) >= 0.97 * plain


def test_trials_of_a_drafter_that_does_not_pay_get_rarer() -> None:
    world = World(lambda rows: 0.1, [Simulated("d", constant(0.0), lambda rows: 0.05)])
    world.goodput(1, steps=4000)
    tried = [step for step, _ in world.asked]
    assert 1 <= len([step for step in tried if step >= 2000]) <= 4
    assert len(tried) < 60


def test_a_draft_that_could_not_pay_is_not_tried() -> None:
    world = World(lambda rows: 0.1, [Simulated("d", constant(1.0), lambda rows: 0.1)])
    world.goodput(1, steps=40 * FIRST_RETRY)
    assert world.asked == []


def test_a_draft_that_became_good_is_found_again() -> None:
    right = lambda sequence, step, position: 0.0 if step < 500 else 0.9  # noqa: E731
    world = World(lambda rows: 0.1, [Simulated("d", right, lambda rows: 0.01)])
    world.goodput(1, steps=2500)
    late = [step for step, _ in world.asked if step >= 1600]
    assert len(late) > 800


def test_one_request_may_draft_where_another_does_not() -> None:
    world = World(compute_bound, [Simulated("d", lambda sequence, step, position: (0.95, 0.02)[sequence])])
    sequences = [world.sequence() for _ in range(2)]
    for _ in range(200):
        world.step(sequences)
    candidates = [Candidate(sequence, LONGEST, [Draft((1,) * LONGEST, drafter="d")]) for sequence in sequences]
    chosen = world.controller.choose(UpcomingStep(2, 2, candidates)).drafts
    assert len(chosen[sequences[0]].tokens) >= 4
    assert sequences[1] not in chosen


def test_each_request_of_a_batch_gets_what_suits_it() -> None:
    """Lookup takes no time and is used where it is right; the draft model drafts for the others, and only for them."""
    drafters = [
        Simulated("lookup", lambda sequence, step, position: (0.9, 0.02, 0.02, 0.02)[sequence]),
        Simulated("model", lambda sequence, step, position: (0.7, 0.8, 0.8, 0.02)[sequence], lambda rows: 2e-3),
    ]
    world = World(lambda rows: 20e-3 + 0.2e-3 * rows, drafters)
    may = [("lookup", "model")] * 4 + [()]
    sequences = [world.sequence(names) for names in may]
    drafted: list[dict[str, int]] = [{} for _ in may]
    choose = world.controller.choose

    def watched(step: UpcomingStep) -> Choice:
        choice = choose(step)
        for i, sequence in enumerate(sequences):
            draft = choice.drafts.get(sequence, Draft())
            drafted[i][draft.drafter] = drafted[i].get(draft.drafter, 0) + len(draft.tokens)
        return choice

    world.controller.choose = watched  # type: ignore[method-assign]
    steps = 500
    for _ in range(steps):
        world.step(sequences)
    lengths = [{name: count / steps for name, count in counts.items() if name} for counts in drafted]
    assert lengths[0]["lookup"] > 5
    assert lengths[0].get("model", 0) < 0.5
    for i in (1, 2):
        assert lengths[i]["model"] > 2
        assert lengths[i].get("lookup", 0) < 0.1
    assert sum(lengths[3].values()) < 1
    assert lengths[4] == {}


def test_a_prompt_in_the_step_does_not_make_drafts_cheap() -> None:
    """A step is long where a prompt is read in it. What a drafted row costs is the same as without, and so is what it
    is worth: if drafts do not pay in a step of their own, they do not pay there."""
    world = World(lambda rows: 4e-3 + 2e-3 * rows, [Simulated("d", constant(0.3))])
    sequences = [world.sequence() for _ in range(4)]
    for _ in range(300):
        world.step(sequences)
    chosen = []
    for prompt_rows in (0, 100):
        candidates = [Candidate(sequence, LONGEST, [Draft((1,) * LONGEST, drafter="d")]) for sequence in sequences]
        step = UpcomingStep(4 + prompt_rows, 4, candidates)
        choice = world.controller.choose(step)
        chosen.append(sum(len(draft.tokens) for draft in choice.drafts.values()))
        seconds = 4e-3 + 2e-3 * step.rows
        assert choice.plain_goodput == pytest.approx(4 / seconds, rel=0.2)  # 104 rows were never measured
    assert chosen == [0, 0]


def test_prompts_do_not_make_rows_cheap() -> None:
    """The rows of a prompt need no logits, which are half of a pass here. What was seen of them says nothing of rows
    that are verified."""

    def verifying(rows: int) -> float:
        return 10e-3 + 1e-3 * rows

    world = World(verifying, [])
    for i in range(300):
        rows, prompts = (20 + i % 5 * 40, True) if i % 3 == 0 else (8, False)
        seconds = 0.5 * verifying(rows) if prompts else verifying(rows)
        world.controller.observe_step(rows, world.noisy(seconds), prompts=prompts)
    target = world.controller.target
    for rows in (16, 32, 64):
        assert target.predict(rows) / target.predict(8) == pytest.approx(verifying(rows) / verifying(8), rel=0.1)
    choice = world.controller.choose(UpcomingStep(108, 8, []))
    assert choice.plain_goodput == pytest.approx(8 / (0.5 * verifying(108)), rel=0.15)


def test_long_contexts_make_drafts_worth_more() -> None:
    """Reading the keys and values is paid for anyhow, so drafted rows are a smaller part of a step."""
    world = World(compute_bound, [Simulated("d", constant(0.5))])
    sequences = [world.sequence() for _ in range(4)]
    for _ in range(300):
        world.step(sequences)
    lengths = []
    for context in (0, 10**6):
        candidates = [Candidate(sequence, LONGEST, [Draft((1,) * LONGEST, drafter="d")]) for sequence in sequences]
        choice = world.controller.choose(UpcomingStep(4, 4, candidates, context))
        lengths.append(sum(len(draft.tokens) for draft in choice.drafts.values()))
    assert lengths[1] > 2 * lengths[0]


def test_a_named_drafter_is_the_only_one() -> None:
    """A request that names a drafter gets that one or none, whatever another would be worth."""
    drafters = [Simulated("good", constant(0.9)), Simulated("named", constant(0.5), lambda rows: 1e-3)]
    world = World(memory_bound, drafters)
    world.goodput(1, steps=200, drafters=[("named",)])
    assert {name for _, name in world.asked} == {"named"}
    assert world.controller.acceptance.trials("good") == 0


def test_confidence_is_worth_something() -> None:
    """Drafts are good or bad, as a coin falls, and only the good ones are verified."""

    def right(sequence: int, step: int, position: int) -> float:
        return (0.95, 0.05)[step * 2654435761 >> 7 & 1]

    def target(rows: int) -> float:
        return 10e-3 + 5e-3 * rows

    known = World(target, [Simulated("d", right, lambda rows: 0.2e-3, confident=True)]).goodput(1)
    unknown = World(target, [Simulated("d", right, lambda rows: 0.2e-3)]).goodput(1)
    assert known > 1.1 * unknown


def test_the_same_measurements_give_the_same_choices() -> None:
    cost, right, _ = WORLDS["sequences differ"]
    drafters = [Simulated("d", right), Simulated("m", constant(0.7), lambda rows: 1e-3)]
    assert World(cost, drafters).goodput(4) == World(cost, drafters).goodput(4)
