"""When refused clients are asked to come back, in simulated time; requests with more answers than there is room for."""

from __future__ import annotations

import asyncio
import heapq
import random
from contextlib import ExitStack

import pytest

from pilotfish.engine.request import Delta
from pilotfish.server.admission import LONGEST_WAIT, Flow, Gate, Limits
from pilotfish.server.config import ServerConfig
from pilotfish.server.errors import ApiError
from pilotfish.server.shares import Demand, equal_shares
from tests.support.scripted_app import ScriptedApp
from tests.support.scripted_engine import INFO, say


def simulate(clients: int, room: int, seconds: float, tries: int, seed: int) -> tuple[int, list[float]]:
    """Clients come at once and heed Retry-After. Returns how many gave up after `tries` retries, and all waits."""
    generator, now, waits, gave_up = random.Random(seed), 0.0, [], 0
    gate = Gate(clock=lambda: now, draw=generator.random)
    events: list[tuple[float, int, int, ExitStack | None]] = [(0.0, i, 0, None) for i in range(clients)]
    number = clients
    while events:
        now, _, tried, running = heapq.heappop(events)
        number += 1
        if running is not None:
            running.close()
            continue
        admitted = ExitStack()
        try:
            admitted.enter_context(gate.admit(1, Limits(room)))
        except ApiError as error:
            wait = error.retry_after or 0.0
            waits.append(wait)
            if tried == tries:
                gave_up += 1
            else:
                heapq.heappush(events, (now + wait, number, tried + 1, None))
        else:
            heapq.heappush(events, (now + seconds * generator.uniform(0.7, 1.3), number, 0, admitted))
    return gave_up, waits


@pytest.mark.parametrize("seconds", [0.2, 2.0, 5.0])
def test_no_client_gives_up_that_the_queue_would_have_served(seconds: float) -> None:
    """OpenAI's client tries again five times here; with room for 2 and 6 clients, 3 gave up when all waited 1 s."""
    for seed in range(20):
        assert simulate(6, 2, seconds, 5, seed)[0] == 0
        assert simulate(40, 8, seconds, 8, seed)[0] == 0


def test_clients_that_are_refused_together_do_not_come_back_together() -> None:
    _, waits = simulate(30, 2, 3.0, 0, 1)
    assert len(waits) == 28
    assert all(0 < wait <= LONGEST_WAIT for wait in waits)
    assert len({round(wait, 2) for wait in waits}) > 25


def test_two_clients_in_the_same_place_wait_differently_long() -> None:
    waits = {round(simulate(3, 2, 3.0, 0, seed)[1][0], 3) for seed in range(10)}
    assert len(waits) > 5
    assert max(waits) / min(waits) > 1.2


async def test_a_request_with_more_answers_than_room_is_served_in_turns() -> None:
    running, most = 0, 0
    served = ScriptedApp(lambda request: say(request, [5], [6]), ServerConfig(max_queue=1))
    generate = served.engine.generate
    limit = INFO.max_num_seqs + 1

    async def counted(request):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        async for delta in generate(request):
            running -= delta.finish_reason is not None
            yield delta

    served.engine.generate = counted  # type: ignore[method-assign]
    response = await served.complete(prompt=["a b", "c"] * 10, max_tokens=2)
    assert response.status_code == 200, response.text
    assert [choice["index"] for choice in response.json()["choices"]] == list(range(20))
    assert most == limit
    assert served.app.state.service.gate.in_flight == 0


# Shares, and waits that are estimated.


def test_a_few_places_are_kept_for_those_who_have_less_than_their_share() -> None:
    gate, limits = Gate(), Limits(sequences=104, running=24)  # of the 80 that may wait, 10 are kept
    hog, other, third = (Flow(user=name) for name in ("hog", "other", "third"))
    with ExitStack() as admitted:
        for _ in range(94):
            admitted.enter_context(gate.admit(1, limits, hog))
        with pytest.raises(ApiError) as full:
            admitted.enter_context(gate.admit(1, limits, hog))
        assert (full.value.status, full.value.code) == (429, "queue_full")
        admitted.enter_context(gate.admit(9, limits, other))
        with pytest.raises(ApiError):
            admitted.enter_context(gate.admit(1, limits, hog))
        admitted.enter_context(gate.admit(1, limits, third))
        with pytest.raises(ApiError):
            admitted.enter_context(gate.admit(1, limits, Flow(user="fourth")))
    assert (gate.in_flight, gate.tokens) == (0, 0)


def test_tenants_count_before_their_users_and_by_weight() -> None:
    gate, limits = Gate(), Limits(sequences=88, running=8)
    with ExitStack() as admitted:
        for i in range(78):
            admitted.enter_context(gate.admit(1, limits, Flow("light", str(i))))
        admitted.enter_context(gate.admit(1, limits, Flow("heavy", "one", weight=3.0)))
        with pytest.raises(ApiError):  # another user of the tenant that has most of it
            admitted.enter_context(gate.admit(1, limits, Flow("light", "new")))
        admitted.enter_context(gate.admit(9, limits, Flow("heavy", "one", weight=3.0)))


