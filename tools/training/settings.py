"""TrainSettings: the settings of a training run, whose fields are the flags of `pilotfish train-draft`. No torch."""

from __future__ import annotations

from typing import Literal, get_args

import msgspec

from pilotfish.engine.config import NotNegative, Positive

Kind = Literal["eagle3", "draft-model"]
Objective = Literal["lk", "kl", "tv", "lk-log"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)


class TrainSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """msgspec raises ValidationError for a value of the wrong type; `tools.training.pipeline` checks the rest."""

    kind: Kind = "eagle3"
    """Kind of draft: an EAGLE-3 head, or a small Llama."""
    tokens: Positive = 1_000_000
    """Tokens of training text."""
    turn_tokens: Positive = 64
    """Maximum number of tokens of a prompt that the target makes up."""
    answer_tokens: Positive = 192
    """Maximum number of tokens of an answer."""
    steps: NotNegative = 0
    """Optimizer steps; 0: as many as `epochs` passes over the text take."""
    epochs: float = 3.0
    """Passes over the training text, unless `steps` is set."""
    batch_tokens: Positive = 2048
    """Tokens of an optimizer step."""
    learning_rate: float = 1e-3
    """Peak learning rate, after a linear warm-up and before a cosine decay to a tenth."""
    objective: Objective = "lk"
    """Loss to minimize; see docs/training.md."""
    unroll: int = 3
    """Drafted tokens that training unrolls the draft over."""
    draft_vocab_size: int = 8192
    """eagle3: size of the draft's vocabulary, the target's most frequent tokens."""
    feature_layers: tuple[int, ...] = ()
    """eagle3: layers of the target whose inputs the draft reads; empty: a third, two thirds, and all of the way
    through."""
    hidden_size: NotNegative = 0
    """draft-model: hidden size; 0: the target's."""
    num_layers: Positive = 2
    """draft-model: number of layers."""
    intermediate_size: NotNegative = 0
    """Intermediate size of the MLP; 0: the target's, in proportion to hidden_size."""
    seed: int = 0
    """Seed of text and training."""
    bfloat16: bool = False
    """Compute matrix products in bfloat16: faster on processors with bfloat16 units, slower on others."""
