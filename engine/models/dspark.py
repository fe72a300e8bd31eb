"""DSpark's heads over the rows of a DFlash block (the paper in github.com/deepseek-ai/DeepSpec).

A block's tokens are computed without knowing each other. The sequential head corrects that as they are drawn, one after
the other: it adds a bias of low rank to a token's logits that depends on the token before (and for "rnn" on all drafted
before). The confidence head predicts from the same how likely the token is to be accepted.
"""

from __future__ import annotations

from typing import Any

import torch

from pilotfish.engine.kernels.protocol import Kernels
from pilotfish.engine.models.config import DFlashConfig
from pilotfish.engine.models.weight_store import WeightStore


class DSparkHeads:
    """The sequential head, the confidence head, or both, as `config` has them."""

    def __init__(self, config: DFlashConfig, kernels: Kernels[Any], store: WeightStore) -> None:
        self._config, self._kernels = config, kernels
        self._confidence = store.linear("confidence_head.proj") if config.confidence else None
        self._gate = self._joint = None
        if config.rank:
            self._embedding, self._out = store.linear("markov_head.markov_w1"), store.linear("markov_head.markov_w2")
            if config.sequential == "gated":
                self._gate = store.linear("markov_head.gate_proj")
            elif config.sequential == "rnn":
                self._joint = store.linear("markov_head.joint_proj")

    @property
    def has_confidence(self) -> bool:
        return self._confidence is not None

    def first_state(self, hidden: torch.Tensor) -> torch.Tensor:
        """The state before a block's first token, of these rows, (rows, hidden_size): (rows, rank)."""
        return hidden.new_zeros(len(hidden), self._config.rank)

    def step(
        self,
        hidden: torch.Tensor,  # (rows, hidden_size): of the row that drafts, normed
        tokens: torch.Tensor,  # (rows,) int64: the tokens before, target's ids
        state: torch.Tensor,  # (rows, rank)
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
        """Return the bias of the logits, (rows, draft_vocab_size), the confidence, (rows,) float32, and the next state.
        What there is no head for is None."""
        kernels = self._kernels
        if not self._config.rank:
            return None, self._confident(hidden), state
        embedded = kernels.embed(tokens, self._embedding)
        latent = embedded
        if self._gate is not None:
            latent = torch.sigmoid(kernels.linear(torch.cat((hidden, embedded), 1), self._gate)) * embedded
        elif self._joint is not None:
            gate, candidate, out = kernels.linear(torch.cat((state, embedded, hidden), 1), self._joint).chunk(3, dim=1)
            gate = torch.sigmoid(gate)
            state = gate * state + (1.0 - gate) * torch.tanh(candidate)
            latent = torch.tanh(out)
        given = torch.cat((hidden, embedded), 1) if self._config.confidence_reads_token else hidden
        return kernels.linear(latent, self._out), self._confident(given), state

    def _confident(self, given: torch.Tensor) -> torch.Tensor | None:
        if self._confidence is None:
            return None
        return torch.sigmoid(self._kernels.linear(given, self._confidence).squeeze(1).float())
