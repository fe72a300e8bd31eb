"""Qwen3's mixtures of experts (arXiv 2505.09388), Qwen3-Coder among them: Qwen3's attention, and experts as the second
half of a layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pilotfish.checkpoints.gguf_header import Header
from pilotfish.checkpoints.values import Values
from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.models.experts import expert_mlp, expert_tensors, gguf_experts, hf_experts, shared_tensors
from pilotfish.engine.models.family import Family
from pilotfish.engine.models.readers import gguf_config, hf_config
from pilotfish.engine.models.tensors import attention, embedding, final, gated_mlp, norm
from pilotfish.engine.weights.tensors import Tensor

if TYPE_CHECKING:
    import torch

    from pilotfish.engine.layers.attention.backend import AttentionParams
    from pilotfish.engine.layers.decoder import DecoderLayer, Mlp
    from pilotfish.engine.models.weight_store import LayerWeights

_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}


def tensors(config: ModelConfig) -> Iterator[Tensor]:
    assert config.experts is not None
    yield from embedding(config)
    for i in range(config.num_layers):
        hf, gguf = f"model.layers.{i}.", f"blk.{i}."
        yield norm(f"{hf}input_layernorm", f"{gguf}attn_norm", config.hidden_size)
        yield from attention(config, f"{hf}self_attn.", gguf)
        yield norm(f"{hf}post_attention_layernorm", f"{gguf}ffn_norm", config.hidden_size)
        if i in config.experts.dense_layers:
            yield from gated_mlp(config, f"{hf}mlp.", gguf)
            continue
        yield from expert_tensors(config, f"{hf}mlp.", gguf)
        if config.experts.shared_size:
            yield from shared_tensors(config, f"{hf}mlp.", gguf)
    yield from final(config)


def layer(
    weights: LayerWeights, config: ModelConfig, attention: AttentionParams, cos_sin: torch.Tensor
) -> DecoderLayer:
    from pilotfish.engine.layers.decoder import DecoderLayer, DenseMlp

    mlp: Mlp
    if weights.has("mlp.gate_up_proj"):
        mlp = DenseMlp(weights.linear("mlp.gate_up_proj"), weights.linear("mlp.down_proj"), "silu")
    else:
        mlp = expert_mlp(weights, config, "mlp.")
    return DecoderLayer(
        input_norm=weights.norm("input_layernorm"),
        qkv=weights.linear("self_attn.qkv_proj"),
        q_norm=weights.norm("self_attn.q_norm") if config.qk_norm else None,
        k_norm=weights.norm("self_attn.k_norm") if config.qk_norm else None,
        output=weights.linear("self_attn.o_proj"),
        mlp_norm=weights.norm("post_attention_layernorm"),
        mlp=mlp,
        cos_sin=cos_sin,
        attention=attention,
    )


def read_hf(values: Values) -> ModelConfig:
    values = Values(values.path, _DEFAULTS | dict(values.raw))
    if (activation := values.get("hidden_act", "silu")) != "silu":
        raise values.error(f"hidden_act is {activation!r}, but the engine knows 'silu'")
    biased = bool(values.get("attention_bias", False))
    window = values.optional_size("sliding_window") if values.get("use_sliding_window", False) else None
    return hf_config(
        values,
        qkv_bias=biased,
        output_bias=biased,
        qk_norm=True,
        sliding_window=window,
        experts=hf_experts(values),
    )


def read_gguf(header: Header) -> ModelConfig:
    return gguf_config(header, experts=gguf_experts(header))


FAMILY = Family(
    models="Qwen3 with experts (30B-A3B, 235B-A22B, Coder)",
    model_types=("qwen3_moe",),
    gguf_architectures=("qwen3moe",),
    read_hf=read_hf,
    read_gguf=read_gguf,
    tensors=tensors,
    layer=layer,
    cpu="operator by operator: experts",
)
