"""The Llama family: Llama 2 and 3, SmolLM2, Mistral, Qwen2, Qwen3, told apart by their ModelConfig alone.

(arXiv 2302.13971, 2307.09288, 2407.21783; Qwen2's biases 2407.10671; Qwen3's norms of query and key 2505.09388.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from pilotfish.checkpoints.gguf_header import Header
from pilotfish.checkpoints.values import Values
from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.models.experts import gguf_experts
from pilotfish.engine.models.family import Family
from pilotfish.engine.models.plausible import MOST_LAYERS
from pilotfish.engine.models.readers import gguf_config, hf_config
from pilotfish.engine.models.tensors import attention, embedding, final, gated_mlp, norm
from pilotfish.engine.weights.tensors import Tensor

if TYPE_CHECKING:
    import torch

    from pilotfish.engine.layers.attention.backend import AttentionParams
    from pilotfish.engine.layers.decoder import DecoderLayer
    from pilotfish.engine.models.weight_store import LayerWeights

_DEFAULTS: dict[str, dict[str, int]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096},
    "qwen3": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096, "head_dim": 128},
}
"""Defaults of fields that config.json leaves out; a null num_key_value_heads is num_attention_heads all the same."""


def tensors(config: ModelConfig) -> Iterator[Tensor]:
    yield from embedding(config)
    for i in range(config.num_layers):
        hf, gguf = f"model.layers.{i}.", f"blk.{i}."
        # llama.cpp's converter permutes the rows of query and key of these models only.
        paired_rows = config.head_dim if config.architecture in ("llama", "granite", "smollm3") else 0
        yield norm(f"{hf}input_layernorm", f"{gguf}attn_norm", config.hidden_size)
        yield from attention(config, f"{hf}self_attn.", gguf, paired_rows=paired_rows)
        yield norm(f"{hf}post_attention_layernorm", f"{gguf}ffn_norm", config.hidden_size)
        yield from gated_mlp(config, f"{hf}mlp.", gguf)
    yield from final(config)


def layer(
    weights: LayerWeights, config: ModelConfig, attention: AttentionParams, cos_sin: torch.Tensor
) -> DecoderLayer:
    from pilotfish.engine.layers.decoder import DecoderLayer, DenseMlp

    return DecoderLayer(
        input_norm=weights.norm("input_layernorm"),
        qkv=weights.linear("self_attn.qkv_proj"),
        q_norm=weights.norm("self_attn.q_norm") if config.qk_norm else None,
        k_norm=weights.norm("self_attn.k_norm") if config.qk_norm else None,
        output=weights.linear("self_attn.o_proj"),
        mlp_norm=weights.norm("post_attention_layernorm"),
        mlp=DenseMlp(weights.linear("mlp.gate_up_proj"), weights.linear("mlp.down_proj"), "silu"),
        cos_sin=cos_sin,
        attention=attention,
    )


def read_hf(values: Values) -> ModelConfig:
    kind = values.get("model_type")
    if kind not in _DEFAULTS:
        raise values.error(f"model_type is {kind!r}, but must be one of {', '.join(_DEFAULTS)}")
    values = Values(values.path, {**_DEFAULTS[kind], **values.raw})
    if (activation := values.get("hidden_act", "silu")) != "silu":
        raise values.error(f"hidden_act is {activation!r}, but the engine knows 'silu'")
    attention_bias = kind in ("llama", "qwen3") and bool(values.get("attention_bias", False))
    return hf_config(
        values,
        qkv_bias=kind == "qwen2" or attention_bias,
        output_bias=attention_bias,
        mlp_bias=kind == "llama" and bool(values.get("mlp_bias", False)),
        qk_norm=kind == "qwen3",
        sliding_window=_sliding_window(values),
    )


def _sliding_window(values: Values) -> int | None:
    """The model's sliding window: Mistral's is for all layers, Qwen's only used if use_sliding_window is set."""
    kind, window = values.get("model_type"), values.optional_size("sliding_window")
    kinds = set(values.texts("layer_types"))
    if kind == "llama" or window is None:
        return None
    if kind in ("qwen2", "qwen3"):
        if not values.get("use_sliding_window", False):
            return None
        if not kinds:
            first = values.number("max_window_layers", 28)
            layers = values.size("num_hidden_layers", most=MOST_LAYERS)
            kinds = {"full_attention" if i < first else "sliding_attention" for i in range(layers)}
    if kinds == {"full_attention"}:
        return None
    if len(kinds) > 1:
        raise values.error("some layers have a sliding window and some have none, which the engine does not know")
    return window


def read_gguf(header: Header) -> ModelConfig:
    """Mixtral is a "llama" in this format."""
    if header.values.optional_size("expert_count") is None:
        return gguf_config(header)
    return replace(gguf_config(header, experts=gguf_experts(header)), architecture="mixtral")


FAMILY = Family(
    models="Llama 2, Llama 3, SmolLM2, Mistral, Qwen2, Qwen3",
    model_types=tuple(_DEFAULTS),
    gguf_architectures=("llama", "qwen2", "qwen3"),  # Mistral's models are "llama" in this format
    read_hf=read_hf,
    read_gguf=read_gguf,
    tensors=tensors,
    layer=layer,
    run=("smollm2-135m",),
)
