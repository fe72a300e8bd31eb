"""The garbage collector's oldest generation while large requests are in flight, and after them."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest

from pilotfish.server import memory
from pilotfish.server.memory import Reclaimer


class Cycle:
    def __init__(self) -> None:
        self.itself = self


def test_collects_after_large_requests_and_not_during_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "TRIM_SECONDS", 0.02)
    thresholds = gc.get_threshold()

    async def serve() -> None:
        reclaimer = Reclaimer()
        with reclaimer.collecting():
            assert gc.get_threshold()[2] == memory.NEVER
            assert gc.get_freeze_count() > 0
            with reclaimer.large():
                with reclaimer.large():
                    seen = weakref.ref(Cycle())
                    gc.collect(1)  # only the oldest generation would look at another of its own
                    old = _old_cycle()
                await asyncio.sleep(0.1)
                assert seen() is None
                assert old() is not None
            await asyncio.sleep(0.1)
            assert old() is None
        reclaimer.close()

    asyncio.run(serve())
    assert gc.get_threshold() == thresholds
    assert gc.get_freeze_count() == 0


def test_collects_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "COLLECT_SECONDS", 0.05)

    async def serve() -> None:
        with (reclaimer := Reclaimer()).collecting():
            old = _old_cycle()
            await asyncio.sleep(0.1)
            assert old() is None
            with reclaimer.large():  # large requests without end do not put it off for ever
                old = _old_cycle()
                await asyncio.sleep(0.25)
                assert old() is None
        reclaimer.close()

    asyncio.run(serve())


def _old_cycle() -> weakref.ref[Cycle]:
    """Return a cycle that is garbage, but in the oldest generation."""
    cycle = Cycle()
    gc.collect(0)
    gc.collect(1)
    return weakref.ref(cycle)
