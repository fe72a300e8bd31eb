"""What passes cost, learned from noisy measurements of costs that are known."""

from __future__ import annotations

import math
import random

import pytest

from pilotfish.engine.speculation.control.calibration import CALIBRATED
from pilotfish.engine.speculation.control.cost import RowCost
from tests.support.worlds import small_cpu


def test_rows_cost_is_monotone_and_follows_the_machine() -> None:
    cost = RowCost()
    assert cost.predict(5) == 0.0
    cost.calibrate({1: 0.02, 4: 0.02, 8: 0.019, 16: 0.04, 32: 0.07})
    predicted = [cost.predict(rows) for rows in range(1, 80)]
    assert predicted == sorted(predicted)
    assert cost.predict(24) == pytest.approx(0.055)
    assert cost.predict(64) == pytest.approx(0.13)
    for _ in range(300):
        cost.observe(8, 0.038)  # the machine is half as fast now
    assert cost.predict(8) == pytest.approx(0.038, rel=0.02)
    assert 0.045 < cost.predict(16) < 0.09  # and so for what was not measured since
    before = cost.predict(8)
    cost.observe(8, 10.0)
    assert cost.predict(8) < 1.3 * before


def test_a_wrong_calibration_is_found_out() -> None:
    """Rows that were measured wrongly are put right by steps that have them, though the machine's speed drifts, too."""
    generator = random.Random(3)
    measured = {rows: small_cpu(rows) for rows in CALIBRATED}
    measured[12] *= 1.3
    measured[16] *= 0.8
    cost = RowCost()
    cost.calibrate(measured)
    speed = 1.0
    for step in range(400):
        speed *= math.exp(generator.gauss(0, 0.01))
        rows = (8, 12, 16)[step % 7 % 3]
        cost.observe(rows, speed * small_cpu(rows) * generator.uniform(0.9, 1.1))
    for rows in (12, 16):
        assert cost.predict(rows) / cost.predict(8) == pytest.approx(small_cpu(rows) / small_cpu(8), rel=0.05)


def test_it_knows_what_it_does_not_know() -> None:
    cost = RowCost()
    cost.calibrate({rows: small_cpu(rows) for rows in CALIBRATED})
    measured, between = cost.uncertainty(8, 16), cost.uncertainty(8, 40)
    assert 0 < measured < between
    for _ in range(50):
        cost.observe(8, small_cpu(8))
        cost.observe(40, small_cpu(40))
    known = cost.uncertainty(8, 40)
    assert known < 0.5 * measured
    for _ in range(1000):
        cost.observe(8, small_cpu(8))
    assert cost.uncertainty(8, 40) > known  # it was long ago


def test_context_is_told_from_rows() -> None:
    """Sequences of different lengths: how much of a pass is reading their keys and values."""
    generator = random.Random(4)
    token = 3e-6
    cost = RowCost()
    cost.calibrate({rows: small_cpu(rows) for rows in CALIBRATED}, 1e-6)
    for _ in range(500):
        rows, context = generator.choice((1, 4, 8, 12)), generator.choice((100, 1000, 5000))
        cost.observe(rows, (small_cpu(rows) + token * context) * generator.uniform(0.95, 1.05), context)
    for rows in (1, 8, 12):
        for context in (0, 1000, 5000):
            assert cost.predict(rows, context) == pytest.approx(small_cpu(rows) + token * context, rel=0.05)


def test_several_passes_are_taken_apart() -> None:
    """What is measured of a draft is all of its passes together: a first one of some rows, then smaller ones."""
    generator = random.Random(5)

    def true(rows: int) -> float:
        return 1e-3 + 0.1e-3 * rows

    cost = RowCost()
    cost.calibrate({rows: 2 * true(rows) for rows in CALIBRATED})
    for _ in range(200):
        first, rows, count = generator.randint(1, 24), generator.randint(1, 8), generator.randint(0, 7)
        passes = [first] + [rows] * count
        cost.observe_passes(passes, sum(map(true, passes)) * generator.uniform(0.95, 1.05))
    for rows in (1, 4, 8, 16):
        assert cost.predict(rows) == pytest.approx(true(rows), rel=0.08)
