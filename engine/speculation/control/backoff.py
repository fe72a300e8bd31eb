"""When drafting as a whole is left for some steps: look-ups and choices take time as well, and where drafts hardly pay
that is more than what they bring. So there are naps, between them a few steps awake to see whether that has changed."""

from __future__ import annotations

from dataclasses import dataclass

MANY = 6
"""Sequences in a step, at least, where there are naps: for a few, drafts bring more, and it takes less to find out."""
SHORTEST, LONGEST = 8, 64
"""Steps of a nap; each is twice as long as the one before, as long as drafting does not pay."""
AWAKE = 4
"""Steps between two naps, at least."""
SMOOTHING = 0.1
"""Weight of a step against what is known."""
HOPE = 1.5
"""What drafting is taken to bring, as a multiple of plain decoding, until it was seen."""


@dataclass(slots=True)
class _Load:
    gain: float = HOPE
    awake: int = 0
    left: int = 0
    """Steps of the nap."""
    length: int = SHORTEST
    """Of the next nap."""


class Naps:
    """Apart by load, which is whatever the caller counts it in."""

    def __init__(self) -> None:
        self._loads: dict[int, _Load] = {}
        self._share = 0.0

    def sleeps(self, load: int, disturbed: bool) -> bool:
        """One more step: is it slept through? `disturbed`: there is something new, which ends a nap."""
        state = self._loads.setdefault(load, _Load())
        if disturbed:
            state.left = 0
        if not state.left:
            return False
        state.left -= 1
        return True

    def awake(self, load: int, gain: float, share: float) -> None:
        """A step that was not slept through promised `gain` times plain decoding's goodput; to find that out took such
        a share of the step."""
        state = self._loads.setdefault(load, _Load())
        self._share += SMOOTHING * (share - self._share)
        state.gain += SMOOTHING * (gain - state.gain)
        state.awake += 1
        if state.gain >= 1.0 + self._share:
            state.length = SHORTEST
        elif state.awake >= AWAKE:
            state.left, state.awake = state.length, 0
            state.length = min(LONGEST, 2 * state.length)
