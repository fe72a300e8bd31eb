"""Phi-3 and Phi-4 (arXiv 2404.14219, 2412.08905, 2503.01743): Llama's layers, with query, key and value stored as one
matrix, and gate and up as another; some models rotate a part of each head only, and stretch their context by longrope.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pilotfish.checkpoints.gguf_header import Header
from pilotfish.checkpoints.values import Values
from pilotfish.engine.models import llama
from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.models.family import Family
from pilotfish.engine.models.readers import gguf_config, hf_config
from pilotfish.engine.models.tensors import attention, embedding, final, gated_mlp, norm
from pilotfish.engine.weights.tensors import Tensor

_DEFAULTS: dict[str, Any] = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}


def tensors(config: ModelConfig) -> Iterator[Tensor]:
    yield from embedding(config)
    for i in range(config.num_layers):
        hf, gguf = f"model.layers.{i}.", f"blk.{i}."
        yield norm(f"{hf}input_layernorm", f"{gguf}attn_norm", config.hidden_size)
        yield from attention(config, f"{hf}self_attn.", gguf, stored=True)
        yield norm(f"{hf}post_attention_layernorm", f"{gguf}ffn_norm", config.hidden_size)
        yield from gated_mlp(config, f"{hf}mlp.", gguf, stored=True)
    yield from final(config)


def read_hf(values: Values) -> ModelConfig:
    raw = _DEFAULTS | dict(values.raw)
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(rope := raw.get(name), dict) and "yarn" in (rope.get("rope_type"), rope.get("type")):
            raw[name] = rope | {"rope_type": "longrope"}  # as transformers reads the first of these files
    values = Values(values.path, raw)
    if (activation := values.get("hidden_act", "silu")) != "silu":
        raise values.error(f"hidden_act is {activation!r}, but the engine knows 'silu'")
    return hf_config(values, sliding_window=values.optional_size("sliding_window"))


def read_gguf(header: Header) -> ModelConfig:
    return gguf_config(header, sliding_window=header.values.optional_size("attention.sliding_window"))


FAMILY = Family(
    models="Phi-3, Phi-3.5, Phi-4, Phi-4-mini",
    model_types=("phi3",),
    gguf_architectures=("phi3",),
    read_hf=read_hf,
    read_gguf=read_gguf,
    tensors=tensors,
    layer=llama.layer,
)
