"""/v1/loads: what routers choose a replica by."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotfish.server.config import ServerConfig
from pilotfish.server.recent_steps import SECONDS, RecentSteps
from tests.server.test_metrics import stats
from tests.support.scripted_app import ScriptedApp
from tests.support.scripted_engine import INFO, say

MANY = msgspec.structs.replace(INFO, max_num_seqs=2, num_blocks=10)


async def load(app: ScriptedApp) -> dict[str, Any]:
    response = await app.http.get("/v1/loads", params={"include": "core,disagg,queues,memory"})
    assert response.status_code == 200
    body = response.json()
    assert abs((datetime.now(UTC) - datetime.fromisoformat(body["timestamp"])).total_seconds()) < 60
    assert (body["dp_rank_count"], len(body["loads"])) == (1, 1)
    own: dict[str, Any] = body["loads"][0]
    assert body["aggregate"] == {
        "total_running_reqs": own["num_running_reqs"],
        "total_waiting_reqs": own["num_waiting_reqs"],
        "total_reqs": own["num_total_reqs"],
        "avg_token_usage": own["token_usage"],
        "avg_throughput": own["gen_throughput"],
        "avg_utilization": own["utilization"],
    }
    return own


async def test_what_was_admitted_is_counted_at_once() -> None:
    """Before the engine has made a step with it."""
    held = asyncio.Event()
    app = ScriptedApp(lambda request: [held, *say(request, [5])])
    app.engine.info = MANY
    idle = await load(app)
    assert [idle[f"num_{what}_reqs"] for what in ("running", "waiting", "total")] == [0, 0, 0]
    requests = [asyncio.create_task(app.complete()) for _ in range(3)]
    await app.until_asked(3)
    assert [(await load(app))[f"num_{what}_reqs"] for what in ("running", "waiting", "total")] == [0, 3, 3]
    app.metrics.step(stats(running=2, waiting=1, blocks_total=10, blocks_used=3, blocks_cached=5))
    busy = await load(app)
    assert [busy[f"num_{what}_reqs"] for what in ("running", "waiting", "total")] == [2, 1, 3]
    assert (busy["num_used_tokens"], busy["max_total_num_tokens"], busy["token_usage"]) == (48, 160, 0.3)
    assert (busy["max_running_requests"], busy["utilization"]) == (2, 1.0)
    assert busy["gen_throughput"] > 0
    assert busy["speculative"] == {"accept_length": 1 + 3 / 1, "accept_rate": 3 / 7}
    held.set()
    await asyncio.gather(*requests)
    done = await load(app)
    assert [done[f"num_{what}_reqs"] for what in ("running", "waiting", "total")] == [0, 0, 0]


async def test_an_engine_that_died_has_no_load() -> None:
    app = ScriptedApp(lambda request: say(request, [5]))
    app.metrics.step(stats())
    app.metrics.restarting()
    assert (await load(app))["token_usage"] == 0.0
    app.engine.state = "restarting"
    app.engine.retry_after = 1.0  # type: ignore[attr-defined]
    assert (await app.http.get("/v1/loads")).status_code == 503


async def test_it_needs_the_key() -> None:
    app = ScriptedApp(lambda request: [], ServerConfig(api_key=("secret",)))
    assert (await app.http.get("/v1/loads")).status_code == 401
    assert (await app.http.get("/v1/loads", headers={"authorization": "Bearer secret"})).status_code == 200


@given(
    st.lists(st.tuples(st.floats(0, 5), st.integers(0, 50), st.integers(0, 50), st.integers(0, 50)), max_size=60),
    st.floats(0, 2 * SECONDS),
)
def test_recent_steps_are_those_of_the_last_seconds(steps: list[tuple[float, int, int, int]], later: float) -> None:
    now = [100.25]
    recent = RecentSteps(lambda: now[0])
    made = []
    for wait, generated, hit, more in steps:
        now[0] += wait
        made.append((int(now[0]), generated, hit, hit + more))
        recent.step(stats(generated_tokens=generated, prefix_hit_tokens=hit, prefix_queried_tokens=hit + more))
    now[0] += later
    kept = [each for each in made if each[0] >= int(now[0]) - SECONDS]
    sums = recent.sums()
    assert (sums.generated, sums.hit, sums.queried) == tuple(sum(each[i] for each in kept) for i in (1, 2, 3))
    assert 0 <= sums.cache_hit_rate <= 1
    covered = max(1.0, min(now[0] - 100.25, now[0] - (int(now[0]) - SECONDS)))
    assert recent.tokens_per_second() == pytest.approx(sums.generated / covered)
    assert sums.drafts == len(kept)
