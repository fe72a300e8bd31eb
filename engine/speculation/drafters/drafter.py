"""The interfaces of drafters, which propose the next tokens of sequences. Each drafter is a file beside this one, and a
line in `registry`."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from pilotfish.engine.draft import Draft
from pilotfish.engine.sequence import Sequence
from pilotfish.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from pilotfish.engine.config import EngineConfig
    from pilotfish.engine.execution.graphs import GraphPlan
    from pilotfish.engine.execution.runner import ModelRunner
    from pilotfish.engine.layers.attention.backend import LayerCache
    from pilotfish.engine.models.config import ModelConfig
    from pilotfish.engine.models.decoder_model import CausalModel
    from pilotfish.engine.models.features import FeatureRows


@dataclass(frozen=True, slots=True)
class DraftRequest:
    """A request for at most `limit` (>= 1) tokens to follow `sequence.tokens`."""

    sequence: Sequence
    limit: int
    floor: float = 0.0
    """A drafter with confidences may stop where the product of its tokens' confidences falls below this, since more
    would not pay."""


class Drafter(Protocol):
    """The interface of every drafter, and all of a lookup drafter.

    Proposals never change the text, only its speed: a drafter may be wrong, and may propose fewer tokens or none. It
    reads `sequence.tokens` when asked and catches up with what was added since; acceptance is not reported to it.
    Tokens that it has read never change (a sequence only grows).

    A lookup drafter takes a negligible time and is asked at every step; one that computes is a `ModelDrafter`.
    """

    name: str
    """Its name in requests, metrics and timings, unique in an engine."""

    def propose(self, requests: list[DraftRequest]) -> list[Draft]:
        """Return one Draft for each of `requests`, in order."""
        ...

    def release(self, sequence: Sequence) -> None:
        """Free what is kept of a sequence that has ended (or was never seen)."""
        ...


@runtime_checkable
class LongDrafter(Drafter, Protocol):
    """A lookup drafter whose drafts may be longer than `num_draft_tokens`."""

    longest: int
    """Their maximum tokens."""


class PastUse(NamedTuple):
    """What a memory of past texts holds, and how often it was of use since the last time it was asked."""

    nbytes: int = 0
    queries: int = 0
    """Decoding sequences for which it was asked, once for each step."""
    hits: int = 0
    """Those of them for which it had a draft."""


@runtime_checkable
class RememberingDrafter(Drafter, Protocol):
    """A drafter that keeps past texts."""

    def take_use(self) -> PastUse:
        """Return what it holds, and its uses since the last call."""
        ...

    def warm(self, texts: Seq[list[int]]) -> None:
        """Draft from these texts, too, for everybody. Before there are sequences. Raises ConfigError if they are more
        than it can hold."""
        ...


class ModelDrafter(Drafter, Protocol):
    """A drafter that computes, in passes over rows. The first pass also reads the new tokens of each sequence, and each
    pass drafts a token for every sequence whose draft still grows."""

    passes: tuple[int, ...]
    """Number of rows of each pass of the last `propose`."""
    block: int
    """Rows of the one pass that drafts all tokens of a sequence; 0: each pass drafts one of them."""

    def backlog(self, sequence: Sequence) -> int:
        """Return the rows of a draft's first pass for the sequence: those that it has to read, at least its last token;
        and those of `block`."""
        ...

    def try_pass(self, rows: int) -> None:
        """Compute a pass over `rows` rows, to be timed. Only before there are sequences."""
        ...

    def capture(self, planned: Callable[[], GraphPlan]) -> None:
        """Capture its passes as graphs; `planned` makes the plan."""
        ...


@runtime_checkable
class FeatureReader(Protocol):
    """A drafter that reads the target's hidden states."""

    name: str
    feature_layers: tuple[int, ...]
    """The layers whose inputs it reads, as `engine.models.features.FeatureTap` numbers them."""

    def observe_features(self, sequence: Sequence, start: int, features: FeatureRows) -> None:
        """Receive the features of positions [start, start + len(features)) of `sequence`, which are final: each has
        len(feature_layers) * hidden_size numbers. They may be kept, and must not be written to."""
        ...


MakeRunner = Callable[["CausalModel", "list[LayerCache]"], "ModelRunner"]
"""Makes the runner of a model of the target's kind, with the given caches."""


@dataclass(frozen=True, slots=True)
class LoadedDraft:
    """A loaded draft model or head. Its KV cache is allocated later, once all models are loaded."""

    name: str
    model: Any
    shape: ModelConfig
    """Shape of the layers that have a KV cache."""
    make: Callable[[ModelConfig, EngineConfig, list[LayerCache], int, torch.device, MakeRunner], ModelDrafter]
    """Makes its drafter from the target's shape, the configuration, its caches, their number of blocks (as many as the
    target's), the device, and a maker of runners."""
    ranks: int = 1
    """Number of ranks that `model` is sharded over; 1: rank 0 holds it whole."""


def check_vocabulary(name: str, draft: ModelConfig, target: ModelConfig) -> None:
    """Raise ConfigError unless draft and target have vocabularies of the same size."""
    if draft.vocab_size != target.vocab_size:
        raise ConfigError(
            f"drafter {name!r} has a vocabulary of {draft.vocab_size} tokens, the target of {target.vocab_size}: a "
            "draft needs the target's own tokenizer"
        )
