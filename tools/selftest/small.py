"""Models that need no download: small ones of each kind, and the shape of Llama-3.1-8B for measuring speed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pilotfish.engine.models.checkpoint import read_hf_config
from pilotfish.engine.models.registry import family_of, tensors_of
from pilotfish.engine.models.tensors import EMBEDDING, HEAD
from pilotfish.engine.weights.tensors import Tensor
from pilotfish.tools.checkpoint import config_of, write_model
from pilotfish.tools.planner.published import PUBLISHED

SHARPNESS = 4.0
"""Standard deviation of a row of logits: large, so that near-ties are rare, but not so large that rounding in bfloat16
moves them by more than the bound of `tools.bench.compare`."""

_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,  # so short that a prompt of 100 tokens meets all three ranges
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "rope_parameters": _LLAMA3},
    "mistral": {"model_type": "mistral", "sliding_window": 24},
    "qwen3": {"model_type": "qwen3", "attention_bias": True},
    "gemma3": {
        "model_type": "gemma3_text",
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 24,
        "query_pre_attn_scalar": 64,
        "tie_word_embeddings": True,
    },
}


def write(folder: Path, kind: str, *, dtype: str = "float32", ranks: int = 1, seed: int = 0) -> Path:
    """Write the model of `kind`, its weights rounded to `dtype`, unless it is there; returns its folder.

    The same arguments give the same weights on every machine. Its heads, key-value heads and sizes divide by `ranks`.
    """
    path = folder / f"small-{kind}-{dtype}-{ranks}-{seed}"
    if path.exists():
        return path
    kv_heads = ranks * -(-4 // ranks)
    fields: dict[str, Any] = {
        "vocab_size": 1024,
        "hidden_size": 256,
        "intermediate_size": 16 * ranks * -(-32 // ranks),
        "num_hidden_layers": 2,
        "num_attention_heads": 2 * kv_heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "eos_token_id": 0,
        "dtype": dtype,
    }
    shape = read_hf_config(write_model(path, fields | KINDS[kind]))
    generator = torch.Generator().manual_seed(seed)
    scaled = family_of(shape.architecture).scaled_embedding
    tensors = {
        name: _values(tensor, torch.randn(tensor.shape, generator=generator), scaled).to(getattr(torch, dtype))
        for name, tensor in tensors_of(shape).items()
    }
    return write_model(path, fields | KINDS[kind], tensors)


def write_llama_8b(folder: Path) -> Path:
    """As `write_published`, of Llama-3.1-8B."""
    return write_published(folder, "llama-3.1-8b")


def write_published(folder: Path, name: str) -> Path:
    """Write the published config.json of a model alone, for `load_format` "dummy"; returns its folder."""
    return write_model(folder / name, config_of(PUBLISHED[name]))


def _values(tensor: Tensor, noise: torch.Tensor, scaled: bool) -> torch.Tensor:
    """Return weights with which every parameter matters: attention is sharp, no norm is 1, no bias 0.

    scaled: the model scales its embedding up, so the layers' outputs need to be larger, too.
    """
    if tensor.linear is None:
        added = scaled and (".post_attention_" in tensor.name or ".post_feedforward_" in tensor.name)
        return noise * 0.2 + (3.0 if added else 1.0 - tensor.norm_offset)
    if tensor.kind == "bias":
        return noise * 0.3
    sharp = tensor.name == HEAD or (scaled and tensor.name == EMBEDDING)
    scale: float = tensor.shape[1] ** -0.5
    return noise * (SHARPNESS if sharp else 1.5) * scale
