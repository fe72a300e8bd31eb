"""GenerationProbe: whether the engine still generates, for /health_generate."""

from __future__ import annotations

import asyncio
import time
import uuid
from contextlib import aclosing, suppress

from pilotfish.engine.params import SamplingParams
from pilotfish.engine.process.supervisor import SupervisedEngine
from pilotfish.engine.request import EngineInfo, Request
from pilotfish.engine.stats import StepStats
from pilotfish.errors import EngineDeadError, EngineNotReadyError
from pilotfish.server.metrics import Metrics

PROBE_SECONDS = 20.0
"""As long as SGLang's /health_generate waits."""
PROBE_TENANT = "probe:"
"""No client's: it has a share of the engine of its own, and waits for nobody's queue."""
PROBE_SALT = b"probe"


class GenerationProbe:
    """Has the engine generate a token. Probes at the same time share one, so that any number costs little."""

    def __init__(self, engine: SupervisedEngine, metrics: Metrics) -> None:
        self._engine = engine
        self._metrics = metrics
        self._running: asyncio.Task[bool] | None = None

    async def generates(self, info: EngineInfo, seconds: float = PROBE_SECONDS) -> bool:
        """Return whether the engine, whose info this is, generates a token within `seconds`: the probe's own, or
        anybody's, which shows the same while it is too busy for the probe."""
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._probe(info, seconds))
        return await asyncio.shield(self._running)

    async def _probe(self, info: EngineInfo, seconds: float) -> bool:
        generated = asyncio.Event()

        def watch(stats: StepStats) -> None:
            if stats.generated_tokens:
                generated.set()

        async def own() -> None:
            with suppress(EngineDeadError, EngineNotReadyError):
                async with aclosing(self._engine.generate(_request(info))) as deltas:
                    async for delta in deltas:
                        if delta.token_ids:
                            generated.set()

        self._metrics.watchers.append(watch)
        task = asyncio.create_task(own())
        try:
            await asyncio.wait_for(generated.wait(), seconds)
        except TimeoutError:
            return False
        else:
            return True
        finally:
            self._metrics.watchers.remove(watch)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


def _request(info: EngineInfo) -> Request:
    now = time.monotonic()
    prompt = info.eos_token_ids[:1] or (0,)
    return Request(
        id=f"probe-{uuid.uuid4().hex}",
        prompt_ids=prompt,
        params=SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, seed=0),
        speculation="off",
        salt=PROBE_SALT,
        tenant=PROBE_TENANT,
        arrival=now,
        deadline=now + PROBE_SECONDS,
    )
