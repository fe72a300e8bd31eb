"""A small Llama that learns to draft for a target: the kind "draft-model". Token ids in, no features."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.models.rope import cos_sin_table
from pilotfish.tools.training.batches import Batch
from pilotfish.tools.training.eagle3 import rotate
from pilotfish.tools.training.losses import Objective, draft_loss
from pilotfish.tools.training.student import Tally, Teacher


class _Layer(nn.Module):
    q_proj: nn.Parameter
    k_proj: nn.Parameter
    v_proj: nn.Parameter
    o_proj: nn.Parameter
    gate_proj: nn.Parameter
    up_proj: nn.Parameter
    down_proj: nn.Parameter

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.config = config
        self.input_layernorm, self.post_attention_layernorm = (nn.Parameter(torch.ones(hidden)) for _ in range(2))
        shapes = {"q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden)}
        shapes |= {"o_proj": (hidden, queries), "gate_proj": (inner, hidden), "up_proj": (inner, hidden)}
        shapes |= {"down_proj": (hidden, inner)}
        for name, (out, into) in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(out, into) * into**-0.5))

    def forward(self, hidden: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
        config = self.config

        def heads(weight: torch.Tensor, count: int) -> torch.Tensor:
            return F.linear(x, weight).unflatten(-1, (count, config.head_dim)).transpose(1, 2)

        x = F.rms_norm(hidden, (config.hidden_size,), self.input_layernorm, config.rms_norm_eps)
        query = rotate(heads(self.q_proj, config.num_heads), cos_sin)
        key = rotate(heads(self.k_proj, config.num_kv_heads), cos_sin)
        value = heads(self.v_proj, config.num_kv_heads)
        grouped = config.num_heads != config.num_kv_heads
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
        hidden = hidden + F.linear(attended.transpose(1, 2).flatten(2), self.o_proj)
        y = F.rms_norm(hidden, (config.hidden_size,), self.post_attention_layernorm, config.rms_norm_eps)
        return hidden + F.linear(F.silu(F.linear(y, self.gate_proj)) * F.linear(y, self.up_proj), self.down_proj)


class LlamaStudent(nn.Module):
    """`config`: a tied Llama of the target's vocabulary."""

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
        """Begin with the target's embedding, on the directions in which it varies most; and with its first layers,
        where the shapes are the same. `target`: its tensors, under Hugging Face's names."""
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
                part = "self_attn." if name[0] in "qkvo" else "mlp." if name.endswith("proj") else ""
                stored = target.get(f"model.layers.{i}.{part}{name}.weight")
                if stored is not None and stored.shape == own.shape:
                    own.copy_(stored)
        self.norm.copy_(self.teacher.norm)

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        """(batch, length) int64 -> (batch, length, hidden_size), after the final norm."""
        hidden = F.embedding(tokens, self.embedding)
        table = self.cos_sin[: tokens.shape[1]]
        for layer in self.layers:
            hidden = layer(hidden, table)
        return F.rms_norm(hidden, (self.config.hidden_size,), self.norm, self.config.rms_norm_eps)

    def loss(self, batch: Batch, objective: Objective) -> torch.Tensor:
        rows = batch.answers.flatten().nonzero().squeeze(1)
        logits = F.linear(self.hidden(batch.tokens).flatten(0, 1)[rows], self.embedding).float()
        target = self.teacher.distribution(batch.final.flatten(0, 1)[rows], batch.normalizer.flatten()[rows])
        return draft_loss(logits, target, objective)[0]

    @torch.no_grad()
    def tally(self, batch: Batch, tally: Tally) -> None:
        drafted = F.linear(self.hidden(batch.tokens), self.embedding).argmax(-1)
        right = (drafted == batch.likeliest) & batch.answers
        windows = right.unfold(1, self.steps, 1).flatten(0, 1)  # (anchors, steps)
        whole = batch.answers.unfold(1, self.steps, 1).flatten(0, 1).all(1)
        tally.add(windows[whole].T)

    def export(self, folder: Path, trained: dict[str, Any]) -> None:
        """A Hugging Face folder, in float16."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"model.embed_tokens.weight": self.embedding, "model.norm.weight": self.norm}
        for i, layer in enumerate(self.layers):
            for name, weight in layer.named_parameters():
                part = "self_attn." if name[0] in "qkvo" else "mlp." if name.endswith("proj") else ""
                tensors[f"model.layers.{i}.{part}{name}.weight"] = weight
        halves = {name: weight.detach().half().contiguous() for name, weight in tensors.items()}
        save_file(halves, str(folder / "model.safetensors"), {"format": "pt"})
        config = self.config
        content = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "max_position_embeddings": config.max_position,
            "rms_norm_eps": config.rms_norm_eps,
            "rope_theta": config.rope.theta,
            "tie_word_embeddings": True,
            "eos_token_id": list(config.eos_token_ids),
            "dtype": "float16",
            "trained": trained,
        }
        (folder / "config.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
