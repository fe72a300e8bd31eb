"""The tensors that a model of a given ModelConfig has: Hugging Face's names and the shapes wanted; parts of them. No
torch."""

from __future__ import annotations

from collections.abc import Collection

from pilotfish.engine.models.config import ModelConfig
from pilotfish.errors import ModelError

HEAD = "lm_head.weight"

Part = tuple[slice, ...]
"""What is wanted of a tensor: of each of its dimensions a range, with start and stop."""


def whole(shape: tuple[int, ...]) -> Part:
    """All of it."""
    return tuple(slice(0, size) for size in shape)


def shape_of(part: Part) -> tuple[int, ...]:
    return tuple(each.stop - each.start for each in part)


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor, in the order of the computation. A tied head is not among them."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for i in range(config.num_layers):
        prefix = f"model.layers.{i}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        for name, size in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            shapes[f"{prefix}self_attn.{name}.weight"] = (size, hidden)
            if config.qkv_bias:
                shapes[f"{prefix}self_attn.{name}.bias"] = (size,)
        if config.qk_norm:
            shapes[prefix + "self_attn.q_norm.weight"] = (config.head_dim,)
            shapes[prefix + "self_attn.k_norm.weight"] = (config.head_dim,)
        shapes[prefix + "self_attn.o_proj.weight"] = (hidden, queries)
        if config.output_bias:
            shapes[prefix + "self_attn.o_proj.bias"] = (hidden,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        if config.sandwich_norms:
            shapes[prefix + "pre_feedforward_layernorm.weight"] = (hidden,)
        for name, size, width in (
            ("gate_proj", inner, hidden),
            ("up_proj", inner, hidden),
            ("down_proj", hidden, inner),
        ):
            shapes[f"{prefix}mlp.{name}.weight"] = (size, width)
            if config.mlp_bias:
                shapes[f"{prefix}mlp.{name}.bias"] = (size,)
        if config.sandwich_norms:
            shapes[prefix + "post_feedforward_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_embeddings:
        shapes[HEAD] = (config.vocab_size, hidden)
    return shapes


def check_names(where: object, found: Collection[str], expected: Collection[str]) -> None:
    """Raise ModelError unless the tensors `found` in `where` are those `expected`."""
    if missing := [name for name in expected if name not in found]:
        raise ModelError(f"{where} lacks {_listed(missing)}")
    if unknown := [name for name in found if name not in expected]:
        raise ModelError(f"{where} has {_listed(sorted(unknown))}, which a model of this configuration has not")


def check_shape(where: object, name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """Raise ModelError unless the tensor has the shape that the configuration gives it."""
    if found != wanted:
        raise ModelError(f"{where}: tensor {name!r} has shape {found}, but the configuration makes it {wanted}")


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:5])
    rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"tensor{'s' if len(names) > 1 else ''} {shown}{rest}"
