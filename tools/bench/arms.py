"""Arm: one way to serve the same requests. A server has all of them at once, as a request names its drafter itself."""

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
    """As in Request."""


def arms_of(names: Sequence[str], info: EngineInfo) -> list[Arm]:
    """Vanilla, with which everything is compared, and the arms that are named, each once. No names: all there are.

    Raises ConfigError for a name that the engine has no drafter for.
    """
    known = {VANILLA: "off", **{name: name for name in info.drafters}, AUTO: AUTO}
    if not names:
        names = [name for name in known if name != PredictionDrafter.name]  # these prompts bring no predictions
    for name in names:
        if name not in known:
            listed = ", ".join(repr(each) for each in known)
            raise ConfigError(f"arm is {name!r}, but {info.model} with these settings knows {listed}")
    return [Arm(name, known[name]) for name in dict.fromkeys((VANILLA, *names))]
