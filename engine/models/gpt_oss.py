"""gpt-oss (arXiv 2508.10925): experts with biases and a clamped gate, attention with sinks, a sliding window in every
second layer. Published weights of experts are MXFP4, which is dequantized."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pilotfish.checkpoints.gguf_header import Header
from pilotfish.checkpoints.values import Values
from pilotfish.engine.models.config import ExpertConfig, ModelConfig
from pilotfish.engine.models.experts import expert_mlp, expert_tensors, gguf_experts
from pilotfish.engine.models.family import Family
from pilotfish.engine.models.plausible import MOST_LAYERS
from pilotfish.engine.models.readers import gguf_config, hf_config
from pilotfish.engine.models.tensors import attention, embedding, final, norm
from pilotfish.engine.weights.tensors import Part, Tensor

if TYPE_CHECKING:
    import torch

    from pilotfish.engine.layers.attention.backend import AttentionParams
    from pilotfish.engine.layers.decoder import DecoderLayer
    from pilotfish.engine.models.weight_store import LayerWeights

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000.0,
    "sliding_window": 128,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "swiglu_limit": 7.0,
    "attention_bias": True,
}


def tensors(config: ModelConfig) -> Iterator[Tensor]:
    yield from embedding(config)
    for i in range(config.num_layers):
        hf, gguf = f"model.layers.{i}.", f"blk.{i}."
        yield norm(f"{hf}input_layernorm", f"{gguf}attn_norm", config.hidden_size)
        yield from attention(config, f"{hf}self_attn.", gguf)
        yield Tensor(
            name=f"{hf}self_attn.sinks", shape=(config.num_heads,), gguf=f"{gguf}attn_sinks.weight", axes=("head",)
        )
        yield norm(f"{hf}post_attention_layernorm", f"{gguf}post_attention_norm", config.hidden_size)
        yield from expert_tensors(config, f"{hf}mlp.", gguf, router="router")
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
        mlp=expert_mlp(weights, config, "mlp.", router="router"),
        cos_sin=cos_sin,
        attention=replace(attention, sinks=weights.vector("self_attn.sinks").float()),
    )


def read_hf(values: Values) -> ModelConfig:
    values = Values(values.path, _DEFAULTS | {name: each for name, each in values.raw.items() if each is not None})
    for name, known in (("hidden_act", "silu"), ("swiglu_alpha", 1.702)):
        if (value := values.get(name, known)) != known:
            raise values.error(f"{name} is {value!r}, but the engine knows gpt-oss with {known!r}")
    layers, biased = values.size("num_hidden_layers", most=MOST_LAYERS), bool(values.get("attention_bias"))
    kinds = values.texts("layer_types") or ["sliding_attention", "full_attention"] * layers
    experts = ExpertConfig(
        count=values.size("num_local_experts"),
        per_token=values.size("num_experts_per_tok"),
        size=values.size("intermediate_size"),
        normalized=True,
        biased=True,
        clamp=values.positive("swiglu_limit"),
    )
    return hf_config(
        values,
        qkv_bias=biased,
        output_bias=biased,
        sliding_window=values.size("sliding_window"),
        sliding_layers=tuple(kind == "sliding_attention" for kind in kinds[:layers]),
        attention_sinks=True,
        experts=experts,
    )


def read_gguf(header: Header) -> ModelConfig:
    values = header.values
    return gguf_config(
        header,
        sliding_window=values.size("attention.sliding_window"),
        sliding_layers=tuple(i % 2 == 0 for i in range(values.size("block_count", most=MOST_LAYERS))),
        attention_sinks=True,
        experts=gguf_experts(header, biased=True, clamp=7.0),
    )


def read_folder(
    folder: Path, declared: Mapping[str, Tensor], dtype: torch.dtype, parts: Mapping[str, Part], device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    from pilotfish.engine.weights import expert_blocks

    return expert_blocks.read_folder(folder, declared, dtype, parts, device)


FAMILY = Family(
    models="gpt-oss",
    model_types=("gpt_oss",),
    gguf_architectures=("gpt-oss",),
    read_hf=read_hf,
    read_gguf=read_gguf,
    read_folder=read_folder,
    own_quantization=("mxfp4",),
    tensors=tensors,
    layer=layer,
    cpu="operator by operator, attention by torch: experts, sinks",
)
