"""Calibration: makes a controller with pass times that are measured at startup."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from pilotfish.engine.config import EngineConfig
from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.models.registry import active_parameters
from pilotfish.engine.speculation.control.controller import Controller
from pilotfish.engine.speculation.control.cost import RowCost
from pilotfish.engine.speculation.drafters.drafter import ModelDrafter

CALIBRATED = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
"""Rows of the passes that are timed at startup, the sizes of decoding and verification."""


def make_controller(
    config: EngineConfig,
    target: ModelConfig,
    try_target: Callable[[int], object],
    drafters: Sequence[ModelDrafter],
    priors: Mapping[str, float],
    lengths: Mapping[str, int],
    progress: Callable[[str, float], None],
) -> Controller:
    """Make a controller with the pass times of this machine.

    `try_target` runs a pass of the target over the given number of rows; `priors` are the drafters', by name,
    and `lengths` their maximum drafts where those are not `num_draft_tokens`.
    """
    controller = Controller(config.num_draft_tokens, priors, lengths)
    counts = [rows for rows in CALIBRATED if rows <= config.max_batch_tokens]
    progress("measuring", 0.0)
    share = _context_share(target)
    measured = _timed(try_target, counts)
    controller.target.calibrate(measured, share * measured[1])
    for i, drafter in enumerate(drafters, start=1):
        progress("measuring", i / (1 + len(drafters)))
        cost = controller.drafting[drafter.name] = RowCost(drafter.block)
        measured = _timed(drafter.try_pass, counts)
        cost.calibrate(measured, share * measured[1])
    progress("measuring", 1.0)
    return controller


def _context_share(model: ModelConfig) -> float:
    """Return the cost of a token of context relative to a pass over one row, if both only read memory. It serves for
    draft models, too, and is corrected by what is observed."""
    cached = 2 * model.num_layers * model.num_kv_heads * model.head_dim
    return cached / active_parameters(model)


def _timed(attempt: Callable[[int], object], counts: list[int]) -> dict[int, float]:
    """Return the seconds of a pass by rows, each the faster of two."""
    seconds: dict[int, float] = {}
    for rows in counts:
        times = []
        for _ in range(2):
            begin = time.perf_counter()
            attempt(rows)
            times.append(time.perf_counter() - begin)
        seconds[rows] = min(times)
    return seconds
