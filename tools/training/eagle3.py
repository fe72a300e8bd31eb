"""Eagle3Draft: the EAGLE-3 head of `engine.models.eagle3` with gradients, unrolled over several drafted tokens.

Training-time test (arXiv 2503.01840, section 3.2): after the first step the draft reads its own output instead of
the target's features, as it will when it drafts. All anchors are unrolled at once: the chain that starts at position a
sees the true rows up to a, and its own rows after that.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from pilotfish.engine.models.config import Eagle3Config
from pilotfish.engine.models.rope import cos_sin_table
from pilotfish.tools.training.layer import (
    add_attended_and_mlp,
    add_matrices,
    add_norms,
    matrix,
    norm,
    query_key_value,
)


class Eagle3Draft(nn.Module):
    """Parameters are named by the last parts of the names in `engine.models.eagle3_checkpoint`."""

    input_layernorm: nn.Parameter
    hidden_norm: nn.Parameter
    norm: nn.Parameter
    embedding: torch.Tensor
    cos_sin: torch.Tensor

    def __init__(self, config: Eagle3Config, embedding: torch.Tensor, max_position: int) -> None:
        """`embedding`: the target's, (vocab_size, hidden_size); it is not trained."""
        super().__init__()
        self.config = config
        decoder = config.decoder
        self.fc = matrix(decoder.hidden_size, len(config.feature_layers) * config.target_hidden_size)
        add_norms(self, decoder.hidden_size, "input_layernorm", "hidden_norm", "post_attention_layernorm")
        add_matrices(self, decoder, inputs=2 * decoder.hidden_size)
        add_norms(self, decoder.hidden_size, "norm")
        self.lm_head = matrix(config.draft_vocab_size, decoder.hidden_size)
        self.register_buffer("embedding", embedding, persistent=False)
        self.register_buffer("cos_sin", cos_sin_table(decoder.rope, decoder.head_dim, max_position), persistent=False)

    def unroll(
        self,
        features: torch.Tensor,  # (batch, length, layers * hidden_size)
        tokens: torch.Tensor,  # (batch, length) int64
        steps: int,
    ) -> Iterator[torch.Tensor]:
        """Yield the hidden states before the norm, (batch, length, hidden_size), of each step: that of anchor a in step
        j predicts the token at a + j + 2. Those past the end of a conversation are meaningless."""
        decoder = self.config.decoder
        group = decoder.num_heads // decoder.num_kv_heads
        hidden = F.linear(features, self.fc)
        length = tokens.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
        rows: list[tuple[torch.Tensor, torch.Tensor]] = []
        for step in range(steps):
            following = F.pad(tokens[:, step + 1 :], (0, step + 1))
            embedded = norm(F.embedding(following, self.embedding), self.input_layernorm, decoder)
            x = torch.cat((embedded, norm(hidden, self.hidden_norm, decoder)), dim=-1)
            # A row of step j is j positions further on.
            query, key, value = query_key_value(self, x, decoder, self.cos_sin[step : step + length])
            if group > 1:
                key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
            rows.append((key, value))
            if step == 0:
                attended = F.scaled_dot_product_attention(query, key, value, attn_mask=causal)
            else:
                attended = _attend(query, *rows[0], causal, rows[1:])
            hidden = add_attended_and_mlp(self, hidden, attended, decoder)
            yield hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(rows, hidden_size) -> (rows, draft_vocab_size)."""
        return F.linear(norm(hidden, self.norm, self.config.decoder), self.lm_head)


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    causal: torch.Tensor,
    drafted: list[tuple[torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    """Attend from each anchor to the true rows up to itself and to its chain's: (batch, heads, length, head_dim)."""
    scale = query.shape[-1] ** -0.5
    scores = (query @ keys.transpose(-1, -2) * scale).masked_fill(~causal, float("-inf"))
    own = torch.stack([(query * key).sum(-1) * scale for key, _ in drafted], dim=-1)  # (batch, heads, length, chain)
    weights = torch.softmax(torch.cat((scores, own), dim=-1).float(), dim=-1).to(query.dtype)
    length = keys.shape[2]
    out = weights[..., :length] @ values
    for i, (_, value) in enumerate(drafted):
        out = out + weights[..., length + i, None] * value
    return out
