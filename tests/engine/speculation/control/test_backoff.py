"""DraftingBackoff: where drafting brings less than the work of finding out, most steps go without."""

from __future__ import annotations

import pytest

from pilotfish.engine.speculation.control.backoff import AWAKE, LONGEST, DraftingBackoff


def asleep(backoff: DraftingBackoff, steps: int, gain: float, share: float, load: int = 4, new_every: int = 0) -> int:
    """In how many of the steps nothing was drafted."""
    slept = 0
    for number in range(steps):
        if backoff.should_skip(load, bool(new_every) and number % new_every == 0):
            slept += 1
        else:
            backoff.observe(load, gain, share)
    return slept


def test_whatever_pays_is_never_slept_through() -> None:
    assert asleep(DraftingBackoff(), 1000, gain=1.06, share=0.05) == 0
    assert asleep(DraftingBackoff(), 1000, gain=1.0, share=0.0) == 0


def test_where_it_does_not_pay_most_steps_go_without() -> None:
    backoff = DraftingBackoff()
    asleep(backoff, 200, gain=1.01, share=0.04)
    slept = asleep(backoff, 1000, gain=1.01, share=0.04)
    assert slept >= 1000 * LONGEST / (LONGEST + AWAKE) - LONGEST


def test_it_is_seen_when_drafting_pays_again() -> None:
    backoff = DraftingBackoff()
    asleep(backoff, 500, gain=1.0, share=0.04)
    asleep(backoff, LONGEST + 10, gain=1.5, share=0.04)
    assert asleep(backoff, 500, gain=1.5, share=0.04) == 0


def test_a_new_request_is_not_slept_through() -> None:
    backoff = DraftingBackoff()
    asleep(backoff, 500, gain=1.0, share=0.04)
    assert not backoff.should_skip(4, new_arrival=True)
    assert asleep(backoff, 400, gain=1.0, share=0.04, new_every=10) <= 400 * 0.9


def test_loads_are_apart() -> None:
    """What is not worth it for sixteen requests may be for one."""
    backoff = DraftingBackoff()
    assert asleep(backoff, 500, gain=1.0, share=0.04, load=5) > 300
    assert asleep(backoff, 500, gain=1.6, share=0.04, load=1) == 0


@pytest.mark.parametrize("share", [0.02, 0.1])
def test_its_own_cost_decides(share: float) -> None:
    slept = asleep(DraftingBackoff(), 1000, gain=1.05, share=share)
    assert (slept > 500) == (share > 0.05)
