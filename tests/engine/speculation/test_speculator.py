"""The speculator and its drafters."""

from __future__ import annotations

import pytest

from pilotfish.engine.sequence import Sequence
from pilotfish.engine.speculation.drafters.drafter import NO_DRAFT, Draft, DraftRequest
from pilotfish.engine.speculation.speculator import Speculator


class Incomplete:
    """Costs time, but does not say what."""

    name, prior, free = "half", 0.5, False

    def propose(self, requests: list[DraftRequest]) -> list[Draft]:
        return [NO_DRAFT] * len(requests)

    def release(self, sequence: Sequence) -> None:
        pass


def test_a_drafter_that_does_not_say_what_it_costs_is_refused() -> None:
    """Else it would never be asked, without a word."""
    with pytest.raises(TypeError, match=r"'half'.*CostlyDrafter"):
        Speculator([Incomplete()], 8, 1024, None)
