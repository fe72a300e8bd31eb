"""When refused clients are asked to come back, in simulated time; requests with more answers than there is room for."""

from __future__ import annotations

import asyncio
import heapq
import random
from contextlib import ExitStack

import pytest

from pilotfish.server.admission import LONGEST_WAIT, Gate
from pilotfish.server.config import ServerConfig
from pilotfish.server.errors import ApiError
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
            admitted.enter_context(gate.admit(1, room))
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
