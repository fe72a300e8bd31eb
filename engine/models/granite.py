"""Granite 3 and 4, dense (arXiv 2405.04324): Llama's layers, with factors of the embeddings, of the scores, of what
each half of a layer adds, and of the logits.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pilotfish.checkpoints.gguf_header import Header
from pilotfish.checkpoints.values import Values
from pilotfish.engine.models import llama
from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.models.family import Family
from pilotfish.engine.models.readers import gguf_config, hf_config

if TYPE_CHECKING:
    import torch

    from pilotfish.engine.layers.attention.backend import AttentionParams
    from pilotfish.engine.layers.decoder import DecoderLayer
    from pilotfish.engine.models.weight_store import LayerWeights


def layer(
    weights: LayerWeights, config: ModelConfig, attention: AttentionParams, cos_sin: torch.Tensor
) -> DecoderLayer:
    return replace(llama.layer(weights, config, attention, cos_sin), residual_scale=config.residual_scale)


def read_hf(values: Values) -> ModelConfig:
    values = Values(values.path, {"max_position_embeddings": 2048, **values.raw})
    if (activation := values.get("hidden_act", "silu")) != "silu":
        raise values.error(f"hidden_act is {activation!r}, but the engine knows 'silu'")
    biased = bool(values.get("attention_bias", False))
    return hf_config(
        values,
        qkv_bias=biased,
        output_bias=biased,
        mlp_bias=bool(values.get("mlp_bias", False)),
        embedding_scale=values.positive("embedding_multiplier", 1.0),
        attention_scale=values.positive("attention_multiplier", 1.0),
        residual_scale=values.positive("residual_multiplier", 1.0),
        logit_divisor=values.positive("logits_scaling", 1.0),
    )


def read_gguf(header: Header) -> ModelConfig:
    values = header.values
    return gguf_config(
        header,
        embedding_scale=values.positive("embedding_scale", 1.0),
        attention_scale=values.optional_number("attention.scale"),
        residual_scale=values.positive("residual_scale", 1.0),
        logit_divisor=values.positive("logit_scale", 1.0),
    )


FAMILY = Family(
    models="Granite 3, Granite 4, dense",
    model_types=("granite",),
    gguf_architectures=("granite",),
    read_hf=read_hf,
    read_gguf=read_gguf,
    tensors=llama.tensors,
    layer=layer,
    cpu="operator by operator: scaled residuals",
)
