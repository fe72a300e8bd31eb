"""Models that need no download: small ones of each kind, written as folders that the engine loads like any other, and
the shape of Llama-3.1-8B for its speed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pilotfish.engine.weights.hf_config import read_config
from pilotfish.engine.weights.names import expected_shapes

SHARPNESS = 4.0
"""Standard deviation of a row of logits: large, so that near-ties are rare; and not so large that the rounding of
bfloat16 moves them by more than `tools.bench.compare` takes for a near-tie."""

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
    path.mkdir(parents=True)
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
    (path / "config.json").write_text(json.dumps(fields | KINDS[kind], indent=1))
    shape = read_config(path)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: _tensor(name, size, torch.randn(size, generator=generator), kind).to(getattr(torch, dtype))
        for name, size in expected_shapes(shape).items()
    }
    save_file(tensors, path / "model.safetensors")
    return path


def write_llama_8b(folder: Path) -> Path:
    """A folder with the config.json of Llama-3.1-8B alone, as it is published: for `load_format` "dummy"."""
    path = folder / "llama-3.1-8b"
    path.mkdir(parents=True, exist_ok=True)
    fields = {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": _LLAMA3 | {"rope_theta": 500000.0, "original_max_position_embeddings": 8192},
        "tie_word_embeddings": False,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "dtype": "bfloat16",
    }
    (path / "config.json").write_text(json.dumps(fields, indent=1))
    return path


def _tensor(name: str, size: tuple[int, ...], noise: torch.Tensor, kind: str) -> torch.Tensor:
    """Weights such that every parameter matters: attention is sharp, no norm is 1, no bias 0."""
    if name.endswith("norm.weight"):
        # Gemma's norms add 1, and those behind its layers' parts must not drown in its embedding, which is scaled up.
        after = kind == "gemma3" and (".post_attention_" in name or ".post_feedforward_" in name)
        return (3.0 if after else 0.0 if kind == "gemma3" else 1.0) + 0.2 * noise
    if name.endswith(".bias"):
        return 0.3 * noise
    gain = SHARPNESS if "lm_head" in name or (kind == "gemma3" and "embed_tokens" in name) else 1.5
    return noise * gain * size[1] ** -0.5
