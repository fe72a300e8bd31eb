"""TrainSettings: the settings of a training run, whose fields are the flags of `pilotfish train-draft`. No torch."""

from __future__ import annotations

from typing import Literal, get_args

import msgspec

from pilotfish.engine.config import NotNegative, Positive
from pilotfish.engine.models.config import Sequential

Kind = Literal["eagle3", "draft-model", "dflash", "dspark"]
Objective = Literal["lk", "kl", "tv", "lk-log", "ce", "ce-tv"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
BLOCKS: tuple[Kind, ...] = ("dflash", "dspark")
"""Kinds that draft a block in one pass."""
PUBLISHED: dict[Kind, Objective] = {"eagle3": "lk", "draft-model": "lk", "dflash": "ce", "dspark": "ce-tv"}
"""The objective of each kind unless another is chosen."""


class TrainSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """msgspec raises ValidationError for a value of the wrong type; `tools.training.pipeline` checks the rest."""

    kind: Kind = "eagle3"
    """Kind of draft: an EAGLE-3 head, a small Llama, or a block drafter, DFlash or DSpark."""
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
    objective: Literal["default", "lk", "kl", "tv", "lk-log", "ce", "ce-tv"] = "default"
    """Loss to minimize; default: lk, ce for dflash, ce-tv for dspark. See docs/training.md."""
    unroll: int = 3
    """eagle3, draft-model: drafted tokens that training unrolls the draft over."""
    draft_vocab_size: int = 8192
    """eagle3, dflash, dspark: size of the draft's vocabulary, the target's most frequent tokens."""
    feature_layers: tuple[int, ...] = ()
    """eagle3, dflash, dspark: layers of the target whose inputs the draft reads; empty: a third, two thirds, and all of
    the way through."""
    block_size: Positive = 8
    """dflash, dspark: rows of a block. dspark drafts as many tokens, dflash one less."""
    blocks: Positive = 16
    """dflash, dspark: blocks that are drawn of each conversation in a step."""
    decay: float = 4.0
    """dflash, dspark: a position of a block weighs exp(-1 / decay) as much as the one before."""
    hidden_size: NotNegative = 0
    """draft-model: hidden size; 0: the target's."""
    num_layers: Positive = 2
    """draft-model, dflash, dspark: number of layers."""
    intermediate_size: NotNegative = 0
    """Intermediate size of the MLP; 0: the target's, in proportion to hidden_size."""
    markov_rank: Positive = 64
    """dspark: rank of the bias by which a token's logits depend on the token before."""
    markov_head: Sequential = "vanilla"
    """dspark: what the bias depends on: the token before; gated by the row's hidden state; or, rnn, all tokens drafted
    before."""
    seed: int = 0
    """Seed of text and training."""
    bfloat16: bool = False
    """Compute matrix products in bfloat16: faster on processors with bfloat16 units, slower on others."""


def objective_of(settings: TrainSettings) -> Objective:
    return PUBLISHED[settings.kind] if settings.objective == "default" else settings.objective
