"""Shapes of well-known models, as their published config.json files give them: planning needs no download.

Sources: the config.json of each repository on the Hugging Face hub; the Llama 3 paper (arXiv 2407.21783, table 3 and
section 6.2) for what Meta's fp8 checkpoint leaves in bfloat16; SmolLM2 arXiv 2502.02737; Gemma 3 arXiv 2503.19786.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pilotfish.engine.models.config import ModelConfig, RopeConfig
from pilotfish.engine.weights.quantization import Quantization


def find(name: str) -> ModelConfig | None:
    """Find a model by its hub name ("meta-llama/Llama-3.1-8B-Instruct"), with or without the organisation, instruct or
    base, in any case; None for a model that is not here."""
    plain = name.rpartition("/")[2].lower()
    for prefix in ("meta-", "huggingfacetb-"):
        plain = plain.removeprefix(prefix)
    fp8 = plain.endswith("-fp8")
    for ending in ("-fp8", "-instruct", "-it"):
        plain = plain.removesuffix(ending)
    return PUBLISHED.get(plain + "-fp8" if fp8 else plain)


def _llama3(
    hidden: int, inner: int, layers: int, heads: int, head_dim: int, scaling: float = 8.0, tied: bool = False
) -> ModelConfig:
    """Llama 3.1 and 3.2: one vocabulary, 8 key-value heads, 128 Ki positions."""
    return ModelConfig(
        architecture="llama",
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=head_dim,
        max_position=131072,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=500000.0, kind="llama3", factor=scaling),
        tie_embeddings=tied,
        eos_token_ids=(128001, 128008, 128009),
        bos_token_id=128000,
        dtype="bfloat16",
    )


_LLAMA_405B = _llama3(16384, 53248, 126, 128, 128)

PUBLISHED: Mapping[str, ModelConfig] = {
    "llama-3.1-8b": _llama3(4096, 14336, 32, 32, 128),
    "llama-3.1-70b": _llama3(8192, 28672, 80, 64, 128),
    "llama-3.1-405b": _LLAMA_405B,
    # Self-attention everywhere, and all of the first and the last layer, stay in bfloat16.
    "llama-3.1-405b-fp8": replace(
        _LLAMA_405B, quantization=Quantization("fp8", ("self_attn", "layers.0", "layers.125"))
    ),
    "llama-3.2-1b": _llama3(2048, 8192, 16, 32, 64, scaling=32.0, tied=True),
    "llama-3.2-3b": _llama3(3072, 8192, 28, 24, 128, scaling=32.0, tied=True),
    "smollm2-135m": ModelConfig(
        architecture="llama",
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        max_position=8192,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=100000.0),
        tie_embeddings=True,
        eos_token_ids=(2,),
        bos_token_id=1,
        dtype="bfloat16",
    ),
    "gemma-3-270m": ModelConfig(
        architecture="gemma3",
        vocab_size=262144,
        hidden_size=640,
        intermediate_size=2048,
        num_layers=18,
        num_heads=4,
        num_kv_heads=1,
        head_dim=256,
        max_position=32768,
        rms_norm_eps=1e-6,
        rope=RopeConfig(theta=1e6),
        local_rope=RopeConfig(theta=1e4),
        tie_embeddings=True,
        qk_norm=True,
        sliding_window=512,
        sliding_layers=tuple((layer + 1) % 6 != 0 for layer in range(18)),
        attention_scale=256.0**-0.5,
        sandwich_norms=True,
        eos_token_ids=(1,),
        bos_token_id=2,
        dtype="bfloat16",
    ),
}
