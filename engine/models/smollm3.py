"""SmolLM3: Llama's layers, of which every fourth has no rotary embedding (NoPE, arXiv 2501.18795)."""

from __future__ import annotations

from typing import Any

from pilotfish.checkpoints.gguf_header import Header
from pilotfish.checkpoints.values import Values
from pilotfish.engine.models import llama
from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.models.family import Family
from pilotfish.engine.models.plausible import MOST_LAYERS
from pilotfish.engine.models.readers import gguf_config, hf_config

_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rope_theta": 2000000.0,
    "no_rope_layer_interval": 4,
    "tie_word_embeddings": True,
}


def read_hf(values: Values) -> ModelConfig:
    values = Values(values.path, _DEFAULTS | dict(values.raw))
    if (activation := values.get("hidden_act", "silu")) != "silu":
        raise values.error(f"hidden_act is {activation!r}, but the engine knows 'silu'")
    layers, every = values.size("num_hidden_layers", most=MOST_LAYERS), values.size("no_rope_layer_interval")
    rotated = values.numbers("no_rope_layers", ()) or [
        int((i + 1) % every != 0) for i in range(layers)
    ]  # 1: it has one
    window = values.optional_size("sliding_window") if values.get("use_sliding_window", False) else None
    kinds = values.texts("layer_types") or ["full_attention" if has else "sliding_attention" for has in rotated]
    biased = bool(values.get("attention_bias", False))
    return hf_config(
        values,
        qkv_bias=biased,
        output_bias=biased,
        mlp_bias=bool(values.get("mlp_bias", False)),
        sliding_window=window,
        sliding_layers=tuple(kind == "sliding_attention" for kind in kinds) if window else (),
        unrotated_layers=tuple(i for i, has in enumerate(rotated) if not has),
    )


def read_gguf(header: Header) -> ModelConfig:
    """Files do not name the layers: every fourth has no rotary embedding in llama.cpp's src/models/smollm3.cpp."""
    return gguf_config(header, unrotated_layers=tuple(range(3, header.values.size("block_count", most=MOST_LAYERS), 4)))


FAMILY = Family(
    models="SmolLM3",
    model_types=("smollm3",),
    gguf_architectures=("smollm3",),
    read_hf=read_hf,
    read_gguf=read_gguf,
    tensors=llama.tensors,
    layer=llama.layer,
)
