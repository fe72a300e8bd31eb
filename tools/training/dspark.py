"""DSparkDraft: DSpark's heads of `engine.models.dspark` with gradients, over whole blocks of the text at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from pilotfish.engine.models.config import DFlashConfig


class MarkovHead(nn.Module):
    """Parameters are named as the tensors in `engine.models.dflash_checkpoint`."""

    def __init__(self, config: DFlashConfig) -> None:
        super().__init__()
        self._kind, rank, hidden = config.sequential, config.rank, config.decoder.hidden_size
        self.markov_w1 = nn.Embedding(config.decoder.vocab_size, rank)
        nn.init.normal_(self.markov_w1.weight, std=0.01)
        self.markov_w2 = nn.Linear(rank, config.draft_vocab_size, bias=False)
        if self._kind == "gated":
            self.gate_proj = nn.Linear(hidden + rank, rank)
        elif self._kind == "rnn":
            self.joint_proj = nn.Linear(2 * rank + hidden, 3 * rank)

    def latent(self, hidden: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        """Return what `markov_w2` makes the bias of: (..., positions, rank), from the rows' hidden states, (...,
        positions, hidden_size), and the embeddings of the tokens before, (..., positions, rank)."""
        if self._kind == "gated":
            return torch.sigmoid(self.gate_proj(torch.cat((hidden, embedded), -1))) * embedded
        if self._kind == "vanilla":
            return embedded
        state, found = torch.zeros_like(embedded[..., 0, :]), []
        for row, token in zip(hidden.unbind(-2), embedded.unbind(-2), strict=True):
            gate, candidate, out = self.joint_proj(torch.cat((state, token, row), -1)).chunk(3, dim=-1)
            gate = torch.sigmoid(gate)
            state = gate * state + (1.0 - gate) * torch.tanh(candidate)
            found.append(torch.tanh(out))
        return torch.stack(found, -2)


class ConfidenceHead(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.proj = nn.Linear(inputs, 1)
        nn.init.zeros_(self.proj.weight)


class DSparkDraft(nn.Module):
    """Both heads; the confidence head reads the token before, too."""

    def __init__(self, config: DFlashConfig) -> None:
        super().__init__()
        self.markov_head = MarkovHead(config)
        self.confidence_head = ConfidenceHead(config.decoder.hidden_size + config.rank)

    def forward(
        self,
        hidden: torch.Tensor,  # (batch, blocks, positions, hidden_size)
        before: torch.Tensor,  # (batch, blocks, positions) int64: the token before each that is predicted
        wanted: torch.Tensor,  # (batch, blocks, positions) bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the bias of the wanted rows' logits, (rows, draft_vocab_size), and the logits of their confidences,
        (rows,) float32."""
        embedded = F.embedding(before, self.markov_head.markov_w1.weight).to(hidden.dtype)
        bias = self.markov_head.markov_w2(self.markov_head.latent(hidden, embedded)[wanted])
        read = torch.cat((hidden[wanted], embedded[wanted]), -1)
        return bias, self.confidence_head.proj(read).squeeze(-1).float()
