"""Block drafters of random weights in the public layouts, and their published architecture in plain torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

VOCAB, HIDDEN, HEADS, KV_HEADS, DIM, INNER, LAYERS = 96, 64, 4, 2, 16, 96, 2
MASK, BLOCK = 95, 5

QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": DIM,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
ZLAB = QWEN3 | {
    "architectures": ["DFlashDraftModel"],
    "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
    "block_size": BLOCK,
    "num_target_layers": 6,
    "layer_types": ["full_attention"] * LAYERS,
    "dflash_config": {"mask_token_id": MASK, "target_layer_ids": [0, 2, 4]},
}
DEEPSPEC = QWEN3 | {
    "architectures": ["Qwen3DSparkModel"],
    "block_size": BLOCK,
    "num_target_layers": 6,
    "mask_token_id": MASK,
    "target_layer_ids": [-1, 1, 3],
    "num_anchors": 8,
    "enable_confidence_head": False,
    "markov_rank": 0,
}
SPECULATORS = {
    "architectures": ["DFlashSpeculator"],
    "speculators_model_type": "dflash",
    "block_size": BLOCK,
    "draft_vocab_size": 32,
    "aux_hidden_state_layer_ids": [1, 3, 5],
    "mask_token_id": MASK,
    "sample_from_anchor": False,
    "sliding_window_non_causal": False,
    "transformer_layer_config": {name: value for name, value in QWEN3.items() if name != "tie_word_embeddings"},
    "speculators_config": {"algorithm": "dflash", "verifier": {"name_or_path": "someone/target"}},
}


def random_tensors(
    draft_vocab: int = 0, features: int = 3, embedding: bool = False, head: bool = False, seed: int = 0
) -> dict[str, torch.Tensor]:
    """The tensors of a DFlash drafter, by their public names. draft_vocab: 0 for the target's vocabulary."""
    source = torch.Generator().manual_seed(seed)

    def matrix(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=source) * shape[-1] ** -0.5

    def norm(size: int) -> torch.Tensor:
        return 1.0 + 0.2 * torch.randn(size, generator=source)

    tensors = {"fc.weight": matrix(HIDDEN, features * HIDDEN), "hidden_norm.weight": norm(HIDDEN)}
    for i in range(LAYERS):
        layer = {
            "input_layernorm": norm(HIDDEN),
            "self_attn.q_proj": matrix(HEADS * DIM, HIDDEN),
            "self_attn.k_proj": matrix(KV_HEADS * DIM, HIDDEN),
            "self_attn.v_proj": matrix(KV_HEADS * DIM, HIDDEN),
            "self_attn.o_proj": matrix(HIDDEN, HEADS * DIM),
            "self_attn.q_norm": norm(DIM),
            "self_attn.k_norm": norm(DIM),
            "post_attention_layernorm": norm(HIDDEN),
            "mlp.gate_proj": matrix(INNER, HIDDEN),
            "mlp.up_proj": matrix(INNER, HIDDEN),
            "mlp.down_proj": matrix(HIDDEN, INNER),
        }
        tensors |= {f"layers.{i}.{name}.weight": tensor for name, tensor in layer.items()}
    tensors["norm.weight"] = norm(HIDDEN)
    if embedding:
        tensors["embed_tokens.weight"] = matrix(VOCAB, HIDDEN)
    if head or draft_vocab:
        tensors["lm_head.weight"] = matrix(draft_vocab or VOCAB, HIDDEN)
    if draft_vocab:
        ids = torch.randperm(VOCAB, generator=source)[:draft_vocab].sort().values
        tensors["d2t"] = ids - torch.arange(draft_vocab)
        tensors["t2d"] = torch.zeros(VOCAB, dtype=torch.bool).index_fill_(0, ids, True)
    return tensors


def dspark(config: dict[str, Any], kind: str, rank: int = 8, confidence: bool = True) -> dict[str, Any]:
    """A configuration of DeepSpec's or speculators' with DSpark's heads."""
    names = {"architectures": ["DSparkSpeculator"], "speculators_model_type": "dspark", "sample_from_anchor": True}
    own = names if "speculators_model_type" in config else {}
    heads = {"markov_rank": rank, "markov_head_type": kind, "enable_confidence_head": confidence}
    return config | own | heads | {"confidence_head_with_markov": confidence}


