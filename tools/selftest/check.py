"""Check: something that this machine must get right, or a figure that it must reach; Result: what came of one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import msgspec

Verdict = Literal["passed", "failed", "skipped", "measured"]
"""measured: a figure that nothing is asked of here."""


class Skip(Exception):
    """This check cannot be done here; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What a check measured. No bound: the figure is only told."""

    measured: float
    bound: float | None = None
    at_least: bool = False
    """The figure must be at least `bound`, and not at most."""
    detail: str = ""
    """Where the worst was, and what else is worth telling."""

    @property
    def good(self) -> bool:
        """False for NaN, too."""
        if self.bound is None:
            return math.isfinite(self.measured)
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    group: str
    name: str
    """Unique in its group."""
    compares: str
    """What with what."""
    unit: str
    """Of what is measured."""
    why: str
    """Why the bound is what it is."""
    run: Callable[[], Finding]
    """Raises Skip where it cannot be done; whatever else it raises is a failure."""


class Result(msgspec.Struct, frozen=True, kw_only=True):
    group: str
    name: str
    compares: str = ""
    verdict: Verdict
    measured: float | None = None
    unit: str = ""
    bound: float | None = None
    at_least: bool = False
    """The bound is the least that passes; else the most."""
    why: str = ""
    detail: str = ""
    """Of one that failed or was skipped: the reason."""
    seconds: float = 0.0


def run_check(check: Check) -> Result:
    """Whatever goes wrong in it is its result."""
    start = time.perf_counter()
    result = Result(
        group=check.group, name=check.name, compares=check.compares, unit=check.unit, why=check.why, verdict="failed"
    )
    try:
        found = check.run()
    except Skip as reason:
        result = msgspec.structs.replace(result, verdict="skipped", detail=str(reason))
    except Exception as error:
        result = msgspec.structs.replace(result, detail=f"{type(error).__name__}: {error}")
    else:
        verdict: Verdict = "failed" if not found.good else "passed" if found.bound is not None else "measured"
        result = msgspec.structs.replace(
            result,
            verdict=verdict,
            measured=float(found.measured),
            bound=None if found.bound is None else float(found.bound),
            at_least=found.at_least,
            detail=found.detail,
        )
    return msgspec.structs.replace(result, seconds=time.perf_counter() - start)
