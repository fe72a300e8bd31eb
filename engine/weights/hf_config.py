"""Hugging Face's config.json and generation_config.json as a ModelConfig. No torch, no transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from pilotfish.checkpoints.huggingface import eos_token_ids, read_json
from pilotfish.engine.models.config import ModelConfig, RopeConfig
from pilotfish.engine.weights.hf_quantization import read_fp8
from pilotfish.errors import ModelError

EAGLE3_ARCHITECTURES = ("LlamaForCausalLMEagle3", "Eagle3Speculator", "Eagle3DraftModel")
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "gemma3")


def read_config(folder: Path) -> ModelConfig:
    """The shape that `folder`/config.json describes, end-of-text ids from generation_config.json where there is one.

    Defaults of fields that config.json leaves out are those of transformers' configuration classes. Raises ModelError
    for a file that cannot be read and for a model that the engine does not know.
    """
    path = folder / "config.json"
    raw = read_json(path)
    if is_eagle3(folder):
        raise ModelError(f"{folder} is an EAGLE-3 head, which drafts for a model and is none by itself")
    kind = raw.get("model_type")
    if kind not in MODEL_TYPES:
        raise ModelError(f"{path}: model_type is {kind!r}, but the engine knows {', '.join(MODEL_TYPES)}")
    fp8 = read_fp8(path, raw)
    if kind in ("gemma3_text", "gemma3"):
        return replace(_gemma3(folder, path, raw), fp8=fp8)
    return replace(layer_config(folder, path, raw), fp8=fp8)


def is_eagle3(folder: Path) -> bool:
    """Whether a folder's config.json is an EAGLE-3 draft's (see `engine.weights.eagle3`). Raises ModelError if there is
    none that can be read."""
    raw = read_json(folder / "config.json")
    named = any(name in EAGLE3_ARCHITECTURES for name in raw.get("architectures") or ())
    return named or raw.get("speculators_model_type") == "eagle3"


def layer_config(folder: Path, path: Path, raw: dict[str, Any]) -> ModelConfig:
    """The shape that `raw`, read from `path`, gives a model of the Llama family. Raises ModelError."""
    kind = raw["model_type"]
    if kind not in _DEFAULT_KV_HEADS:
        raise ModelError(f"{path}: model_type is {kind!r}, but must be one of {', '.join(_DEFAULT_KV_HEADS)}")
    if (activation := raw.get("hidden_act", "silu")) != "silu":
        raise ModelError(f"{path}: hidden_act is {activation!r}, but the engine knows 'silu'")
    hidden, heads = _size(path, raw, "hidden_size"), _size(path, raw, "num_attention_heads")
    layers = _size(path, raw, "num_hidden_layers")
    attention_bias = kind in ("llama", "qwen3") and bool(raw.get("attention_bias", False))
    return ModelConfig(
        architecture=kind,
        vocab_size=_size(path, raw, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_size(path, raw, "intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        # transformers: null means as many as heads, absent means the class's own default
        num_kv_heads=raw.get("num_key_value_heads", _DEFAULT_KV_HEADS[kind]) or heads,
        head_dim=raw.get("head_dim", _DEFAULT_HEAD_DIM.get(kind)) or hidden // heads,
        max_position=raw.get("max_position_embeddings", _DEFAULT_MAX_POSITION[kind]),
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope=_rope(path, raw),
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=kind == "qwen2" or attention_bias,
        output_bias=attention_bias,
        mlp_bias=kind == "llama" and bool(raw.get("mlp_bias", False)),
        qk_norm=kind == "qwen3",
        sliding_window=_sliding_window(path, raw, layers),
        eos_token_ids=eos_token_ids(folder),
        bos_token_id=raw.get("bos_token_id"),
        dtype=_dtype(raw),
    )


_DEFAULT_KV_HEADS: dict[str, int | None] = {"llama": None, "mistral": 8, "qwen2": 32, "qwen3": 32}
_DEFAULT_HEAD_DIM = {"qwen3": 128}
_DEFAULT_MAX_POSITION = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768}


def _gemma3(folder: Path, path: Path, raw: dict[str, Any]) -> ModelConfig:
    """Gemma 3 by itself, or the text part of the model that sees images. Its published files leave out much."""
    text = dict(_GEMMA3_DEFAULTS)
    for part in (raw, raw.get("text_config") or {}):
        text.update((name, value) for name, value in part.items() if value is not None)
    for name, wanted in _GEMMA3_FIXED.items():
        if (value := text.get(name, wanted)) != wanted:
            raise ModelError(f"{path}: {name} is {value!r}, but the engine knows Gemma 3 with {wanted!r}")
    layers, biased = _size(path, text, "num_hidden_layers"), bool(text.get("attention_bias", False))
    every = text.get("sliding_window_pattern", text.get("_sliding_window_pattern", 6))
    kinds = text.get("layer_types") or [
        "sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)
    ]
    if len(kinds) != layers or not set(kinds) <= {"sliding_attention", "full_attention"}:
        raise ModelError(
            f"{path}: layer_types is {kinds!r}, but must be 'sliding_attention' or 'full_attention' for {layers} layers"
        )
    ropes = text.get("rope_parameters") or {}
    rope = {"rope_theta": text["rope_theta"], "rope_scaling": text.get("rope_scaling")}
    local_rope = {"rope_theta": text["rope_local_base_freq"]}
    eos = text["eos_token_id"]
    return ModelConfig(
        architecture="gemma3",
        vocab_size=_size(path, text, "vocab_size"),
        hidden_size=_size(path, text, "hidden_size"),
        intermediate_size=_size(path, text, "intermediate_size"),
        num_layers=layers,
        num_heads=_size(path, text, "num_attention_heads"),
        num_kv_heads=_size(path, text, "num_key_value_heads"),
        head_dim=_size(path, text, "head_dim"),
        max_position=_size(path, text, "max_position_embeddings"),
        rms_norm_eps=text["rms_norm_eps"],
        rope=_rope(path, rope | {"rope_parameters": ropes.get("full_attention")}),
        local_rope=_rope(path, local_rope | {"rope_parameters": ropes.get("sliding_attention")}),
        tie_embeddings=bool(text["tie_word_embeddings"]),
        qkv_bias=biased,
        output_bias=biased,
        qk_norm=True,
        sliding_window=_size(path, text, "sliding_window"),
        sliding_layers=tuple(kind == "sliding_attention" for kind in kinds),
        attention_scale=float(text["query_pre_attn_scalar"]) ** -0.5,
        sandwich_norms=True,
        eos_token_ids=eos_token_ids(folder) or (tuple(eos) if isinstance(eos, list) else (eos,)),
        bos_token_id=text["bos_token_id"],
        dtype=_dtype(text),
    )


_GEMMA3_DEFAULTS: dict[str, Any] = {
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
_GEMMA3_FIXED: dict[str, Any] = {
    "hidden_activation": "gelu_pytorch_tanh",
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": False,
}


def _size(path: Path, raw: dict[str, Any], name: str) -> int:
    value = raw.get(name)
    if not isinstance(value, int) or value < 1:
        raise ModelError(f"{path}: {name} is {value!r}, but must be a positive number")
    return value


def _dtype(raw: dict[str, Any]) -> str:
    name = raw.get("dtype") or raw.get("torch_dtype") or "float32"  # transformers 4 wrote torch_dtype
    return name if name in ("float32", "bfloat16", "float16") else "float32"


def _rope(path: Path, raw: dict[str, Any]) -> RopeConfig:
    """rope_parameters as transformers 5 writes them, or rope_theta and rope_scaling as version 4 did."""
    values = raw.get("rope_parameters") or {"rope_theta": raw.get("rope_theta"), **(raw.get("rope_scaling") or {})}
    theta = float(values.get("rope_theta") or raw.get("rope_theta") or 10000.0)
    kind = values.get("rope_type", values.get("type", "default"))
    if (partial := float(values.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)))) != 1.0:
        raise ModelError(f"{path}: partial_rotary_factor is {partial}, but the engine rotates whole heads (1.0)")
    try:
        if kind == "default":
            return RopeConfig(theta=theta)
        if kind == "linear":
            return RopeConfig(theta=theta, kind=kind, factor=float(values["factor"]))
        if kind == "llama3":
            return RopeConfig(
                theta=theta,
                kind=kind,
                factor=float(values["factor"]),
                low_freq_factor=float(values["low_freq_factor"]),
                high_freq_factor=float(values["high_freq_factor"]),
                original_max_position=int(values["original_max_position_embeddings"]),
            )
    except KeyError as error:
        raise ModelError(f"{path}: rope scaling of type {kind!r} lacks {error.args[0]!r}") from error
    raise ModelError(f"{path}: rope_type is {kind!r}, but the engine knows 'default', 'linear' and 'llama3'")


def _sliding_window(path: Path, raw: dict[str, Any], layers: int) -> int | None:
    """Mistral's holds for all layers; Qwen's only where it is switched on, and there may be layers without."""
    window = raw.get("sliding_window", 4096)  # transformers' default where the file says nothing
    kinds = set(raw.get("layer_types") or ())
    if raw["model_type"] == "llama" or window is None:
        return None
    if raw["model_type"] in ("qwen2", "qwen3"):
        if not raw.get("use_sliding_window", False):
            return None
        if not kinds:
            first = raw.get("max_window_layers", 28)
            kinds = {"full_attention" if i < first else "sliding_attention" for i in range(layers)}
    if kinds == {"full_attention"}:
        return None
    if len(kinds) > 1:
        raise ModelError(
            f"{path}: some layers have a sliding window and some have none, which the engine does not know"
        )
    return int(window)
