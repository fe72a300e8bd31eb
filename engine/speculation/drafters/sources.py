"""Which drafters a configuration names, and where the files of those that are models lie. No torch: the server looks,
too. What is made of the files is `portfolio`'s."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pilotfish.checkpoints.catalog import LOOKUPS, ModelFiles, default_drafters, resolve
from pilotfish.errors import ConfigError

RESERVED = (*LOOKUPS, "prediction", "auto", "none", "off", "vanilla")
"""Names that mean something else already."""


@dataclass(frozen=True, slots=True)
class Source:
    """A drafter before it is made: a lookup drafter by its name, or a model's files."""

    name: str
    files: ModelFiles | None


def parse(entries: Sequence[str]) -> list[tuple[str, str]]:
    """(name, what) of each entry of `EngineConfig.drafter`; the name is "" where it follows from the files.

    Raises ConfigError for an entry that is empty, given twice, or whose name is taken.
    """
    parsed = []
    for entry in entries:
        name, what = "", entry
        if (match := re.fullmatch(r"([A-Za-z0-9][\w.-]*)=(.+)", entry)) is not None:
            name, what = match[1], match[2]
        if not what.strip():
            raise ConfigError("drafter is empty: give it 'ngram', 'suffix' or a model, or leave it out")
        if name in RESERVED:
            raise ConfigError(f"drafter is {entry!r}, but a draft model cannot be called {name!r}: choose another name")
        if name and what in LOOKUPS:
            raise ConfigError(f"drafter is {entry!r}, but {what!r} keeps its name: only a model can be given another")
        parsed.append((what if what in LOOKUPS else name, what))
    names = [name for name, _ in parsed if name]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"drafter has {name!r} twice: give each of them a name of its own, as NAME=MODEL")
    return parsed


def find(
    entries: Sequence[str], target_name: str, progress: Callable[[str, float], None] | None = None
) -> list[Source]:
    """The drafters that `EngineConfig.drafter` names for a target; none named: what goes with it.

    Fetches what is not on this machine yet. Raises ConfigError for names that are not unique, ModelError for a model
    that is not to be had.
    """
    found = []
    for name, what in parse(entries or default_drafters(target_name)):
        files = None if what in LOOKUPS else resolve(what, progress)
        found.append(Source(name or (files.name if files else what), files))
    for source in found:
        if source.files is not None and source.name in RESERVED:
            raise ConfigError(f"a draft model cannot be called {source.name!r}: name it, as NAME={source.files.path}")
        if sum(other.name == source.name for other in found) > 1:
            raise ConfigError(f"two drafters are called {source.name!r}: give one another name, as NAME=MODEL")
    return found


def check_speculation(speculation: str, sources: Sequence[Source]) -> None:
    """Raise ConfigError unless `EngineConfig.speculation` is something that there is with these drafters."""
    known = ("auto", "none", *(source.name for source in sources), "prediction")
    if speculation not in known:
        listed = ", ".join(map(repr, known))
        raise ConfigError(f"speculation is {speculation!r}, but with these drafters it can be one of {listed}")
