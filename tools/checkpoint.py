"""Writing models as Hugging Face folders, which the engine loads like any other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.models.registry import expected_shapes


def config_of(shape: ModelConfig) -> dict[str, Any]:
    """Return a plain Llama's shape as the fields of a config.json: what `engine.models.llama` reads, reversed."""
    config = {
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.max_position,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_theta": shape.rope.theta,
        "tie_word_embeddings": shape.tie_embeddings,
        "bos_token_id": shape.bos_token_id,
        "eos_token_id": list(shape.eos_token_ids),
        "dtype": shape.dtype,
    }
    if shape.rope.kind != "default":
        rope = asdict(shape.rope)
        config["rope_scaling"] = {
            "rope_type": shape.rope.kind,
            "original_max_position_embeddings": rope["original_max_position"],
            **{name: rope[name] for name in ("factor", "low_freq_factor", "high_freq_factor")},
        }
    return config


def write_model(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor] | None = None) -> Path:
    """Write config.json and, where `tensors` are given, model.safetensors; returns `folder`, made if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    if tensors is not None:
        save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return folder


def random_weights(shape: ModelConfig, deviation: float, dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return normal numbers for every tensor of a model, by name."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(size, generator=generator).mul_(deviation).to(dtype)
        for name, size in expected_shapes(shape).items()
    }
