"""The common part of all families' readers of config.json and of GGUF headers. No torch, no transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gguf import GGMLQuantizationType as Kind

from pilotfish.checkpoints import gguf_header, huggingface
from pilotfish.checkpoints.gguf_header import Header
from pilotfish.checkpoints.values import Values
from pilotfish.engine.models.config import ModelConfig, RopeConfig
from pilotfish.engine.weights.gguf import ROPE_FACTORS, read_array
from pilotfish.engine.weights.tensors import whole


def hf_config(values: Values, **special: Any) -> ModelConfig:
    """The ModelConfig that a config.json's `values` describe, with the family's `special` fields. Raises ModelError for
    a model that the engine does not know, and for a file that lacks a value."""
    hidden, heads = values.size("hidden_size"), values.size("num_attention_heads")
    dtype = values.get("dtype") or values.get("torch_dtype")  # transformers 4 wrote torch_dtype
    fields: dict[str, Any] = {
        "architecture": values.get("model_type"),
        "vocab_size": values.size("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": values.size("intermediate_size"),
        "num_layers": values.size("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": values.size("num_key_value_heads", heads),
        "head_dim": values.size("head_dim", hidden // heads),
        "max_position": values.size("max_position_embeddings"),
        "rms_norm_eps": values.get("rms_norm_eps", 1e-6),
        "rope": special.get("rope") or hf_rope(values),
        "tie_embeddings": bool(values.get("tie_word_embeddings", False)),
        "eos_token_ids": huggingface.eos_token_ids(values.path.parent),
        "bos_token_id": values.get("bos_token_id"),
        "dtype": dtype if dtype in ("float32", "bfloat16", "float16") else "float32",
    }
    return ModelConfig(**fields | special)


_ROPE_FIELDS: Mapping[str, Mapping[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position": "original_max_position_embeddings",
    },
}
"""RopeConfig's fields, and Hugging Face's names for them, by rope_type."""


def hf_rope(values: Values) -> RopeConfig:
    """Reads rope_parameters as transformers 5 writes them, or rope_theta and rope_scaling as version 4 did."""
    old = {"rope_theta": values.get("rope_theta"), **(values.get("rope_scaling") or {})}
    found = values.get("rope_parameters") or old
    theta = float(found.get("rope_theta") or values.get("rope_theta") or 10000.0)
    kind = found.get("rope_type", found.get("type", "default"))
    partial = float(found.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0)))
    if partial != 1.0:
        raise values.error(f"partial_rotary_factor is {partial}, but the engine rotates whole heads (1.0)")
    if kind not in _ROPE_FIELDS:
        raise values.error(f"rope_type is {kind!r}, but the engine knows 'default', 'linear' and 'llama3'")
    fields = _ROPE_FIELDS[kind]
    if missing := [name for name in fields.values() if name not in found]:
        raise values.error(f"rope scaling of type {kind!r} lacks {', '.join(map(repr, missing))}")
    read: dict[str, Any] = {field: float(found[name]) for field, name in fields.items()}
    if "original_max_position" in read:
        read["original_max_position"] = int(read["original_max_position"])
    return RopeConfig(theta=theta, kind=kind, **read)


def gguf_config(header: Header, **special: Any) -> ModelConfig:
    """The ModelConfig that a GGUF file's metadata and tensors describe, with the family's `special` fields. Raises
    ModelError for a model that the engine does not know, and for a file that lacks a value."""
    values, tensors = header.values, header.tensors
    if experts := values.get("expert_count", 0):
        raise values.error(f"the model is a mixture of {experts} experts, but the engine knows dense ones only")
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise values.error("it lacks tensor 'token_embd.weight', or it is not a matrix")
    hidden, heads = values.size("embedding_length"), values.size("attention.head_count")
    head_dim = values.get("attention.key_length", hidden // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if (size := values.get(name, head_dim)) != head_dim:
            raise values.error(
                f"{values.prefix}{name} is {size}, but the engine needs that of a head's keys, {head_dim}"
            )
    fields: dict[str, Any] = {
        "architecture": header.architecture,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": values.size("feed_forward_length"),
        "num_layers": values.size("block_count"),
        "num_heads": heads,
        "num_kv_heads": values.size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position": values.size("context_length"),
        "rms_norm_eps": values.get("attention.layer_norm_rms_epsilon", 1e-5),
        "rope": gguf_rope(header),
        "tie_embeddings": "output.weight" not in tensors,
        "qkv_bias": "blk.0.attn_q.bias" in tensors,
        "output_bias": "blk.0.attn_output.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "qk_norm": "blk.0.attn_q_norm.weight" in tensors,
        "sliding_window": values.get("attention.sliding_window"),
        "eos_token_ids": gguf_header.eos_token_ids(header.metadata),
        "bos_token_id": header.metadata.get("tokenizer.ggml.bos_token_id"),
        "dtype": gguf_dtype(header),
    }
    return ModelConfig(**fields | special)


def gguf_rope(header: Header) -> RopeConfig:
    values, factors = header.values, header.tensors.get(ROPE_FACTORS)
    theta = float(values.get("rope.freq_base", 10000.0))
    kind = values.get("rope.scaling.type", "none")
    factor = float(values.get("rope.scaling.factor", values.get("rope.scale_linear", 1.0)))
    if kind not in ("none", "linear"):
        raise values.error(f"rope.scaling.type is {kind!r}, but the engine knows 'none' and 'linear'")
    scaled = factor != 1.0 and (kind == "linear" or "rope.scaling.type" not in header.metadata)
    freq_factors = None
    if factors is not None:
        with header.path.open("rb") as file:
            freq_factors = tuple(read_array(header.path, file, factors, whole(factors.shape)).tolist())
    return RopeConfig(
        theta=theta, kind="linear" if scaled else "default", factor=factor if scaled else 1.0, freq_factors=freq_factors
    )


def gguf_dtype(header: Header) -> str:
    """The dtype of the file's matrices; bfloat16 if they are quantized, since most such files come from bfloat16
    models, whose values could overflow in float16."""
    plain = {Kind.F32: "float32", Kind.F16: "float16"}
    kinds = {tensor.kind for tensor in header.tensors.values() if len(tensor.shape) == 2}
    return plain.get(next(iter(kinds)), "bfloat16") if len(kinds) == 1 else "bfloat16"
