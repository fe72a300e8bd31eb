"""Qwen1.5's and Qwen2's mixtures of experts (arXiv 2407.10671): one expert is every row's, with a gate of its own."""

from __future__ import annotations

from typing import Any

from pilotfish.checkpoints.gguf_header import Header
from pilotfish.checkpoints.values import Values
from pilotfish.engine.models import qwen3_moe
from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.models.experts import gguf_experts, hf_experts
from pilotfish.engine.models.family import Family
from pilotfish.engine.models.readers import gguf_config, hf_config

_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 16,
    "max_position_embeddings": 32768,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts": 60,
    "num_experts_per_tok": 4,
}


def read_hf(values: Values) -> ModelConfig:
    values = Values(values.path, _DEFAULTS | dict(values.raw))
    if (activation := values.get("hidden_act", "silu")) != "silu":
        raise values.error(f"hidden_act is {activation!r}, but the engine knows 'silu'")
    if values.get("use_sliding_window", False):
        raise values.error("use_sliding_window is True, but the engine knows Qwen2's experts without")
    experts = hf_experts(values, shared_size=values.size("shared_expert_intermediate_size"))
    return hf_config(values, qkv_bias=bool(values.get("qkv_bias", True)), experts=experts)


def read_gguf(header: Header) -> ModelConfig:
    shared = header.tensors.get("blk.0.ffn_up_shexp.weight")
    if shared is None:
        raise header.values.error("it lacks tensor 'blk.0.ffn_up_shexp.weight'")
    return gguf_config(header, experts=gguf_experts(header, shared_size=shared.shape[0], normalized=False))


FAMILY = Family(
    models="Qwen1.5, Qwen2 with experts",
    model_types=("qwen2_moe",),
    gguf_architectures=("qwen2moe",),
    read_hf=read_hf,
    read_gguf=read_gguf,
    tensors=qwen3_moe.tensors,
    layer=qwen3_moe.layer,
    cpu="operator by operator: experts",
)
