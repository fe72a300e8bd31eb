"""Calibration: a controller that starts with measured pass times. Runs once, at start."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from pilotfish.engine.config import EngineConfig
from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.models.registry import parameter_count
from pilotfish.engine.speculation.control.controller import Controller
from pilotfish.engine.speculation.control.cost import RowCost
from pilotfish.engine.speculation.drafters.drafter import ModelDrafter

CALIBRATED = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
"""Rows of the passes that are timed at start: as many as decoding and verification have."""


def make_controller(
    config: EngineConfig,
    target: ModelConfig,
    try_target: Callable[[int], object],
    drafters: Sequence[ModelDrafter],
    priors: Mapping[str, float],
    progress: Callable[[str, float], None],
) -> Controller:
    """Make a controller that knows what passes take on this machine.

    `try_target` runs a pass of the target over so many rows; `priors` are those of all drafters, by name.
    """
    controller = Controller(config.num_draft_tokens, priors)
    counts = [rows for rows in CALIBRATED if rows <= config.max_batch_tokens]
    progress("measuring", 0.0)
    share = _context_share(target)
    measured = _timed(try_target, counts)
    controller.target.calibrate(measured, share * measured[1])
    for i, drafter in enumerate(drafters, start=1):
        progress("measuring", i / (1 + len(drafters)))
        cost = controller.drafting[drafter.name] = RowCost()
        measured = _timed(drafter.try_pass, counts)
        cost.calibrate(measured, share * measured[1])
    progress("measuring", 1.0)
    return controller


def _context_share(model: ModelConfig) -> float:
    """What a token of context costs, as a share of a pass over one row, if both are but memory to be read. Of a draft
    of the target's kind it is about the same; what it really is will be learned."""
    cached = 2 * model.num_layers * model.num_kv_heads * model.head_dim
    return cached / parameter_count(model)


def _timed(attempt: Callable[[int], object], counts: list[int]) -> dict[int, float]:
    """Seconds of a pass by rows, each the better of two."""
    seconds: dict[int, float] = {}
    for rows in counts:
        times = []
        for _ in range(2):
            begin = time.perf_counter()
            attempt(rows)
            times.append(time.perf_counter() - begin)
        seconds[rows] = min(times)
    return seconds
