"""Gemma 3, the text part (arXiv 2503.19786).

It differs from the Llama family: embeddings are scaled by sqrt(hidden_size); attention and MLP have a norm
before and another after them; a norm multiplies by 1 + its weight; query and key are normed, head by head; most layers
see a sliding window only and rotate by a base frequency of their own; the MLP's gate is GELU's tanh approximation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pilotfish.checkpoints.gguf_header import Header
from pilotfish.checkpoints.huggingface import checked_ids, eos_token_ids
from pilotfish.checkpoints.values import Values
from pilotfish.engine.models import family
from pilotfish.engine.models.config import ModelConfig, RopeConfig
from pilotfish.engine.models.family import Family
from pilotfish.engine.models.plausible import MOST_LAYERS
from pilotfish.engine.models.readers import gguf_config, hf_config, hf_rope
from pilotfish.engine.models.tensors import attention, embedding, final, gated_mlp, norm
from pilotfish.engine.weights.tensors import Tensor

if TYPE_CHECKING:
    import torch

    from pilotfish.engine.layers.attention.backend import AttentionParams
    from pilotfish.engine.layers.decoder import DecoderLayer
    from pilotfish.engine.models.weight_store import LayerWeights

_OFFSET = 1.0
"""Norms multiply by this plus their weight."""

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
_FIXED: dict[str, Any] = {
    "hidden_activation": "gelu_pytorch_tanh",
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": False,
}
_VISION = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")
"""Tensors of the part that reads images, which the engine does not use."""


def tensors(config: ModelConfig) -> Iterator[Tensor]:
    yield from embedding(config)
    size = config.hidden_size
    for i in range(config.num_layers):
        hf, gguf = f"model.layers.{i}.", f"blk.{i}."
        yield norm(f"{hf}input_layernorm", f"{gguf}attn_norm", size, _OFFSET)
        yield from attention(config, f"{hf}self_attn.", gguf, norm_offset=_OFFSET)
        yield norm(f"{hf}post_attention_layernorm", f"{gguf}post_attention_norm", size, _OFFSET)
        yield norm(f"{hf}pre_feedforward_layernorm", f"{gguf}ffn_norm", size, _OFFSET)
        yield from gated_mlp(config, f"{hf}mlp.", gguf)
        yield norm(f"{hf}post_feedforward_layernorm", f"{gguf}post_ffw_norm", size, _OFFSET)
    yield from final(config, _OFFSET)


def declared_name(stored: str) -> str | None:
    """See `Family.declared_name`. A model that also reads images has its text part under "language_model."."""
    if _VISION.match(stored):
        return None
    name = stored.removeprefix("language_model.")
    return family.declared_name(name.replace("model.language_model.", "model.", 1))


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
        attention_post_norm=weights.norm("post_attention_layernorm"),
        mlp_norm=weights.norm("pre_feedforward_layernorm"),
        mlp=DenseMlp(weights.linear("mlp.gate_up_proj"), weights.linear("mlp.down_proj"), "gelu"),
        mlp_post_norm=weights.norm("post_feedforward_layernorm"),
        cos_sin=cos_sin,
        attention=attention,
    )


def read_hf(values: Values) -> ModelConfig:
    """Read a text model, or the text part of one that also reads images. Published files leave out many fields."""
    raw = dict(_DEFAULTS)
    for part in (values.raw, values.within("text_config").raw):
        raw.update((name, value) for name, value in part.items() if value is not None)
    text = Values(values.path, raw)
    for name, wanted in _FIXED.items():
        if (value := text.get(name, wanted)) != wanted:
            raise text.error(f"{name} is {value!r}, but the engine knows Gemma 3 with {wanted!r}")
    layers, biased = text.size("num_hidden_layers", most=MOST_LAYERS), bool(text.get("attention_bias", False))
    every = text.size("sliding_window_pattern", text.size("_sliding_window_pattern", 6))
    kinds = text.texts("layer_types") or [
        "sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)
    ]
    if len(kinds) != layers or not set(kinds) <= {"sliding_attention", "full_attention"}:
        raise text.error(
            f"layer_types is {kinds!r:.200}, but must be 'sliding_attention' or 'full_attention' for {layers} layers"
        )
    ropes = text.within("rope_parameters")
    rope = {"rope_theta": text.get("rope_theta"), "rope_scaling": text.get("rope_scaling")}
    local_rope = {"rope_theta": text.get("rope_local_base_freq")}
    return hf_config(
        text,
        architecture="gemma3",
        rope=hf_rope(Values(text.path, rope | {"rope_parameters": ropes.get("full_attention")})),
        local_rope=hf_rope(Values(text.path, local_rope | {"rope_parameters": ropes.get("sliding_attention")})),
        qkv_bias=biased,
        output_bias=biased,
        qk_norm=True,
        sliding_window=text.size("sliding_window"),
        sliding_layers=tuple(kind == "sliding_attention" for kind in kinds),
        attention_scale=text.positive("query_pre_attn_scalar") ** -0.5,
        sandwich_norms=True,
        eos_token_ids=eos_token_ids(text.path.parent) or checked_ids(text.path, text.get("eos_token_id")),
    )


def read_gguf(header: Header) -> ModelConfig:
    """Values that files leave out have the defaults of llama.cpp's src/models/gemma3.cpp."""
    values = header.values
    if (cap := values.number("final_logit_softcapping", 0.0)) != 0.0:
        raise values.error(f"gemma3.final_logit_softcapping is {cap}, but the engine knows Gemma 3 without")
    layers = values.size("block_count", most=MOST_LAYERS)
    pattern = values.get("attention.sliding_window_pattern", 6)
    if values.optional_size("attention.sliding_window") is None:
        sliding = (False,) * layers
    elif isinstance(pattern, int) and pattern >= 0:  # the last of every so many layers sees everything
        sliding = tuple(pattern == 0 or (i + 1) % pattern != 0 for i in range(layers))
    else:
        sliding = tuple(map(bool, values.numbers("attention.sliding_window_pattern")))
    if len(sliding) != layers:
        raise values.error(f"sliding_window_pattern has {len(sliding)} layers, but the model {layers}")
    # Only the 27B model, recognised by its number of layers, does not scale by the size of a head.
    scale = (values.size("embedding_length") // values.size("attention.head_count")) ** -0.5 if layers == 62 else None
    return gguf_config(
        header,
        sliding_layers=sliding,
        local_rope=RopeConfig(theta=values.positive("rope.freq_base_swa", 10000.0)),
        attention_scale=scale,
        sandwich_norms=True,
    )


FAMILY = Family(
    models="Gemma 3, text",
    model_types=("gemma3_text", "gemma3"),
    gguf_architectures=("gemma3",),
    read_hf=read_hf,
    read_gguf=read_gguf,
    tensors=tensors,
    declared_name=declared_name,
    layer=layer,
    scaled_embedding=True,
    run=("gemma-3-270m",),
)