def test_tokens_in_flight_are_bounded_but_not_for_one_who_is_alone() -> None:
    gate, limits = Gate(), Limits(sequences=100, tokens=800)
    with ExitStack() as admitted:
        first = admitted.enter_context(gate.admit(1, limits, Flow(user="a")))
        first.claim(1000)
        second = admitted.enter_context(gate.admit(1, limits, Flow(user="b")))
        with pytest.raises(ApiError) as full:
            second.claim(1)
        assert (full.value.status, full.value.code) == (429, "tokens_full")
        assert full.value.retry_after
    assert gate.tokens == 0
    with gate.admit(1, limits, Flow(user="a")) as first, gate.admit(1, limits, Flow(user="b")) as second:
        first.claim(650)
        with pytest.raises(ApiError):
            first.claim(100)  # the last eighth is not for those who have more than half
        second.claim(100)
        assert gate.tokens == 750


@pytest.mark.parametrize("fair", [True, False])
def test_the_wait_is_estimated_from_the_requests_before(fair: bool) -> None:
    """4 sequences at once of 100 tokens, each of which takes 10 s: one ends each 2.5 s."""
    now = 0.0
    gate = Gate(clock=lambda: now)
    limits = Limits(sequences=100, running=4, wait=21.0, fair=fair)
    hog, other = Flow(user="hog"), Flow(user="other")
    running: list[ExitStack] = []

    def add(flow: Flow) -> None:
        running.append(ExitStack())
        running[-1].enter_context(gate.admit(1, limits, flow)).claim(100)

    for i in range(40):
        now = 2.5 * i
        if len(running) == 4:
            running.pop(0).close()
        add(hog)
    assert gate.estimate(hog, limits) == pytest.approx(2.5, rel=0.01)
    for _ in range(7):
        add(hog)
    assert gate.estimate(hog, limits) == pytest.approx(20.0, rel=0.01)
    add(hog)
    with pytest.raises(ApiError) as refused:
        add(hog)
    running.pop()
    assert (refused.value.status, refused.value.code) == (429, "queue_too_long")
    assert refused.value.retry_after
    assert "would probably wait for 22.5 s, but may wait for 21 s" in refused.value.message
    assert gate.estimate(other, limits) == pytest.approx(0.0 if fair else 22.5, rel=0.01)
    for each in running:
        each.close()


def test_shares_that_are_not_used_are_the_others() -> None:
    shares = equal_shares(12, {"a": Demand(1, 1), "b": Demand(1, 100), "c": Demand(2, 100), "d": Demand(1, 2)})
    assert shares == {"a": 1, "b": 3, "c": 6, "d": 2}
    assert equal_shares(12, {"a": Demand(1, 3)}) == {"a": 3}


async def test_requests_say_whose_they_are_and_when_they_end() -> None:
    served = ScriptedApp(lambda request: say(request, [5]), ServerConfig(tenant_header="x-tenant"))
    asked = {"model": "tiny", "prompt": "a", "max_tokens": 1}
    for more, user, priority in (
        ({"user": "ann", "priority": -3, "timeout": 5}, "ann", -3),
        ({"safety_identifier": "hash"}, "hash", 0),
        ({}, "127.0.0.1", 0),
    ):
        response = await served.http.post("/v1/completions", json=asked | more, headers={"x-tenant": "t"})
        assert response.status_code == 200, response.text
        sent = served.engine.requests[-1]
        assert (sent.tenant, sent.user, sent.priority, sent.weight) == ("header:t", user, priority, 1.0)
        assert (sent.deadline - sent.arrival) == (pytest.approx(5) if "timeout" in more else -sent.arrival)
    chat = {"model": "tiny", "max_tokens": 1, "messages": [{"role": "user", "content": "a"}]}
    await served.http.post("/v1/messages", json=chat | {"metadata": {"user_id": "bob"}, "timeout": 9})
    assert (served.engine.requests[-1].user, served.engine.requests[-1].tenant) == ("bob", "")
    await served.http.post("/v1/responses", json={"model": "tiny", "input": "a", "user": "eve", "priority": 4})
    assert (served.engine.requests[-1].user, served.engine.requests[-1].priority) == ("eve", 4)
    for wrong, said in (
        ({"timeout": 0}, "timeout is 0, but must be more than 0"),
        ({"timeout": "5"}, "timeout is '5'"),
        ({"priority": 2**40}, "must be at most 2147483647"),
    ):
        response = await served.http.post("/v1/completions", json=asked | wrong)
        assert response.status_code == 400
        assert said in response.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_timeout_is_an_error(stream: bool) -> None:
    script = lambda request: [*say(request, [5], [6])[:1], Delta(request_id=request.id, finish_reason="timeout")]  # noqa: E731
    served = ScriptedApp(script)
    response = await served.complete(stream=stream, timeout=1)
    if stream:
        assert '"code":"timeout"' in response.text.split("\n\n")[-3]
    else:
        assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")
        assert response.json()["error"]["type"] == "timeout_error"
    assert served.app.state.service.gate.in_flight == 0
