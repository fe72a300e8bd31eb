"""The common part of all families' readers of config.json and of GGUF headers. No torch, no transformers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gguf import GGMLQuantizationType as Kind

from pilotfish.checkpoints import gguf_header, huggingface
from pilotfish.checkpoints.gguf_header import Header
from pilotfish.checkpoints.values import Values
from pilotfish.engine.models.config import ModelConfig, RopeConfig
from pilotfish.engine.models.plausible import LARGEST_HEAD, MOST_LAYERS
from pilotfish.engine.weights.gguf import ROPE_FACTORS, read_array
from pilotfish.engine.weights.tensors import whole


def hf_config(values: Values, **special: Any) -> ModelConfig:
    """The ModelConfig that a config.json's `values` describe, with the family's `special` fields. Raises ModelError for
    a model that the engine does not know, and for a file that lacks a value."""
    hidden, heads = values.size("hidden_size"), values.size("num_attention_heads")
    dtype = values.get("dtype") or values.get("torch_dtype")  # transformers 4 wrote torch_dtype
    layers = values.size("num_hidden_layers", most=MOST_LAYERS)
    rope = special.get("rope") or hf_rope(values)
    fields: dict[str, Any] = {
        "architecture": values.get("model_type"),
        "vocab_size": values.size("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": values.size("intermediate_size"),
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": values.size("num_key_value_heads", heads),
        "head_dim": values.size("head_dim", hidden // heads),
        "max_position": _max_position(values, rope),
        "rms_norm_eps": values.positive("rms_norm_eps", 1e-6),
        "rope": rope,
        "tie_embeddings": bool(values.get("tie_word_embeddings", False)),
        "eos_token_ids": huggingface.eos_token_ids(values.path.parent),
        "bos_token_id": values.id("bos_token_id"),
        "dtype": str(dtype) if dtype in ("float32", "bfloat16", "float16") else "float32",
    }
    return ModelConfig(**fields | special)


def _max_position(values: Values, rope: RopeConfig) -> int:
    """Published files with YaRN name the context before it or after it."""
    named = values.size("max_position_embeddings")
    return max(named, int(rope.factor * rope.original_max_position)) if rope.kind == "yarn" else named


_ROPE_FIELDS: Mapping[str, Mapping[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "dynamic": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position": "original_max_position_embeddings",
    },
    "yarn": {},
    "longrope": {"freq_factors": "short_factor", "long_factors": "long_factor"},
}
"""RopeConfig's fields that must be there, and Hugging Face's names for them, by rope_type."""


def hf_rope(values: Values) -> RopeConfig:
    """Reads rope_parameters as transformers 5 writes them, or rope_theta and rope_scaling as version 4 did."""
    found = values.within("rope_parameters")
    if not found.raw:
        found = Values(values.path, {"rope_theta": values.get("rope_theta"), **values.within("rope_scaling").raw})
    theta = found.positive("rope_theta", values.positive("rope_theta", 10000.0))
    kind = found.get("rope_type", found.get("type", "default"))
    kind = "longrope" if kind == "su" else kind  # longrope's old name
    if not isinstance(kind, str) or kind not in _ROPE_FIELDS:
        raise values.error(f"rope_type is {kind!r}, but the engine knows {', '.join(map(repr, _ROPE_FIELDS))}")
    fields = _ROPE_FIELDS[kind]
    if missing := [name for name in fields.values() if found.get(name) is None]:
        raise values.error(f"rope scaling of type {kind!r} lacks {', '.join(map(repr, missing))}")
    read: dict[str, Any] = {
        field: found.numbers(name) if isinstance(found.get(name), list) else found.number(name)
        for field, name in fields.items()
    }
    share = found.number("partial_rotary_factor", values.number("partial_rotary_factor", 1.0))
    if kind in ("yarn", "longrope"):
        read |= _stretch(values, found, kind)
    elif kind == "dynamic":
        read["original_max_position"] = values.size("max_position_embeddings")
    if "original_max_position" in read:
        read["original_max_position"] = int(read["original_max_position"])
    return RopeConfig(theta=theta, kind=kind, share=share, **read)


def _stretch(values: Values, found: Values, kind: str) -> dict[str, Any]:
    """The fields of YaRN and longrope, whose defaults follow from one another."""
    longest = values.size("max_position_embeddings")
    name = "original_max_position_embeddings"
    original = values.size(name, found.size(name, longest))
    factor = found.positive("factor", longest / original)
    scale = found.optional_number("attention_factor")
    if kind == "longrope":
        scale = scale or (math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 < original else 1.0)
        return {"original_max_position": original, "factor": factor, "attention_factor": scale}
    top, all_dims = found.optional_number("mscale"), found.optional_number("mscale_all_dim")
    if scale is None:
        scale = yarn_scale(factor, top) / yarn_scale(factor, all_dims) if top and all_dims else yarn_scale(factor)
    return {
        "original_max_position": original,
        "factor": factor,
        "attention_factor": scale,
        "beta_fast": found.positive("beta_fast", 32),
        "beta_slow": found.positive("beta_slow", 1),
        "truncate": bool(found.get("truncate", True)),
    }


def yarn_scale(factor: float, weight: float = 1.0) -> float:
    """YaRN's factor of queries and keys (arXiv 2309.00071, section 3.4)."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def gguf_config(header: Header, **special: Any) -> ModelConfig:
    """The ModelConfig that a GGUF file's metadata and tensors describe, with the family's `special` fields. Raises
    ModelError for a model that the engine does not know, and for a file that lacks a value."""
    values, tensors = header.values, header.tensors
    if (experts := values.optional_size("expert_count")) and "experts" not in special:
        raise values.error(f"the model is a mixture of {experts} experts, but the engine knows dense ones only")
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise values.error("it lacks tensor 'token_embd.weight', or it is not a matrix")
    hidden, heads = values.size("embedding_length"), values.size("attention.head_count")
    head_dim = values.size("attention.key_length", hidden // heads)
    if (size := values.size("attention.value_length", head_dim)) != head_dim:
        raise values.error(
            f"{values.prefix}attention.value_length is {size}, but the engine needs that of a head's keys, {head_dim}"
        )
    fields: dict[str, Any] = {
        "architecture": header.architecture,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": values.size("feed_forward_length", values.get("expert_feed_forward_length")),
        "num_layers": values.size("block_count", most=MOST_LAYERS),
        "num_heads": heads,
        "num_kv_heads": values.size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position": values.size("context_length"),
        "rms_norm_eps": values.positive("attention.layer_norm_rms_epsilon", 1e-5),
        "rope": gguf_rope(header),
        "tie_embeddings": "output.weight" not in tensors,
        "qkv_bias": "blk.0.attn_q.bias" in tensors,
        "output_bias": "blk.0.attn_output.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "qk_norm": "blk.0.attn_q_norm.weight" in tensors,
        "sliding_window": values.optional_size("attention.sliding_window"),
        "eos_token_ids": gguf_header.eos_token_ids(header),
        "bos_token_id": Values(header.path, header.metadata).id("tokenizer.ggml.bos_token_id"),
        "dtype": gguf_dtype(header),
    }
    return ModelConfig(**fields | special)


def gguf_rope(header: Header) -> RopeConfig:
    values = header.values
    theta = values.positive("rope.freq_base", 10000.0)
    kind = values.get("rope.scaling.type", "none")
    factor = values.positive("rope.scaling.factor", values.positive("rope.scale_linear", 1.0))
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise values.error(
            f"rope.scaling.type is {kind!r}, but the engine knows 'none', 'linear', 'yarn' and 'longrope'"
        )
    head_dim = values.size(
        "attention.key_length", values.size("embedding_length") // values.size("attention.head_count")
    )
    share = values.size("rope.dimension_count", head_dim) / head_dim
    factors = {name: _gguf_factors(header, name) for name in ROPE_FACTORS}
    short, long = factors["rope_factors_short.weight"], factors["rope_factors_long.weight"]
    original = values.size("rope.scaling.original_context_length", values.get("context_length"))
    if short is not None and long is not None:
        attention_factor = values.positive("rope.scaling.attn_factor", 1.0)
        return RopeConfig(
            theta=theta,
            kind="longrope",
            share=share,
            original_max_position=original,
            attention_factor=attention_factor,
            freq_factors=short,
            long_factors=long,
        )
    if kind == "yarn":
        attention_factor = values.positive("rope.scaling.attn_factor", 1.0) * yarn_scale(factor)
        return RopeConfig(
            theta=theta,
            kind="yarn",
            share=share,
            factor=factor,
            original_max_position=original,
            attention_factor=attention_factor,
            beta_fast=values.positive("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=values.positive("rope.scaling.yarn_beta_slow", 1.0),
        )
    scaled = factor != 1.0 and (kind == "linear" or "rope.scaling.type" not in header.metadata)
    return RopeConfig(
        theta=theta,
        kind="linear" if scaled else "default",
        share=share,
        factor=factor if scaled else 1.0,
        freq_factors=factors["rope_freqs.weight"],
    )


def _gguf_factors(header: Header, name: str) -> tuple[float, ...] | None:
    stored = header.tensors.get(name)
    if stored is None:
        return None
    if len(stored.shape) != 1 or stored.shape[0] > LARGEST_HEAD:
        raise header.values.error(f"tensor {name!r} has shape {stored.shape}, but must be a factor for each frequency")
    with header.path.open("rb") as file:
        return tuple(read_array(header.path, file, stored, whole(stored.shape)).tolist())


def gguf_dtype(header: Header) -> str:
    """The dtype of the file's matrices; bfloat16 if they are quantized, since most such files come from bfloat16
    models, whose values could overflow in float16."""
    plain = {Kind.F32: "float32", Kind.F16: "float16"}
    kinds = {tensor.kind for tensor in header.tensors.values() if len(tensor.shape) == 2}
    return plain.get(next(iter(kinds)), "bfloat16") if len(kinds) == 1 else "bfloat16"