def dspark_tensors(kind: str, rank: int = 8, draft_vocab: int = 0, confidence: bool = True) -> dict[str, torch.Tensor]:
    """The tensors of DSpark's heads, by their public names."""
    source = torch.Generator().manual_seed(7)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=source)

    tensors = {"markov_w1": tensor(VOCAB, rank), "markov_w2": tensor(draft_vocab or VOCAB, rank)}
    tensors = {f"markov_head.{name}.weight": each for name, each in tensors.items()}
    sizes = {"gated": ("gate_proj", rank, HIDDEN + rank), "rnn": ("joint_proj", 3 * rank, 2 * rank + HIDDEN)}
    if kind in sizes:
        name, out, inputs = sizes[kind]
        tensors[f"markov_head.{name}.weight"] = tensor(out, inputs) * inputs**-0.5
        tensors[f"markov_head.{name}.bias"] = tensor(out)
    if confidence:
        tensors["confidence_head.proj.weight"] = tensor(1, HIDDEN + rank) * 0.2
        tensors["confidence_head.proj.bias"] = tensor(1)
    return tensors


def chain(
    tensors: dict[str, torch.Tensor],
    kind: str,
    hidden: torch.Tensor,  # (positions, HIDDEN), normed
    logits: torch.Tensor,  # (positions, vocabulary)
    last: int,
    ids: list[int],  # the target's, of the columns
) -> tuple[list[int], list[float]]:
    """Return the likeliest tokens of a block and the confidences, as DeepSpec's sample_block_tokens and its confidence
    head compute them, position by position."""

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))

    tokens, confidences = [], []
    state = torch.zeros(tensors["markov_head.markov_w1.weight"].shape[1])
    for row, base in zip(hidden, logits, strict=True):
        embedded = tensors["markov_head.markov_w1.weight"][last]
        latent = embedded
        if kind == "gated":
            latent = linear("markov_head.gate_proj", torch.cat((row, embedded))).sigmoid() * embedded
        elif kind == "rnn":
            parts = linear("markov_head.joint_proj", torch.cat((state, embedded, row))).chunk(3)
            state = parts[0].sigmoid() * state + (1 - parts[0].sigmoid()) * parts[1].tanh()
            latent = parts[2].tanh()
        last = ids[int((base + linear("markov_head.markov_w2", latent)).argmax())]
        tokens.append(last)
        confidences.append(float(linear("confidence_head.proj", torch.cat((row, embedded))).sigmoid()))
    return tokens, confidences


def write(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, str(folder / "model.safetensors"))
    return folder


def block_hidden(
    tensors: dict[str, torch.Tensor],
    features: torch.Tensor,  # (context, layers * HIDDEN), of the positions before the block
    embedded: torch.Tensor,  # (BLOCK, HIDDEN)
    windows: tuple[int | None, ...] = (None,) * LAYERS,
    causal: tuple[bool, ...] = (False,) * LAYERS,
    eps: float = 1e-5,
) -> torch.Tensor:
    """Return the normed hidden states of a block, (BLOCK, HIDDEN), as z-lab's DFlashDraftModel computes them: keys and
    values of the context are projections of its fused features, those of the block are its rows' own."""

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, tensors[f"{name}.weight"])

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], tensors[f"{name}.weight"], eps)

    context, rows = len(features), len(embedded)
    fused, hidden = norm(linear(features, "fc"), "hidden_norm"), embedded
    at, block = torch.arange(context + rows), torch.arange(context, context + rows)
    for i, (window, is_causal) in enumerate(zip(windows, causal, strict=True)):
        p = f"layers.{i}."
        x = norm(hidden, f"{p}input_layernorm")
        both = torch.cat((fused, x))
        q = _rotated(norm(linear(x, f"{p}self_attn.q_proj").view(rows, HEADS, DIM), f"{p}self_attn.q_norm"), block)
        k = linear(both, f"{p}self_attn.k_proj").view(-1, KV_HEADS, DIM)
        k = _rotated(norm(k, f"{p}self_attn.k_norm"), at).repeat_interleave(HEADS // KV_HEADS, 1)
        v = linear(both, f"{p}self_attn.v_proj").view(-1, KV_HEADS, DIM).repeat_interleave(HEADS // KV_HEADS, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * DIM**-0.5
        seen = torch.ones(rows, context + rows, dtype=torch.bool)
        if is_causal:
            seen &= at <= block[:, None]
            seen &= at > block[:, None] - (window or 10**6)
        elif window:
            seen &= at >= context - window
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        attended = torch.einsum("hqk,khd->qhd", weights, v).reshape(rows, -1)
        hidden = hidden + linear(attended, f"{p}self_attn.o_proj")
        x = norm(hidden, f"{p}post_attention_layernorm")
        hidden = hidden + linear(
            F.silu(linear(x, f"{p}mlp.gate_proj")) * linear(x, f"{p}mlp.up_proj"), f"{p}mlp.down_proj"
        )
    return norm(hidden, "norm")


def _rotated(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of (rows, heads, DIM), as Hugging Face computes it."""
    frequencies = 10000.0 ** (-torch.arange(0, DIM, 2) / DIM)
    angles = (positions[:, None] * frequencies).repeat(1, 2)[:, None]
    low, high = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat((-high, low), dim=-1) * angles.sin()
