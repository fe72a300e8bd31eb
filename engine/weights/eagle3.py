"""EAGLE-3 drafts on disk, in the two public layouts, read as they are published.

- SafeAILab's (github.com/SafeAILab/EAGLE; also what SpecForge, AngelSlim and Model Optimizer write): config.json is a
  Llama configuration with `draft_vocab_size` and architecture "LlamaForCausalLMEagle3"; tensors `midlayer.*` (or
  `layers.0.*`), `fc`, `norm`, `lm_head`, `d2t`, `t2d`, and `embed_tokens` where the draft has its own; in
  model.safetensors or pytorch_model.bin.
- speculators' (github.com/vllm-project/speculators): config.json has `speculators_model_type` "eagle3" and the layer's
  shape in `transformer_layer_config`; tensors `layers.0.*` and the same others; model.safetensors.

`d2t[i]` is what must be added to the draft's token i to have the target's; `t2d` says the same as a mask, and is not
needed. Matrices may also be stored as int8 with one scale a row (`NAME.weight` int8, `NAME.weight_scale` float32):
so the drafts that come with Pilotfish are kept small.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from engine.errors import ModelError
from engine.models.config import Eagle3Config
from engine.weights.hf_config import layer_config, read_json
from engine.weights.names import check_names, check_shape

SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"

_UNUSED = ("t2d", "verifier_norm.weight", "verifier_lm_head.weight", "rotary_emb.inv_freq")
"""What checkpoints hold for training, or what follows from the rest."""


def read_config(folder: Path) -> Eagle3Config:
    """The draft's shape. Raises ModelError for what the engine does not know."""
    path = folder / "config.json"
    raw = read_json(path)
    layer: dict[str, Any] = raw.get("transformer_layer_config") or raw
    if raw.get("norm_before_fc"):
        raise ModelError(f"{path}: norm_before_fc is set, but the engine knows EAGLE-3 drafts without it")
    if (layers := layer.get("num_hidden_layers", 1)) != 1:
        raise ModelError(f"{path}: num_hidden_layers is {layers}, but the engine knows EAGLE-3 drafts with 1")
    decoder = layer_config(folder, path, {"model_type": "llama", **layer, "num_hidden_layers": 1})
    extra = raw.get("eagle_config") or {}
    ids = raw.get("eagle_aux_hidden_state_layer_ids") or extra.get("eagle_aux_hidden_state_layer_ids") or ()
    if ids and len(ids) != 3:
        raise ModelError(f"{path}: eagle_aux_hidden_state_layer_ids is {ids!r}, but must name three layers")
    return Eagle3Config(
        decoder=decoder,
        draft_vocab_size=raw.get("draft_vocab_size") or decoder.vocab_size,
        target_hidden_size=raw.get("target_hidden_size") or decoder.hidden_size,
        feature_layers=tuple(ids),
        norm_before_residual=bool(raw.get("norm_before_residual", False)),
    )


