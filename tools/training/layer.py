"""A decoder layer that can be trained, which both kinds of draft consist of: its parameters in a module, and the parts
of its pass. Parameters are named by the last parts of Hugging Face's tensor names.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pilotfish.engine.models.config import ModelConfig

MATRICES = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "self_attn."),
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mlp."),
}
"""The layer's matrices, and the prefixes of their names in a checkpoint."""


def stored_name(name: str) -> str:
    """Return a parameter's name within its layer in a checkpoint: "self_attn.q_proj.weight" for "q_proj"."""
    prefix = "self_attn." if name in ("q_norm", "k_norm") else MATRICES.get(name, "")
    return f"{prefix}{name}.weight"


def matrix(outputs: int, inputs: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(outputs, inputs) * inputs**-0.5)


def add_norms(module: nn.Module, size: int, *names: str) -> None:
    for name in names:
        module.register_parameter(name, nn.Parameter(torch.ones(size)))


def add_matrices(module: nn.Module, config: ModelConfig, inputs: int) -> None:
    """Add a layer's matrices with random weights; query, key and value have `inputs` inputs."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    sizes = [(queries, inputs), (keys, inputs), (keys, inputs), (hidden, queries)]
    sizes += [(inner, hidden), (inner, hidden), (hidden, inner)]
    for name, size in zip(MATRICES, sizes, strict=True):
        module.register_parameter(name, matrix(*size))


def norm(x: torch.Tensor, weight: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    return F.rms_norm(x, weight.shape, weight, config.rms_norm_eps)


def query_key_value(
    layer: Any, x: torch.Tensor, config: ModelConfig, table: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return query, key and value, (batch, heads, length, head_dim) each, the first two rotated by `table`.

    x: (batch, length, inputs); table: (length, head_dim), a part of `cos_sin_table`.
    """

    query, key = (rotated(heads(x, weight, config), table) for weight in (layer.q_proj, layer.k_proj))
    return query, key, heads(x, layer.v_proj, config)


def heads(x: torch.Tensor, weight: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Return a product's heads: (batch, length, inputs) -> (batch, heads, length, head_dim)."""
    split: torch.Tensor = F.linear(x, weight).unflatten(-1, (-1, config.head_dim))
    return split.transpose(1, 2)


def add_attended_and_mlp(layer: Any, hidden: torch.Tensor, attended: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Return the hidden states after the layer, from those before it and its heads' attention outputs."""
    hidden = hidden + F.linear(attended.transpose(1, 2).flatten(2), layer.o_proj)
    y = norm(hidden, layer.post_attention_layernorm, config)
    return hidden + F.linear(F.silu(F.linear(y, layer.gate_proj)) * F.linear(y, layer.up_proj), layer.down_proj)


def rotated(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of (..., length, head_dim) by `table`, as many rows of `cos_sin_table`."""
    cosine, sine = table.to(x.dtype).chunk(2, dim=-1)  # (length, head_dim / 2) each
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cosine - high * sine, high * cosine + low * sine), dim=-1)
