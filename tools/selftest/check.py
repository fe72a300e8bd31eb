"""Check: a result that must be right on this machine, or a figure that it must reach. Result: a check's outcome."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import msgspec

Verdict = Literal["passed", "warned", "failed", "skipped", "measured"]
"""A check without a bound on this machine is "measured": its figure is reported and not judged. One that keeps its
bound, but not what a healthy machine reaches, is "warned"."""


class Skip(Exception):
    """Raised by a check that cannot run here; the message says why."""


def skip(reason: str) -> Finding:
    """Raise Skip: the `run` of a check that is known not to run here."""
    raise Skip(reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The figure that a check measured. Without a bound it is only reported."""

    measured: float
    bound: float | None = None
    at_least: bool = False
    """Whether `bound` is the least that passes; otherwise it is the most."""
    expected: float | None = None
    """What a healthy machine reaches, where that is more than the bound."""
    detail: str = ""
    """The position of the worst value, and other details."""
    values: Mapping[str, float] = field(default_factory=dict)
    """Other figures, by name."""

    @property
    def good(self) -> bool:
        """Whether the figure keeps its bound, or is finite where there is none; NaN is never good."""
        if self.bound is None:
            return math.isfinite(self.measured)
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound

    @property
    def verdict(self) -> Verdict:
        if not self.good:
            return "failed"
        if self.expected is not None and (self.measured < self.expected) == self.at_least:
            return "warned"
        return "measured" if self.bound is None else "passed"


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    """Unique in its group."""
    compares: str
    """Which results are compared with which."""
    run: Callable[[], Finding]
    """Raises Skip where the check cannot run; any other exception is a failure."""
    unit: str = ""
    """Unit of the measured figure."""
    why: str = ""
    """The reason for the bound."""


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of one check, as the JSON report has it."""

    group: str
    name: str
    compares: str = ""
    verdict: Verdict
    measured: float | None = None
    unit: str = ""
    bound: float | None = None
    at_least: bool = False
    """Whether `bound` is the least that passes; otherwise it is the most."""
    why: str = ""
    detail: str = ""
    """For a failed or skipped check, the reason."""
    values: dict[str, float] = {}
    """Other figures of the same measurement, by name."""
    seconds: float = 0.0


def run_check(check: Check, group: str) -> Result:
    """Run a check and return its outcome; an exception is one, too."""
    start = time.perf_counter()
    verdict: Verdict = "failed"
    found: Finding | None = None
    try:
        found = check.run()
    except Skip as reason:
        verdict, detail = "skipped", str(reason)
    except Exception as error:
        detail = f"{type(error).__name__}: {error}"
    else:
        verdict = found.verdict
        detail = found.detail
    return Result(
        group=group,
        name=check.name,
        compares=check.compares,
        verdict=verdict,
        measured=None if found is None else float(found.measured),
        unit=check.unit,
        bound=None if found is None or found.bound is None else float(found.bound),
        at_least=found is not None and found.at_least,
        why=check.why,
        detail=detail,
        values={} if found is None else {name: float(value) for name, value in found.values.items()},
        seconds=time.perf_counter() - start,
    )