def read_weights(folder: Path, config: Eagle3Config, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The draft's tensors, on the CPU, the layer's under "layer.", in `dtype`; and `target_ids`, (draft_vocab_size,)
    int64, unless the draft has the target's vocabulary as it is. For float32, int8 matrices stay what they are, each
    with its `NAME.weight_scale`, (rows, 1) float32.

    Raises ModelError if one is missing, unknown, or has another shape than the configuration makes it.
    """
    stored = {_plain(name): tensor for name, tensor in _load(folder).items() if not _plain(name).endswith(_UNUSED)}
    offsets = stored.pop("d2t", None)
    tensors = {name: tensor for name, tensor in stored.items() if not name.endswith(".weight_scale")}
    shapes = expected_shapes(config)
    optional = {"embed_tokens.weight"}
    if config.draft_vocab_size == config.decoder.vocab_size:
        optional.add("lm_head.weight")
    check_names(folder, tensors.keys(), [name for name in shapes if name not in optional or name in tensors])
    for name, tensor in list(tensors.items()):
        check_shape(folder, name, tuple(tensor.shape), shapes[name])
        if tensor.dtype != torch.int8:
            tensors[name] = tensor.to(dtype)
            continue
        scale = stored.get(f"{name}_scale")
        if scale is None:
            raise ModelError(f"{folder}: tensor {name!r} is int8, but has no {name}_scale")
        scale = scale.float().view(-1, 1)
        if dtype == torch.float32:
            tensors[f"{name}_scale"] = scale
        else:
            tensors[name] = (tensor.float() * scale).to(dtype)
    if offsets is not None:
        tensors["target_ids"] = _target_ids(folder, config, offsets)
    elif config.draft_vocab_size != config.decoder.vocab_size:
        raise ModelError(f"{folder} has no tensor 'd2t', but its vocabulary is not the target's")
    return tensors


def expected_shapes(config: Eagle3Config) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor, as `read_weights` names them."""
    decoder = config.decoder
    hidden, inner = decoder.hidden_size, decoder.intermediate_size
    queries, keys = decoder.num_heads * decoder.head_dim, decoder.num_kv_heads * decoder.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (hidden, 3 * config.target_hidden_size),
        "layer.input_layernorm.weight": (hidden,),
        "layer.hidden_norm.weight": (hidden,),
    }
    for name, size in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        shapes[f"layer.self_attn.{name}.weight"] = (size, 2 * hidden)
        if decoder.qkv_bias:
            shapes[f"layer.self_attn.{name}.bias"] = (size,)
    if decoder.qk_norm:
        shapes["layer.self_attn.q_norm.weight"] = shapes["layer.self_attn.k_norm.weight"] = (decoder.head_dim,)
    shapes |= {
        "layer.self_attn.o_proj.weight": (hidden, queries),
        "layer.post_attention_layernorm.weight": (hidden,),
        "layer.mlp.gate_proj.weight": (inner, hidden),
        "layer.mlp.up_proj.weight": (inner, hidden),
        "layer.mlp.down_proj.weight": (hidden, inner),
        "norm.weight": (hidden,),
        "lm_head.weight": (config.draft_vocab_size, hidden),
        "embed_tokens.weight": (decoder.vocab_size, hidden),
    }
    if decoder.output_bias:
        shapes["layer.self_attn.o_proj.bias"] = (hidden,)
    return shapes


def _plain(name: str) -> str:
    """A stored tensor's name without what the layouts differ in."""
    name = name.removeprefix("model.")
    for prefix in ("midlayer.", "layers.0."):
        if name.startswith(prefix):
            return "layer." + name.removeprefix(prefix)
    return name


def _target_ids(folder: Path, config: Eagle3Config, offsets: torch.Tensor) -> torch.Tensor:
    if offsets.shape != (config.draft_vocab_size,):
        raise ModelError(
            f"{folder}: tensor 'd2t' has shape {tuple(offsets.shape)}, but draft_vocab_size is "
            f"{config.draft_vocab_size}"
        )
    ids = torch.arange(config.draft_vocab_size) + offsets.long()
    if int(ids.min()) < 0 or int(ids.max()) >= config.decoder.vocab_size:
        raise ModelError(
            f"{folder}: tensor 'd2t' leads to token {int(ids.max())}, but the vocabulary is {config.decoder.vocab_size}"
        )
    return ids


def _load(folder: Path) -> dict[str, torch.Tensor]:
    try:
        if (folder / SAFETENSORS).is_file():
            return load_file(str(folder / SAFETENSORS))
        if (folder / PICKLED).is_file():
            loaded: dict[str, torch.Tensor] = torch.load(folder / PICKLED, map_location="cpu", weights_only=True)
            return loaded
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise ModelError(f"cannot read the weights in {folder}: {error}") from error
    raise ModelError(f"{folder} has neither {SAFETENSORS} nor {PICKLED}")
