"""EAGLE-3's draft as something to train: `engine.models.eagle3` with gradients, unrolled over several drafted tokens.

Training-time test (arXiv 2503.01840, section 3.2): after the first step the draft reads its own output in the place of
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


class Eagle3Draft(nn.Module):
    """Parameters have the last names of `engine.weights.eagle3`'s tensors."""

    embedding: torch.Tensor
    cos_sin: torch.Tensor

    def __init__(self, config: Eagle3Config, embedding: torch.Tensor, max_position: int) -> None:
        """`embedding`: the target's, (vocab_size, hidden_size); it is not trained."""
        super().__init__()
        self.config = config
        decoder = config.decoder
        hidden, inner = decoder.hidden_size, decoder.intermediate_size
        queries, keys = decoder.num_heads * decoder.head_dim, decoder.num_kv_heads * decoder.head_dim

        def matrix(out: int, into: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(out, into) * into**-0.5)

        def ones() -> nn.Parameter:
            return nn.Parameter(torch.ones(hidden))

        self.fc = matrix(hidden, len(config.feature_layers) * config.target_hidden_size)
        self.input_layernorm, self.hidden_norm, self.post_attention_layernorm = ones(), ones(), ones()
        self.q_proj, self.k_proj, self.v_proj = (matrix(size, 2 * hidden) for size in (queries, keys, keys))
        self.o_proj = matrix(hidden, queries)
        self.gate_proj, self.up_proj, self.down_proj = (
            matrix(inner, hidden),
            matrix(inner, hidden),
            matrix(hidden, inner),
        )
        self.norm = ones()
        self.lm_head = matrix(config.draft_vocab_size, hidden)
        self.register_buffer("embedding", embedding, persistent=False)
        self.register_buffer("cos_sin", cos_sin_table(decoder.rope, decoder.head_dim, max_position), persistent=False)

    def unroll(
        self,
        features: torch.Tensor,  # (batch, length, layers * hidden_size)
        tokens: torch.Tensor,  # (batch, length) int64
        steps: int,
    ) -> Iterator[torch.Tensor]:
        """Hidden states before the norm, (batch, length, hidden_size), for each of `steps`: that of anchor a in step j
        predicts the token at a + j + 2. Those past the end of a conversation mean nothing."""
        hidden = F.linear(features, self.fc)
        length = tokens.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
        true_keys = true_values = None
        drafted: list[tuple[torch.Tensor, torch.Tensor]] = []
        for step in range(steps):
            following = F.pad(tokens[:, step + 1 :], (0, step + 1))
            embedded = self._norm(F.embedding(following, self.embedding), self.input_layernorm)
            x = torch.cat((embedded, self._norm(hidden, self.hidden_norm)), dim=-1)
            query, key, value = self._heads(x, step)
            if true_keys is None or true_values is None:
                true_keys, true_values = key, value
                attended = F.scaled_dot_product_attention(query, key, value, attn_mask=causal)
            else:
                drafted.append((key, value))
                attended = _attend(query, true_keys, true_values, causal, drafted)
            attended = attended.transpose(1, 2).flatten(2)
            hidden = hidden + F.linear(attended, self.o_proj)
            y = self._norm(hidden, self.post_attention_layernorm)
            hidden = hidden + F.linear(F.silu(F.linear(y, self.gate_proj)) * F.linear(y, self.up_proj), self.down_proj)
            yield hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(rows, hidden_size) -> (rows, draft_vocab_size)."""
        return F.linear(self._norm(hidden, self.norm), self.lm_head)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, weight.shape, weight, self.config.decoder.rms_norm_eps)

    def _heads(self, x: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value of all heads, (batch, heads, length, head_dim); a row of step j stands j further on."""
        decoder = self.config.decoder
        group = decoder.num_heads // decoder.num_kv_heads
        table = self.cos_sin[step : step + x.shape[1]]

        def heads(weight: torch.Tensor, count: int) -> torch.Tensor:
            return F.linear(x, weight).unflatten(-1, (count, decoder.head_dim)).transpose(1, 2)

        query = rotate(heads(self.q_proj, decoder.num_heads), table)
        key = rotate(heads(self.k_proj, decoder.num_kv_heads), table)
        value = heads(self.v_proj, decoder.num_kv_heads)
        if group > 1:
            key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
        return query, key, value


def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    cosine, sine = table.to(x.dtype).chunk(2, dim=-1)  # (length, head_dim / 2) each
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cosine - high * sine, high * cosine + low * sine), dim=-1)


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    causal: torch.Tensor,
    drafted: list[tuple[torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    """Each anchor over the true rows up to itself, and over its own chain's rows: (batch, heads, length, head_dim)."""
    scale = query.shape[-1] ** -0.5
    scores = (query @ keys.transpose(-1, -2) * scale).masked_fill(~causal, float("-inf"))
    own = torch.stack([(query * key).sum(-1) * scale for key, _ in drafted], dim=-1)  # (batch, heads, length, chain)
    weights = torch.softmax(torch.cat((scores, own), dim=-1).float(), dim=-1).to(query.dtype)
    length = keys.shape[2]
    out = weights[..., :length] @ values
    for i, (_, value) in enumerate(drafted):
        out = out + weights[..., length + i, None] * value
    return out
