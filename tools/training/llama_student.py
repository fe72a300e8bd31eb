"""LlamaStudent: a small Llama that learns to draft for a target from token ids alone; the kind "draft-model"."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.models.rope import cos_sin_table
from pilotfish.tools.checkpoint import config_of, write_model
from pilotfish.tools.training.batches import Batch
from pilotfish.tools.training.layer import (
    add_attended_and_mlp,
    add_matrices,
    add_norms,
    norm,
    query_key_value,
    stored_name,
)
from pilotfish.tools.training.losses import draft_loss
from pilotfish.tools.training.settings import Objective
from pilotfish.tools.training.student import Tally, Teacher


class _Layer(nn.Module):
    input_layernorm: nn.Parameter

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        add_norms(self, config.hidden_size, "input_layernorm", "post_attention_layernorm")
        add_matrices(self, config, inputs=config.hidden_size)

    def forward(self, hidden: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
        config = self.config
        query, key, value = query_key_value(self, norm(hidden, self.input_layernorm, config), config, cos_sin)
        grouped = config.num_heads != config.num_kv_heads
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
        return add_attended_and_mlp(self, hidden, attended, config)


class LlamaStudent(nn.Module):
    """A draft model in training. config: a Llama with the target's vocabulary and a tied head."""

    cos_sin: torch.Tensor

    def __init__(self, config: ModelConfig, teacher: Teacher, max_position: int, steps: int) -> None:
        super().__init__()
        self.config, self.teacher, self.steps = config, teacher, steps
        self.embedding = nn.Parameter(torch.randn(config.vocab_size, config.hidden_size) * config.hidden_size**-0.5)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_layers))
        self.norm = nn.Parameter(torch.ones(config.hidden_size))
        table = cos_sin_table(config.rope, config.head_dim, max_position)
        self.register_buffer("cos_sin", table, persistent=False)

    @torch.no_grad()
    def start_from(self, target: Mapping[str, torch.Tensor], target_config: ModelConfig) -> None:
        """Initialize from the target's embedding, projected to its principal components, and from its first layers if
        the shapes are the same. target: its tensors by their Hugging Face names."""
        table = target["model.embed_tokens.weight"].float()
        if table.shape[1] > self.config.hidden_size:
            _, _, directions = torch.pca_lowrank(table, q=self.config.hidden_size, niter=2)
            table = table @ directions
        if table.shape == self.embedding.shape:
            self.embedding.copy_(table)
        if self.config.hidden_size != target_config.hidden_size or target_config.sandwich_norms:
            return
        for i, layer in enumerate(self.layers):
            for name, own in layer.named_parameters():
                stored = target.get(f"model.layers.{i}.{stored_name(name)}")
                if stored is not None and stored.shape == own.shape:
                    own.copy_(stored)
        self.norm.copy_(self.teacher.norm)

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the hidden states after the final norm: (batch, length) int64 -> (batch, length, hidden_size)."""
        hidden = F.embedding(tokens, self.embedding)
        table = self.cos_sin[: tokens.shape[1]]
        for layer in self.layers:
            hidden = layer(hidden, table)
        return norm(hidden, self.norm, self.config)

    def loss(self, batch: Batch, objective: Objective) -> torch.Tensor:
        rows = batch.answers.flatten().nonzero().squeeze(1)
        logits = F.linear(self.hidden(batch.tokens).flatten(0, 1)[rows], self.embedding).float()
        target = self.teacher.distribution(batch.final.flatten(0, 1)[rows], batch.normalizer.flatten()[rows])
        return draft_loss(logits, target, objective)

    @torch.no_grad()
    def tally(self, batch: Batch, tally: Tally) -> None:
        drafted = F.linear(self.hidden(batch.tokens), self.embedding).argmax(-1)
        right = (drafted == batch.likeliest) & batch.answers
        windows = right.unfold(1, self.steps, 1).flatten(0, 1)  # (anchors, steps)
        whole = batch.answers.unfold(1, self.steps, 1).flatten(0, 1).all(1)
        tally.add(windows[whole].T)

    def export(self, folder: Path, trained: dict[str, Any]) -> None:
        """Write a Hugging Face folder, in float16."""
        tensors = {"model.embed_tokens.weight": self.embedding, "model.norm.weight": self.norm}
        for i, layer in enumerate(self.layers):
            for name, weight in layer.named_parameters():
                tensors[f"model.layers.{i}.{stored_name(name)}"] = weight
        halves = {name: weight.detach().half().contiguous() for name, weight in tensors.items()}
        own = {"architectures": ["LlamaForCausalLM"], "dtype": "float16", "trained": trained}
        write_model(folder, config_of(self.config) | own, halves)
