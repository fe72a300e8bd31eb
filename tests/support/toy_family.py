"""A model family that the engine does not have: what a new one has to say, and a plain computation of it.

Its layers have names of their own, norms that multiply by 0.5 + their weight, one of them behind the MLP, GELU as the
MLP's gate, and biases of query, key and value.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from pilotfish.checkpoints.values import Values
from pilotfish.engine.layers.attention.backend import AttentionParams
from pilotfish.engine.layers.decoder import DecoderLayer, DenseMlp
from pilotfish.engine.models.config import ModelConfig, RopeConfig
from pilotfish.engine.models.family import Family
from pilotfish.engine.models.tensors import attention, embedding, final, gated_mlp, norm
from pilotfish.engine.models.weight_store import LayerWeights
from pilotfish.engine.weights.tensors import Tensor
from tests.support.tiny_gguf import interleaved

OFFSET = 0.5


def tensors(config: ModelConfig) -> Iterator[Tensor]:
    yield from embedding(config)
    for i in range(config.num_layers):
        hf, gguf_name = f"model.layers.{i}.", f"blk.{i}."
        yield norm(f"{hf}first", f"{gguf_name}first", config.hidden_size, OFFSET)
        yield from attention(config, f"{hf}mixer.", gguf_name, norm_offset=OFFSET, paired_rows=config.head_dim)
        yield norm(f"{hf}second", f"{gguf_name}second", config.hidden_size, OFFSET)
        yield from gated_mlp(config, f"{hf}ffn.", gguf_name)
        yield norm(f"{hf}third", f"{gguf_name}third", config.hidden_size, OFFSET)
    yield from final(config, OFFSET)


def layer(
    weights: LayerWeights, config: ModelConfig, attention: AttentionParams, cos_sin: torch.Tensor
) -> DecoderLayer:
    return DecoderLayer(
        input_norm=weights.norm("first"),
        qkv=weights.linear("mixer.qkv_proj"),
        output=weights.linear("mixer.o_proj"),
        mlp_norm=weights.norm("second"),
        mlp=DenseMlp(weights.linear("ffn.gate_up_proj"), weights.linear("ffn.down_proj"), "gelu"),
        mlp_post_norm=weights.norm("third"),
        cos_sin=cos_sin,
        attention=attention,
    )


def read_hf(values: Values) -> ModelConfig:
    width, heads = values.size("width"), values.size("heads")
    return ModelConfig(
        architecture="toy",
        vocab_size=values.size("tokens"),
        hidden_size=width,
        intermediate_size=values.size("inner"),
        num_layers=values.size("depth"),
        num_heads=heads,
        num_kv_heads=values.size("kv_heads"),
        head_dim=width // heads,
        max_position=256,
        rms_norm_eps=1e-5,
        rope=RopeConfig(),
        tie_embeddings=False,
        qkv_bias=True,
    )


FAMILY = Family(
    models="Toy", model_types=("toy",), gguf_architectures=("toy",), read_hf=read_hf, tensors=tensors, layer=layer
)

FIELDS = {"model_type": "toy", "width": 64, "heads": 4, "kv_heads": 2, "inner": 96, "depth": 2, "tokens": 101}


def make_weights() -> dict[str, torch.Tensor]:
    """Random weights under Hugging Face's names, such that every parameter matters."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for tensor in tensors(read_hf(Values(Path(), FIELDS))):
        noise = torch.randn(tensor.shape, generator=generator)
        weights[tensor.name] = noise * (2.5 * tensor.shape[1] ** -0.5 if noise.ndim == 2 else 0.3)
    return weights


def write_folder(folder: Path, weights: Mapping[str, torch.Tensor]) -> Path:
    folder.mkdir()
    save_file(dict(weights), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(FIELDS))
    return folder


def write_gguf(path: Path, weights: Mapping[str, torch.Tensor]) -> Path:
    writer = gguf.GGUFWriter(path, "toy")
    writer.add_block_count(2)
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    layer_names = {"first": "first", "second": "second", "third": "third", "mixer.o_proj": "attn_output"}
    layer_names |= {f"mixer.{letter}_proj": f"attn_{letter}" for letter in "qkv"}
    layer_names |= {f"ffn.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")}
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    names |= {f"model.layers.{i}.{hf}": f"blk.{i}.{name}" for i in range(2) for hf, name in layer_names.items()}
    for name, tensor in weights.items():
        module, _, kind = name.rpartition(".")
        values = tensor.numpy()
        if ".q_proj" in name or ".k_proj" in name:
            values = interleaved(values, 4 if ".q_proj" in name else 2)
        elif module.endswith(("first", "second", "third", "norm")):
            values = values + np.float32(OFFSET)
        writer.add_tensor(f"{names[module]}.{kind}", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits_of(weights: Mapping[str, torch.Tensor], ids: Sequence[int]) -> torch.Tensor:
    """(tokens, vocab_size) float64, from the weights alone."""
    exact = {name: tensor.double() for name, tensor in weights.items()}

    def normed(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], exact[f"{name}.weight"] + OFFSET, 1e-5)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, exact[f"{name}.weight"], exact.get(f"{name}.bias"))

    angles = torch.arange(len(ids)).double()[:, None] * 10000.0 ** (-torch.arange(0, 16, 2).double() / 16)
    cosine, sine = angles.cos(), angles.sin()

    def heads(x: torch.Tensor, count: int, rotated: bool = True) -> torch.Tensor:
        x = x.unflatten(1, (count, 16)).transpose(0, 1)  # (heads, tokens, head_dim)
        low, high = x.chunk(2, dim=-1)
        return torch.cat((low * cosine - high * sine, high * cosine + low * sine), dim=-1) if rotated else x

    hidden = exact["model.embed_tokens.weight"][torch.tensor(ids)]
    for i in range(2):
        name = f"model.layers.{i}"
        x = normed(hidden, f"{name}.first")
        query = heads(linear(x, f"{name}.mixer.q_proj"), 4)
        key, value = heads(linear(x, f"{name}.mixer.k_proj"), 2), heads(linear(x, f"{name}.mixer.v_proj"), 2, False)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        hidden = hidden + linear(attended.transpose(0, 1).flatten(1), f"{name}.mixer.o_proj")
        x = normed(hidden, f"{name}.second")
        gated = F.gelu(linear(x, f"{name}.ffn.gate_proj"), approximate="tanh") * linear(x, f"{name}.ffn.up_proj")
        hidden = hidden + normed(linear(gated, f"{name}.ffn.down_proj"), f"{name}.third")
    return linear(normed(hidden, "model.norm"), "lm_head")
