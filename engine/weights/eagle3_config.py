"""The shape of an EAGLE-3 draft, and which tensors it has; see `eagle3` for the layouts. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pilotfish.checkpoints.huggingface import read_json
from pilotfish.engine.models.config import Eagle3Config
from pilotfish.engine.weights.hf_config import layer_config
from pilotfish.errors import ModelError

SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"


def read_config(folder: Path) -> Eagle3Config:
    """The draft's shape. Raises ModelError for what the engine does not know."""
    path = folder / "config.json"
    raw = read_json(path)
    layer: dict[str, Any] = raw.get("transformer_layer_config") or raw
    if raw.get("norm_before_fc"):
        raise ModelError(f"{path}: norm_before_fc is set, but the engine knows EAGLE-3 drafts without it")
    if (layers := layer.get("num_hidden_layers", 1)) != 1:
        raise ModelError(f"{path}: num_hidden_layers is {layers}, but the engine knows EAGLE-3 drafts with 1")
    decoder = layer_config(folder, path, {"model_type": "llama", **layer, "num_hidden_layers": 1})
    extra = raw.get("eagle_config") or {}
    ids = raw.get("eagle_aux_hidden_state_layer_ids") or extra.get("eagle_aux_hidden_state_layer_ids") or ()
    if ids and len(ids) != 3:
        raise ModelError(f"{path}: eagle_aux_hidden_state_layer_ids is {ids!r}, but must name three layers")
    return Eagle3Config(
        decoder=decoder,
        draft_vocab_size=raw.get("draft_vocab_size") or decoder.vocab_size,
        target_hidden_size=raw.get("target_hidden_size") or decoder.hidden_size,
        feature_layers=tuple(ids),
        norm_before_residual=bool(raw.get("norm_before_residual", False)),
    )


def expected_shapes(config: Eagle3Config) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor, as `read_weights` names them."""
    decoder = config.decoder
    hidden, inner = decoder.hidden_size, decoder.intermediate_size
    queries, keys = decoder.num_heads * decoder.head_dim, decoder.num_kv_heads * decoder.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (hidden, 3 * config.target_hidden_size),
        "layer.input_layernorm.weight": (hidden,),
        "layer.hidden_norm.weight": (hidden,),
    }
    for name, size in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        shapes[f"layer.self_attn.{name}.weight"] = (size, 2 * hidden)
        if decoder.qkv_bias:
            shapes[f"layer.self_attn.{name}.bias"] = (size,)
    if decoder.qk_norm:
        shapes["layer.self_attn.q_norm.weight"] = shapes["layer.self_attn.k_norm.weight"] = (decoder.head_dim,)
    shapes |= {
        "layer.self_attn.o_proj.weight": (hidden, queries),
        "layer.post_attention_layernorm.weight": (hidden,),
        "layer.mlp.gate_proj.weight": (inner, hidden),
        "layer.mlp.up_proj.weight": (inner, hidden),
        "layer.mlp.down_proj.weight": (hidden, inner),
        "norm.weight": (hidden,),
        "lm_head.weight": (config.draft_vocab_size, hidden),
        "embed_tokens.weight": (decoder.vocab_size, hidden),
    }
    if decoder.output_bias:
        shapes["layer.self_attn.o_proj.bias"] = (hidden,)
    return shapes


def plain_name(name: str) -> str:
    """A stored tensor's name without what the layouts differ in."""
    name = name.removeprefix("model.")
    for prefix in ("midlayer.", "layers.0."):
        if name.startswith(prefix):
            return "layer." + name.removeprefix(prefix)
    return name
