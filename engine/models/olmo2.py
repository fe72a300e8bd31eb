"""OLMo 2 (arXiv 2501.00656): attention and MLP have a norm after them, but none before; queries and keys are normed,
all heads at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pilotfish.checkpoints.gguf_header import Header
from pilotfish.checkpoints.values import Values
from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.models.family import Family
from pilotfish.engine.models.readers import gguf_config, hf_config
from pilotfish.engine.models.tensors import attention, embedding, final, gated_mlp, norm
from pilotfish.engine.weights.tensors import Tensor

if TYPE_CHECKING:
    import torch

    from pilotfish.engine.layers.attention.backend import AttentionParams
    from pilotfish.engine.layers.decoder import DecoderLayer
    from pilotfish.engine.models.weight_store import LayerWeights

_DEFAULTS: dict[str, Any] = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5}


def tensors(config: ModelConfig) -> Iterator[Tensor]:
    yield from embedding(config)
    for i in range(config.num_layers):
        hf, gguf = f"model.layers.{i}.", f"blk.{i}."
        yield from attention(config, f"{hf}self_attn.", gguf, whole_norms=True)
        yield norm(f"{hf}post_attention_layernorm", f"{gguf}post_attention_norm", config.hidden_size)
        yield from gated_mlp(config, f"{hf}mlp.", gguf)
        yield norm(f"{hf}post_feedforward_layernorm", f"{gguf}post_ffw_norm", config.hidden_size)
    yield from final(config)


def layer(
    weights: LayerWeights, config: ModelConfig, attention: AttentionParams, cos_sin: torch.Tensor
) -> DecoderLayer:
    from pilotfish.engine.layers.decoder import DecoderLayer, DenseMlp

    return DecoderLayer(
        input_norm=None,
        qkv=weights.linear("self_attn.qkv_proj"),
        q_norm=weights.norm("self_attn.q_norm"),
        k_norm=weights.norm("self_attn.k_norm"),
        whole_norms=True,
        output=weights.linear("self_attn.o_proj"),
        attention_post_norm=weights.norm("post_attention_layernorm"),
        mlp_norm=None,
        mlp=DenseMlp(weights.linear("mlp.gate_up_proj"), weights.linear("mlp.down_proj"), "silu"),
        mlp_post_norm=weights.norm("post_feedforward_layernorm"),
        cos_sin=cos_sin,
        attention=attention,
    )


def read_hf(values: Values) -> ModelConfig:
    values = Values(values.path, _DEFAULTS | dict(values.raw))
    if (activation := values.get("hidden_act", "silu")) != "silu":
        raise values.error(f"hidden_act is {activation!r}, but the engine knows 'silu'")
    biased = bool(values.get("attention_bias", False))
    return hf_config(values, qkv_bias=biased, output_bias=biased, qk_norm=True, sandwich_norms=True)


def read_gguf(header: Header) -> ModelConfig:
    return gguf_config(header, sandwich_norms=True)


FAMILY = Family(
    models="OLMo 2",
    model_types=("olmo2",),
    gguf_architectures=("olmo2",),
    read_hf=read_hf,
    read_gguf=read_gguf,
    tensors=tensors,
    layer=layer,
    cpu="operator by operator: no norms before",
)
