"""The registry of drafters: their kinds, their names in a configuration, and how they are loaded and made.

A new drafter is one file beside this one and one line in `REGISTRY`. The line names the drafter's module, which is
imported when an engine needs it: the server, the planner and the command line read the registry without torch.

A module of a lookup drafter has a function `make(config) -> Drafter`. A module of a model-based drafter has a function
`load(name, files, target, platform, config, progress, comm) -> LoadedDraft` (see `drafter`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pilotfish.checkpoints.catalog import DRAFTS, ModelFiles, Progress, resolve
from pilotfish.checkpoints.huggingface import is_dflash, is_dspark, is_eagle3
from pilotfish.errors import ConfigError

if TYPE_CHECKING:
    from pilotfish.engine.config import EngineConfig
    from pilotfish.engine.execution.platform import Platform
    from pilotfish.engine.layers.communicator import Communicator
    from pilotfish.engine.models.decoder_model import CausalModel
    from pilotfish.engine.speculation.drafters.drafter import Drafter, LoadedDraft


@dataclass(frozen=True, slots=True)
class DrafterKind:
    """A kind of drafter: a lookup drafter, which needs no files, or a model-based one, whose files `recognise`
    recognises."""

    name: str
    """A lookup drafter's name in `--drafter`, requests and metrics; of a model-based drafter, what its files are."""
    prior: float
    """Probability that the first token of a draft is accepted, assumed until the engine has seen some."""
    module: str = ""
    """The module that implements it; by default this package's module of the kind's name."""
    always: bool = False
    """Whether every engine loads it without being asked: it costs nothing until a request has what it drafts from."""
    recognise: Callable[[ModelFiles], bool] | None = None
    """Whether a model's files are of this kind. None for a lookup drafter. Raises ModelError for unreadable files."""
    remembers: bool = False
    """Whether it needs `EngineConfig.suffix_memory`."""
    sharded: bool = False
    """Whether `draft_tensor_parallel_size` shards it; otherwise rank 0 holds it whole."""

    @property
    def needs_files(self) -> bool:
        return self.recognise is not None

    def implementation(self) -> Any:
        """Import the module with the kind's `make` or `load`."""
        return import_module(self.module or f"{__package__}.{self.name.replace('-', '_')}")


def _is_eagle3(files: ModelFiles) -> bool:
    return files.format == "huggingface" and is_eagle3(files.path)


def _is_dflash(files: ModelFiles) -> bool:
    return files.format == "huggingface" and is_dflash(files.path)


def _is_dspark(files: ModelFiles) -> bool:
    return files.format == "huggingface" and is_dspark(files.path)


REGISTRY: tuple[DrafterKind, ...] = (
    DrafterKind("ngram", prior=0.35),
    DrafterKind("suffix", prior=0.35),
    DrafterKind("suffix-memory", prior=0.5, remembers=True),
    DrafterKind("prediction", prior=0.8, always=True),
    DrafterKind("grammar", prior=0.95, always=True),
    DrafterKind("eagle3", prior=0.5, recognise=_is_eagle3),
    DrafterKind("dflash", prior=0.5, recognise=_is_dflash),
    DrafterKind("dspark", prior=0.5, module=f"{__package__}.dflash", recognise=_is_dspark),
    # Last, since any model with the target's vocabulary can draft.
    DrafterKind("draft-model", prior=0.6, recognise=lambda files: True, sharded=True),
)


@dataclass(frozen=True, slots=True)
class Source:
    """A drafter named in a configuration, before it is loaded."""

    name: str
    """Its name in requests, metrics and timings."""
    kind: DrafterKind
    files: ModelFiles | None = None
    """The model's files; None for a lookup drafter."""


def lookup_names() -> tuple[str, ...]:
    """Return the lookup drafters that `--drafter` can name."""
    return tuple(kind.name for kind in REGISTRY if not kind.needs_files and not kind.always)


def kind_of(files: ModelFiles) -> DrafterKind:
    """Return the kind of drafter of these files. Raises ModelError for files that cannot be read."""
    return next(kind for kind in REGISTRY if kind.recognise is not None and kind.recognise(files))


