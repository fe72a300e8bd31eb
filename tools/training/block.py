"""BlockDraft: the block drafter of `engine.models.dflash` with gradients, over many blocks of a conversation at once.

Each block begins at an anchor, a token of the text, and sees the features of the positions before it and its own rows,
but no other block (arXiv 2602.06036, section 4.2).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from pilotfish.engine.models.config import DFlashConfig
from pilotfish.engine.models.rope import cos_sin_table
from pilotfish.tools.training.layer import add_attended_and_mlp, add_matrices, add_norms, heads, matrix, norm, rotated


class _Layer(nn.Module):
    """Parameters are named by the last parts of Hugging Face's tensor names, those of Qwen3."""

    input_layernorm: nn.Parameter
    q_norm: nn.Parameter
    k_norm: nn.Parameter
    q_proj: nn.Parameter
    k_proj: nn.Parameter
    v_proj: nn.Parameter

    def __init__(self, config: DFlashConfig) -> None:
        super().__init__()
        self.decoder = config.decoder
        add_norms(self, self.decoder.hidden_size, "input_layernorm", "post_attention_layernorm")
        add_norms(self, self.decoder.head_dim, "q_norm", "k_norm")
        add_matrices(self, self.decoder, inputs=self.decoder.hidden_size)

    def forward(
        self,
        context: torch.Tensor,  # (batch, length, hidden_size)
        hidden: torch.Tensor,  # (batch, rows, hidden_size)
        seen: torch.Tensor,  # (batch, 1, rows, length + rows) bool
        tables: tuple[torch.Tensor, torch.Tensor],  # cosines and sines of the context and of the rows
    ) -> torch.Tensor:
        decoder = self.decoder
        x = norm(hidden, self.input_layernorm, decoder)
        query = rotated(norm(heads(x, self.q_proj, decoder), self.q_norm, decoder), tables[1])
        keys, values = [], []
        for part, table in zip((context, x), tables, strict=True):
            keys.append(rotated(norm(heads(part, self.k_proj, decoder), self.k_norm, decoder), table))
            values.append(heads(part, self.v_proj, decoder))
        grouped = decoder.num_heads != decoder.num_kv_heads
        attended = F.scaled_dot_product_attention(
            query, torch.cat(keys, 2), torch.cat(values, 2), attn_mask=seen, enable_gqa=grouped
        )
        return add_attended_and_mlp(self, hidden, attended, decoder)


class BlockDraft(nn.Module):
    """Parameters are named as the tensors in `engine.models.dflash_checkpoint`, but for a layer's "self_attn." and
    "mlp."."""

    hidden_norm: nn.Parameter
    norm: nn.Parameter
    embedding: torch.Tensor
    cos_sin: torch.Tensor

    def __init__(self, config: DFlashConfig, embedding: torch.Tensor, max_position: int) -> None:
        """`embedding`: the target's, (vocab_size, hidden_size); it is not trained."""
        super().__init__()
        self.config, decoder = config, config.decoder
        self.fc = matrix(decoder.hidden_size, len(config.feature_layers) * config.target_hidden_size)
        add_norms(self, decoder.hidden_size, "hidden_norm")
        self.layers = nn.ModuleList(_Layer(config) for _ in range(decoder.num_layers))
        add_norms(self, decoder.hidden_size, "norm")
        self.lm_head = matrix(config.draft_vocab_size, decoder.hidden_size)
        self.register_buffer("embedding", embedding, persistent=False)
        table = cos_sin_table(decoder.rope, decoder.head_dim, max_position + config.block_size)
        self.register_buffer("cos_sin", table, persistent=False)

    def forward(
        self,
        features: torch.Tensor,  # (batch, length, layers * hidden_size)
        tokens: torch.Tensor,  # (batch, length) int64
        anchors: torch.Tensor,  # (batch, blocks) int64: positions of the blocks' first tokens
    ) -> torch.Tensor:
        """Return the normed hidden states of the rows that draft: (batch, blocks, config.length, hidden_size). Row j
        predicts the token at anchor + 1 + j."""
        config, decoder = self.config, self.config.decoder
        size, (batch, blocks), length = config.block_size, anchors.shape, tokens.shape[1]
        context = norm(F.linear(features, self.fc), self.hidden_norm, decoder)
        rows = torch.full((batch, blocks, size), config.mask_token_id, device=tokens.device)
        rows[:, :, 0] = tokens.gather(1, anchors)
        hidden = F.embedding(rows.flatten(1), self.embedding).to(context.dtype)
        positions = (anchors.unsqueeze(2) + torch.arange(size, device=tokens.device)).flatten(1)
        before = torch.arange(length, device=tokens.device) < anchors.repeat_interleave(size, 1).unsqueeze(2)
        block = torch.arange(blocks * size, device=tokens.device) // size
        own = (block.unsqueeze(1) == block).expand(batch, -1, -1)
        seen = torch.cat((before, own), 2).unsqueeze(1)
        tables = self.cos_sin[:length], self.cos_sin[positions].unsqueeze(1)
        for layer in self.layers:
            hidden = layer(context, hidden, seen, tables)
        hidden = norm(hidden, self.norm, decoder).view(batch, blocks, size, -1)
        return hidden[:, :, size - config.length :]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(rows, hidden_size) -> (rows, draft_vocab_size)."""
        return F.linear(hidden, self.lm_head)
