"""Mixtral (arXiv 2401.04088): Mistral's attention, and experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pilotfish.checkpoints.values import Values
from pilotfish.engine.models.config import ExpertConfig, ModelConfig
from pilotfish.engine.models.experts import expert_mlp, expert_tensors
from pilotfish.engine.models.family import Family
from pilotfish.engine.models.readers import hf_config
from pilotfish.engine.models.tensors import attention, embedding, final, norm
from pilotfish.engine.weights.tensors import Tensor

if TYPE_CHECKING:
    import torch

    from pilotfish.engine.layers.attention.backend import AttentionParams
    from pilotfish.engine.layers.decoder import DecoderLayer
    from pilotfish.engine.models.weight_store import LayerWeights

_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


def tensors(config: ModelConfig) -> Iterator[Tensor]:
    yield from embedding(config)
    for i in range(config.num_layers):
        hf, gguf = f"model.layers.{i}.", f"blk.{i}."
        yield norm(f"{hf}input_layernorm", f"{gguf}attn_norm", config.hidden_size)
        # In GGUF files it is a "llama", whose rows of query and key are permuted.
        yield from attention(config, f"{hf}self_attn.", gguf, paired_rows=config.head_dim)
        yield norm(f"{hf}post_attention_layernorm", f"{gguf}ffn_norm", config.hidden_size)
        yield from expert_tensors(config, f"{hf}block_sparse_moe.", gguf, names=("w1", "w3", "w2"))
    yield from final(config)


def layer(
    weights: LayerWeights, config: ModelConfig, attention: AttentionParams, cos_sin: torch.Tensor
) -> DecoderLayer:
    from pilotfish.engine.layers.decoder import DecoderLayer

    return DecoderLayer(
        input_norm=weights.norm("input_layernorm"),
        qkv=weights.linear("self_attn.qkv_proj"),
        output=weights.linear("self_attn.o_proj"),
        mlp_norm=weights.norm("post_attention_layernorm"),
        mlp=expert_mlp(weights, config, "block_sparse_moe.", down="w2"),
        cos_sin=cos_sin,
        attention=attention,
    )


def read_hf(values: Values) -> ModelConfig:
    values = Values(values.path, _DEFAULTS | dict(values.raw))
    if (activation := values.get("hidden_act", "silu")) != "silu":
        raise values.error(f"hidden_act is {activation!r}, but the engine knows 'silu'")
    experts = ExpertConfig(
        count=values.size("num_local_experts"),
        per_token=values.size("num_experts_per_tok"),
        size=values.size("intermediate_size"),
        normalized=True,
    )
    return hf_config(values, sliding_window=values.optional_size("sliding_window"), experts=experts)


FAMILY = Family(
    models="Mixtral",
    model_types=("mixtral",),
    gguf_architectures=(),  # "llama" in this format, which reads it
    read_hf=read_hf,
    tensors=tensors,
    layer=layer,
    cpu="operator by operator: experts",
)
