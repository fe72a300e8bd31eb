"""What a model's shape must fulfil, whichever file it was read from, before anything is made or looped over by it.

The bounds are a few times what the largest published models have. A shape within them may still be none of the files':
tensors are held against it when they are read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pilotfish.engine.models.config import ModelConfig, RopeConfig
from pilotfish.errors import ModelError

MOST_LAYERS = 2**11
MOST_HEADS = 2**14
MOST_EXPERTS = 2**16
"""Experts of all layers together."""
LARGEST_HEAD = 2**12
LARGEST_VOCABULARY = 2**24
LARGEST_CONTEXT = 2**22
"""Positions: a table has cosines and sines for each of them."""


def check_config(path: Path, config: ModelConfig) -> ModelConfig:
    """The same config. Raises ModelError, which names the field, unless a decoder can have this shape."""
    for text in _faults(config):
        raise ModelError(f"{path}: {text}")
    return config


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Make a ModelError of what values of wrong types raise where they are used, if reading them has let them pass."""
    try:
        yield
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ModelError(f"{path} has a value of a wrong type or size: {error}") from error


def _faults(config: ModelConfig) -> Iterator[str]:
    sizes = {
        "num_layers": MOST_LAYERS,
        "num_heads": MOST_HEADS,
        "num_kv_heads": MOST_HEADS,
        "head_dim": LARGEST_HEAD,
        "vocab_size": LARGEST_VOCABULARY,
        "max_position": LARGEST_CONTEXT,
        "longest": LARGEST_CONTEXT,
    }
    for name, most in sizes.items():
        if not 1 <= (value := getattr(config, name)) <= most:
            yield f"{name} is {value}, but the engine knows models with 1 to {most}"
    if config.num_heads % config.num_kv_heads:
        yield f"num_heads is {config.num_heads}, but must be a multiple of num_kv_heads, {config.num_kv_heads}"
    if config.head_dim % 2:
        yield f"head_dim is {config.head_dim}, but must be even"
    if config.rms_norm_eps < 0:
        yield f"rms_norm_eps is {config.rms_norm_eps}, but must not be negative"
    if config.sliding_layers and len(config.sliding_layers) != config.num_layers:
        yield f"sliding_layers has {len(config.sliding_layers)} layers, but the model has {config.num_layers}"
    for rope in filter(None, (config.rope, config.local_rope)):
        yield from _rope_faults(rope, config.head_dim)
    if (experts := config.experts) is not None:
        if experts.count * config.num_layers > MOST_EXPERTS:
            yield f"it has {experts.count} experts in {config.num_layers} layers, but may have {MOST_EXPERTS} in all"
        if experts.per_token > experts.count:
            yield f"each token takes {experts.per_token} experts, but there are {experts.count}"


def _rope_faults(rope: RopeConfig, head_dim: int) -> Iterator[str]:
    if not 0 < rope.share <= 1 or rope.rotated(head_dim) % 2 or rope.rotated(head_dim) < 2:
        yield f"rope rotates {rope.share} of a head of {head_dim} dimensions, but must rotate an even number of them"
    elif rope.kind == "dynamic" and rope.rotated(head_dim) < 4:
        yield "dynamic rope scaling needs 4 dimensions or more that are rotated"
    for name in ("theta", "factor", "attention_factor", "beta_fast", "beta_slow"):
        if not 0 < (value := getattr(rope, name)) < math.inf:
            yield f"rope {name} is {value}, but must be a positive number"
    if rope.theta <= 1:
        yield f"rope theta is {rope.theta}, but must be more than 1"
    if rope.kind == "llama3" and not rope.low_freq_factor < rope.high_freq_factor:
        yield f"rope low_freq_factor is {rope.low_freq_factor}, but must be less than {rope.high_freq_factor}"
    if not 1 <= rope.original_max_position <= LARGEST_CONTEXT:
        yield f"rope original_max_position is {rope.original_max_position}, but may be 1 to {LARGEST_CONTEXT}"
    if rope.kind == "dynamic" and rope.factor < 1:
        yield f"rope factor is {rope.factor}, but dynamic scaling needs at least 1"
    for factors in filter(None, (rope.freq_factors, rope.long_factors)):
        if len(factors) != rope.rotated(head_dim) // 2 or not all(0 < each < math.inf for each in factors):
            wanted = rope.rotated(head_dim) // 2
            yield f"rope has {len(factors)} factors of frequencies, but must have {wanted} positive ones"
