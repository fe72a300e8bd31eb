"""Skips drafting for a while when it does not pay. Lookups and choices take time as well, and where drafts hardly pay,
that is more than what they bring. Between two pauses a few steps are drafted for, to see whether that has changed."""

from __future__ import annotations

from dataclasses import dataclass

MANY = 6
"""Least number of sequences in a step for which drafting is skipped: for fewer, drafts bring more, and it takes less to
find out."""
SHORTEST, LONGEST = 8, 64
"""Steps of a pause; each is twice as long as the one before, as long as drafting does not pay."""
AWAKE = 4
"""Least number of steps between two pauses."""
SMOOTHING = 0.1
"""Weight of a step against what is known."""
HOPE = 1.5
"""Gain that drafting is taken to bring, as a multiple of plain decoding, until it was seen."""


@dataclass(slots=True)
class _Load:
    gain: float = HOPE
    awake: int = 0
    left: int = 0
    """Steps that are left of the pause."""
    length: int = SHORTEST
    """Steps of the next pause."""


class DraftingBackoff:
    """Keeps apart by load, which is whatever the caller counts it in."""

    def __init__(self) -> None:
        self._loads: dict[int, _Load] = {}
        self._share = 0.0

    def should_skip(self, load: int, new_arrival: bool) -> bool:
        """Count one more step, and return whether to skip drafting in it. `new_arrival`: a sequence has just begun,
        which ends a pause."""
        state = self._loads.setdefault(load, _Load())
        if new_arrival:
            state.left = 0
        if not state.left:
            return False
        state.left -= 1
        return True

    def observe(self, load: int, gain: float, share: float) -> None:
        """A step that was not skipped promised `gain` times plain decoding's goodput; finding that out took `share` of
        the step."""
        state = self._loads.setdefault(load, _Load())
        self._share += SMOOTHING * (share - self._share)
        state.gain += SMOOTHING * (gain - state.gain)
        state.awake += 1
        if state.gain >= 1.0 + self._share:
            state.length = SHORTEST
        elif state.awake >= AWAKE:
            state.left, state.awake = state.length, 0
            state.length = min(LONGEST, 2 * state.length)
