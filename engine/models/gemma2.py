"""Gemma 2 (arXiv 2408.00118): as Gemma 3, but without norms of query and key, with capped scores and logits, one rotary
frequency, and a sliding window in every second layer.
"""

from __future__ import annotations

from typing import Any

from pilotfish.checkpoints.gguf_header import Header
from pilotfish.checkpoints.values import Values
from pilotfish.engine.models import gemma3
from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.models.family import Family
from pilotfish.engine.models.plausible import MOST_LAYERS
from pilotfish.engine.models.readers import gguf_config, hf_config

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
}


def read_hf(values: Values) -> ModelConfig:
    values = Values(values.path, _DEFAULTS | dict(values.raw))
    if (activation := values.get("hidden_activation") or "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
        raise values.error(f"hidden_activation is {activation!r}, but the engine knows 'gelu_pytorch_tanh'")
    if values.get("use_bidirectional_attention"):
        raise values.error("use_bidirectional_attention is True, but the engine knows Gemma 2 without")
    layers, biased = values.size("num_hidden_layers", most=MOST_LAYERS), bool(values.get("attention_bias", False))
    kinds = values.texts("layer_types") or ["sliding_attention", "full_attention"] * layers
    return hf_config(
        values,
        qkv_bias=biased,
        output_bias=biased,
        sliding_window=values.size("sliding_window"),
        sliding_layers=tuple(kind == "sliding_attention" for kind in kinds[:layers]),
        attention_scale=values.positive("query_pre_attn_scalar") ** -0.5,
        attention_softcap=values.optional_number("attn_logit_softcapping"),
        logit_softcap=values.optional_number("final_logit_softcapping"),
        sandwich_norms=True,
    )


def read_gguf(header: Header) -> ModelConfig:
    """Values that files leave out have the defaults of llama.cpp's src/models/gemma2.cpp."""
    values = header.values
    layers = values.size("block_count", most=MOST_LAYERS)
    # Only the 27B model, recognised by its number of layers, does not scale by the size of a head.
    scale = (values.size("embedding_length") // values.size("attention.head_count")) ** -0.5 if layers == 46 else None
    return gguf_config(
        header,
        sliding_window=values.size("attention.sliding_window", 4096),
        sliding_layers=tuple(i % 2 == 0 for i in range(layers)),
        attention_scale=scale,
        attention_softcap=values.positive("attn_logit_softcapping", 50.0),
        logit_softcap=values.positive("final_logit_softcapping", 30.0),
        sandwich_norms=True,
    )


FAMILY = Family(
    models="Gemma 2",
    model_types=("gemma2",),
    gguf_architectures=("gemma2",),
    read_hf=read_hf,
    read_gguf=read_gguf,
    tensors=gemma3.tensors,
    layer=gemma3.layer,
    scaled_embedding=True,
    cpu="operator by operator, attention by torch: capped scores",
)