def default_entries(target_name: str, memory: bool = True) -> tuple[str, ...]:
    """Return the default of `EngineConfig.drafter` for a target: all lookup drafters (without `memory`, those that do
    not need it), and the drafts that come with the target."""
    forgetful = {kind.name for kind in REGISTRY if kind.remembers and not memory}
    return (*(name for name in lookup_names() if name not in forgetful), *DRAFTS.get(target_name, ()))


def parse_entries(entries: Sequence[str]) -> list[tuple[str, str]]:
    """Return (name, drafter) of each entry of `EngineConfig.drafter`; the name is "" where it follows from the files.

    Raises ConfigError for an entry that is empty, given twice, or whose name is taken.
    """
    parsed, lookups = [], lookup_names()
    for entry in entries:
        name, what = "", entry
        if (match := re.fullmatch(r"([A-Za-z0-9][\w.-]*)=(.+)", entry)) is not None:
            name, what = match[1], match[2]
        if not what.strip():
            raise ConfigError(f"drafter is empty: give it {', '.join(map(repr, lookups))} or a model, or leave it out")
        if name in _reserved():
            raise ConfigError(f"drafter is {entry!r}, but a draft model cannot be called {name!r}: choose another name")
        if name and what in lookups:
            raise ConfigError(f"drafter is {entry!r}, but {what!r} keeps its name: only a model can be given another")
        parsed.append((what if what in lookups else name, what))
    names = [name for name, _ in parsed if name]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"drafter has {name!r} twice: give each of them a name of its own, as NAME=MODEL")
    return parsed


def find(
    entries: Sequence[str], target_name: str, progress: Progress | None = None, memory: bool = True
) -> list[Source]:
    """Return the drafters that `EngineConfig.drafter` names for a target (`default_entries` if it names none), then
    those that are always loaded. `memory`: whether there is any for past texts.

    Downloads files that are not on this machine yet. Raises ConfigError for names that are not unique, ModelError for a
    model that cannot be found or read.
    """
    found = []
    lookups = {kind.name: kind for kind in REGISTRY if kind.name in lookup_names()}
    for name, what in parse_entries(entries or default_entries(target_name, memory)):
        if what in lookups:
            found.append(Source(name, lookups[what]))
        else:
            files = resolve(what, progress)
            found.append(Source(name or files.name, kind_of(files), files))
    for source in found:
        if source.files is not None and source.name in _reserved():
            raise ConfigError(f"a draft model cannot be called {source.name!r}: name it, as NAME={source.files.path}")
        if sum(other.name == source.name for other in found) > 1:
            raise ConfigError(f"two drafters are called {source.name!r}: give one another name, as NAME=MODEL")
    return [*found, *(Source(kind.name, kind) for kind in REGISTRY if kind.always)]


def check_speculation(speculation: str, sources: Sequence[Source]) -> None:
    """Raise ConfigError unless `EngineConfig.speculation` is "auto", "none" or the name of one of these drafters."""
    known = ("auto", "none", *(source.name for source in sources))
    if speculation not in known:
        listed = ", ".join(map(repr, known))
        raise ConfigError(f"speculation is {speculation!r}, but with these drafters it can be one of {listed}")


def priors(sources: Iterable[Source]) -> dict[str, float]:
    """Return each drafter's prior, by name."""
    return {source.name: source.kind.prior for source in sources}


def make_lookups(sources: Iterable[Source], config: EngineConfig) -> list[Drafter]:
    """Make the lookup drafters among `sources`."""
    return [source.kind.implementation().make(config) for source in sources if not source.kind.needs_files]


def load_draft(
    source: Source,
    target: CausalModel,
    platform: Platform,
    config: EngineConfig,
    progress: Progress,
    comm: Communicator,
) -> LoadedDraft:
    """Load the weights of a model-based drafter; `source.files` must not be None. `comm`: of the ranks that share it,
    which only a kind that is `sharded` uses.

    Raises ConfigError for a draft that does not fit the target, ModelError for one that cannot be read.
    """
    loaded: LoadedDraft = source.kind.implementation().load(
        source.name, source.files, target, platform, config, progress, comm
    )
    return loaded


def _reserved() -> set[str]:
    """Return names with another meaning, which no draft model can have."""
    return {"auto", "none", "off", "vanilla"} | {kind.name for kind in REGISTRY if not kind.needs_files}
