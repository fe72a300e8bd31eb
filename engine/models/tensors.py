"""The building blocks of which families declare their tensors: norms, matrices, attention, MLPs. No torch.

Sharding follows Megatron-LM (arXiv 1909.08053): query, key, value, gate and up are sharded by rows, the output and down
projections by columns, their results summed over the ranks; a bias is sharded like the rows of its matrix.
"""

from __future__ import annotations

from collections.abc import Iterator

from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.weights.tensors import Axis, Tensor

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def norm(
    name: str,
    gguf: str,
    size: int,
    offset: float = 0.0,
    *,
    axis: Axis | None = None,
    turned: tuple[int, int] | None = None,
) -> Tensor:
    """A norm's weight, (size,), which multiplies by offset + weight."""
    return Tensor(
        name=f"{name}.weight",
        shape=(size,),
        gguf=f"{gguf}.weight",
        axes=(axis,),
        norm_offset=offset,
        turned=turned,
    )


def linear(
    name: str,
    gguf: str,
    shape: tuple[int, int],
    *,
    rows: Axis | None = None,
    columns: Axis | None = None,
    bias: bool = False,
    fused: str | None = None,
    quantizable: bool = True,
    paired_rows: int = 0,
    turned: tuple[int, int] | None = None,
    stored: str = "",
    gguf_stored: str = "",
    expert: int | None = None,
) -> Iterator[Tensor]:
    """A matrix, (out_features, in_features), sharded by its `rows` or its `columns`, and its bias if it has one.

    fused: the module path of the matrix that it is fused into; None: it stands alone. stored, gguf_stored: the modules
    whose stored tensors these are parts of; "": they are stored by themselves.
    """
    path = fused or name
    yield Tensor(
        name=f"{name}.weight",
        shape=shape,
        gguf=f"{gguf}.weight",
        axes=(rows, columns),
        linear=path,
        quantizable=quantizable,
        paired_rows=paired_rows,
        turned=turned,
        stored=stored and f"{stored}.weight",
        gguf_stored=gguf_stored and f"{gguf_stored}.weight",
        expert=expert,
    )
    if bias:
        yield Tensor(
            name=f"{name}.bias",
            shape=shape[:1],
            gguf=f"{gguf}.bias",
            axes=(rows,),
            linear=path,
            first_rank_only=columns is not None,
            paired_rows=paired_rows,
            turned=turned,
            stored=stored and f"{stored}.bias",
            gguf_stored=gguf_stored and f"{gguf_stored}.bias",
            expert=expert,
        )


def embedding(config: ModelConfig) -> Iterator[Tensor]:
    shape = config.vocab_size, config.hidden_size
    yield from linear("model.embed_tokens", "token_embd", shape, rows="vocabulary", quantizable=False)


def attention(
    config: ModelConfig,
    hf: str,
    gguf: str,
    *,
    inputs: int = 0,
    norm_offset: float = 0.0,
    paired_rows: int = 0,
    stored: bool = False,
    whole_norms: bool = False,
) -> Iterator[Tensor]:
    """A layer's attention; `hf` and `gguf` are prefixes of its names.

    inputs: in_features of qkv; 0: hidden_size. stored: query, key and value are stored as one matrix. whole_norms:
    norms of query and key are over all heads at once.
    """
    hidden, queries = config.hidden_size, config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    rotated = config.rope.rotated(config.head_dim)
    turned = None if rotated == config.head_dim else (config.head_dim, rotated)
    heads: tuple[tuple[str, int, Axis, int], ...] = (
        ("q", queries, "heads", paired_rows),
        ("k", keys, "kv_heads", paired_rows),
        ("v", keys, "kv_heads", 0),
    )
    for letter, size, rows, pairs in heads:
        yield from linear(
            f"{hf}{letter}_proj",
            f"{gguf}attn_{letter}",
            (size, inputs or hidden),
            rows=rows,
            bias=config.qkv_bias,
            fused=f"{hf}qkv_proj",
            paired_rows=pairs,
            turned=None if letter == "v" else turned,
            stored=f"{hf}qkv_proj" if stored else "",
            gguf_stored=f"{gguf}attn_qkv" if stored else "",
        )
    if config.qk_norm:
        for letter, size, rows, _ in heads[:2]:
            yield norm(
                f"{hf}{letter}_norm",
                f"{gguf}attn_{letter}_norm",
                size if whole_norms else config.head_dim,
                norm_offset,
                axis=rows if whole_norms else None,
                turned=turned,
            )
    names = f"{hf}o_proj", f"{gguf}attn_output"
    yield from linear(*names, (hidden, queries), columns="heads", bias=config.output_bias)


def gated_mlp(
    config: ModelConfig, hf: str, gguf: str, *, stored: bool = False, shared: bool = False
) -> Iterator[Tensor]:
    """A layer's dense MLP; `hf` and `gguf` are the prefixes of its names. stored: gate and up are stored as one matrix.
    shared: it is the expert that every row takes."""
    hidden, inner, end = config.hidden_size, config.intermediate_size, ""
    axis: Axis = "inner"
    if shared:
        assert config.experts is not None
        inner, axis, end = config.experts.shared_size, "shared", "_shexp"
    for name in ("gate", "up"):
        yield from linear(
            f"{hf}{name}_proj",
            f"{gguf}ffn_{name}{end}",
            (inner, hidden),
            rows=axis,
            bias=config.mlp_bias,
            fused=f"{hf}gate_up_proj",
            stored=f"{hf}gate_up_proj" if stored else "",
            gguf_stored=f"{gguf}ffn_up" if stored else "",
        )
    names = f"{hf}down_proj", f"{gguf}ffn_down{end}"
    yield from linear(*names, (hidden, inner), columns=axis, bias=config.mlp_bias)


def final(config: ModelConfig, norm_offset: float = 0.0) -> Iterator[Tensor]:
    """The norm after the last layer, and the head unless it is tied to the embedding."""
    yield norm("model.norm", "output_norm", config.hidden_size, norm_offset)
    if not config.tie_embeddings:
        shape = config.vocab_size, config.hidden_size
        yield from linear("lm_head", "output", shape, rows="vocabulary", quantizable=False)
