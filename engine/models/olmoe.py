"""OLMoE (arXiv 2409.02060): experts; queries and keys are normed, all heads at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pilotfish.checkpoints.gguf_header import Header
from pilotfish.checkpoints.values import Values
from pilotfish.engine.models import qwen3_moe
from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.models.experts import expert_tensors, gguf_experts, hf_experts
from pilotfish.engine.models.family import Family
from pilotfish.engine.models.readers import gguf_config, hf_config
from pilotfish.engine.models.tensors import attention, embedding, final, norm
from pilotfish.engine.weights.tensors import Tensor

if TYPE_CHECKING:
    import torch

    from pilotfish.engine.layers.attention.backend import AttentionParams
    from pilotfish.engine.layers.decoder import DecoderLayer
    from pilotfish.engine.models.weight_store import LayerWeights

_DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "num_experts": 64,
    "num_experts_per_tok": 8,
}


def tensors(config: ModelConfig) -> Iterator[Tensor]:
    yield from embedding(config)
    for i in range(config.num_layers):
        hf, gguf = f"model.layers.{i}.", f"blk.{i}."
        yield norm(f"{hf}input_layernorm", f"{gguf}attn_norm", config.hidden_size)
        yield from attention(config, f"{hf}self_attn.", gguf, whole_norms=True)
        yield norm(f"{hf}post_attention_layernorm", f"{gguf}ffn_norm", config.hidden_size)
        yield from expert_tensors(config, f"{hf}mlp.", gguf)
    yield from final(config)


def layer(
    weights: LayerWeights, config: ModelConfig, attention: AttentionParams, cos_sin: torch.Tensor
) -> DecoderLayer:
    return replace(qwen3_moe.layer(weights, config, attention, cos_sin), whole_norms=True)


def read_hf(values: Values) -> ModelConfig:
    values = Values(values.path, _DEFAULTS | dict(values.raw))
    for name, known in (("hidden_act", "silu"), ("clip_qkv", None)):
        if (value := values.get(name, known)) != known:
            raise values.error(f"{name} is {value!r}, but the engine knows OLMoE with {known!r}")
    biased = bool(values.get("attention_bias", False))
    experts = hf_experts(values, size=values.size("intermediate_size"))
    return hf_config(values, qkv_bias=biased, output_bias=biased, qk_norm=True, experts=experts)


def read_gguf(header: Header) -> ModelConfig:
    return gguf_config(header, experts=gguf_experts(header, normalized=False))


FAMILY = Family(
    models="OLMoE",
    model_types=("olmoe",),
    gguf_architectures=("olmoe",),
    read_hf=read_hf,
    read_gguf=read_gguf,
    tensors=tensors,
    layer=layer,
    cpu="operator by operator: experts",
)
