"""What a drafter is: it proposes the next tokens of some sequences. Each is a file beside this one, and a line in
`registry`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

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
    from pilotfish.engine.models.decoder_model import DecoderModel
    from pilotfish.engine.models.features import FeatureRows


@dataclass(frozen=True, slots=True)
class DraftRequest:
    """Ask for at most `limit` (>= 1) tokens to follow `sequence.tokens`."""

    sequence: Sequence
    limit: int
    floor: float = 0.0
    """A drafter that knows how confident it is may stop where the product of its tokens' confidences is below this:
    more would not pay."""


class Drafter(Protocol):
    """A lookup drafter, or what all drafters have in common.

    Proposals never change the text, only its speed: a drafter may be wrong, and may propose fewer tokens or none. It
    reads `sequence.tokens` when asked and catches up with what was added since it last saw the sequence; it is not told
    of acceptance. Tokens that it saw never change (a sequence only grows).

    A drafter that is nothing more than this takes no time worth counting and is asked at every step; one that computes
    is a `ModelDrafter`.
    """

    name: str
    """As requests, metrics and timings call it; no two of an engine have the same."""

    def propose(self, requests: list[DraftRequest]) -> list[Draft]:
        """One Draft for each of `requests`, in their order."""
        ...

    def release(self, sequence: Sequence) -> None:
        """Forget a sequence that has ended (or was never seen): its memory is free afterwards."""
        ...


class ModelDrafter(Drafter, Protocol):
    """A drafter that computes: in passes over rows, the first of which also reads what is new of each sequence, and
    each makes a token for every sequence whose draft still grows."""

    passes: tuple[int, ...]
    """Rows of each pass of the last `propose`."""

    def backlog(self, sequence: Sequence) -> int:
        """Rows of the sequence that a draft's first pass has to read: its last token at least."""
        ...

    def try_pass(self, rows: int) -> None:
        """Compute a pass over so many rows, to measure what it takes. Only before there are sequences."""
        ...

    def capture(self, planned: Callable[[tuple[int, ...]], GraphPlan]) -> None:
        """Capture its passes as graphs; `planned` makes a plan for spans of these lengths."""
        ...


@runtime_checkable
class FeatureReader(Protocol):
    """A drafter that reads the target's hidden states."""

    name: str
    feature_layers: tuple[int, ...]
    """Whose inputs it reads, as `engine.models.features.FeatureTap` numbers them."""

    def observe_features(self, sequence: Sequence, start: int, features: FeatureRows) -> None:
        """The target has computed positions [start, start + len(features)) of `sequence`, none of which will change:
        features of len(feature_layers) * hidden_size, which may be kept and are not written to."""
        ...


MakeRunner = Callable[["DecoderModel", "list[LayerCache]"], "ModelRunner"]
"""Makes the runner of a model of the target's kind, with its caches."""


@dataclass(frozen=True, slots=True)
class LoadedDraft:
    """A draft whose weights are loaded. Its KV cache is not allocated yet: it is sized once all models are loaded."""

    name: str
    model: Any
    shape: ModelConfig
    """Shape of the layers that have a KV cache."""
    make: Callable[[ModelConfig, EngineConfig, list[LayerCache], int, torch.device, MakeRunner], ModelDrafter]
    """Makes it a drafter for a target of this shape, with caches of so many blocks for sequences, as many as the
    target's."""
    ranks: int = 1
    """Number of ranks that `model` is sharded over; 1: rank 0 has it whole."""


def check_vocabulary(name: str, draft: ModelConfig, target: ModelConfig) -> None:
    """Raise ConfigError unless draft and target have as many tokens."""
    if draft.vocab_size != target.vocab_size:
        raise ConfigError(
            f"drafter {name!r} has a vocabulary of {draft.vocab_size} tokens, the target of {target.vocab_size}: a "
            "draft needs the target's own tokenizer"
        )
