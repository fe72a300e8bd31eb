"""Arm: one way to decode the same requests. One engine serves all arms, since each request names its drafter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pilotfish.engine.request import EngineInfo
from pilotfish.engine.speculation.drafters.prediction import PredictionDrafter
from pilotfish.errors import ConfigError

VANILLA, AUTO = "vanilla", "auto"


@dataclass(frozen=True, slots=True)
class Arm:
    name: str
    speculation: str
    """The value of `Request.speculation`."""


def arms_of(names: Sequence[str], info: EngineInfo) -> list[Arm]:
    """Return vanilla, the baseline, and the named arms, each once. Without names: all that the engine has.

    Raises ConfigError for a name that the engine has no drafter for.
    """
    known = {VANILLA: "off", **{name: name for name in info.drafters}, AUTO: AUTO}
    if not names:
        names = [name for name in known if name != PredictionDrafter.name]  # prompts come without predictions
    for name in names:
        if name not in known:
            listed = ", ".join(repr(each) for each in known)
            raise ConfigError(f"arm is {name!r}, but {info.model} with these settings knows {listed}")
    return [Arm(name, known[name]) for name in dict.fromkeys((VANILLA, *names))]
