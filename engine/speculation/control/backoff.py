"""The drafting backoff skips drafting for some steps where it does not pay: lookups and choices take time, which may
exceed what drafts gain. Between two pauses a few steps are drafted for, to see whether that has changed."""

from __future__ import annotations

from dataclasses import dataclass

MANY = 6
"""Minimum number of sequences in a step that is skipped: with fewer, drafts gain more and choosing takes less time."""
SHORTEST, LONGEST = 8, 64
"""Steps of a pause, which doubles each time until drafting pays."""
AWAKE = 4
"""Minimum number of steps between two pauses."""
SMOOTHING = 0.1
"""Weight of a step in the moving averages."""
HOPE = 1.5
"""Initial estimate of goodput with drafts, as a multiple of plain decoding's."""


@dataclass(slots=True)
class _Load:
    gain: float = HOPE
    awake: int = 0
    left: int = 0
    """Steps left of the pause."""
    length: int = SHORTEST
    """Steps of the next pause."""


class DraftingBackoff:
    """Keeps a state for each load, in whatever units the caller measures it."""

    def __init__(self) -> None:
        self._loads: dict[int, _Load] = {}
        self._share = 0.0

    def should_skip(self, load: int, new_arrival: bool) -> bool:
        """Count a step, and return whether to skip drafting in it. `new_arrival`: a sequence has just begun, which ends
        a pause."""
        state = self._loads.setdefault(load, _Load())
        if new_arrival:
            state.left = 0
        if not state.left:
            return False
        state.left -= 1
        return True

    def observe(self, load: int, gain: float, share: float) -> None:
        """Observe a step that was not skipped: it promised `gain` times plain decoding's goodput, and choosing took
        `share` of a plain step's time."""
        state = self._loads.setdefault(load, _Load())
        self._share += SMOOTHING * (share - self._share)
        state.gain += SMOOTHING * (gain - state.gain)
        state.awake += 1
        if state.gain >= 1.0 + self._share:
            state.length = SHORTEST
        elif state.awake >= AWAKE:
            state.left, state.awake = state.length, 0
            state.length = min(LONGEST, 2 * state.length)
