"""EAGLE-3 heads on disk: their shape, tensors and weights, in the two public layouts, read as they are published.

- SafeAILab's (github.com/SafeAILab/EAGLE; also what SpecForge, AngelSlim and Model Optimizer write): config.json is a
  Llama configuration with `draft_vocab_size` and architecture "LlamaForCausalLMEagle3"; tensors `midlayer.*` (or
  `layers.0.*`), `fc`, `norm`, `lm_head`, `d2t`, `t2d`, and `embed_tokens` where the head has its own; in
  model.safetensors or pytorch_model.bin.
- speculators' (github.com/vllm-project/speculators): config.json has `speculators_model_type` "eagle3" and the layer's
  shape in `transformer_layer_config`; tensors `layers.0.*` and the same others; model.safetensors.

`d2t[i]` is the target's id of the head's token i, minus i; `t2d` says the same as a mask, and is not needed. Matrices
may also be stored as int8 with one scale per row (`NAME.weight` int8, `NAME.weight_scale` float32), as in the heads
that come with Pilotfish. torch is imported only to read weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pilotfish.checkpoints.huggingface import read_json
from pilotfish.checkpoints.safetensors_header import check_file
from pilotfish.checkpoints.values import Values, is_id
from pilotfish.engine.models import llama
from pilotfish.engine.models.config import Eagle3Config, ModelConfig
from pilotfish.engine.models.plausible import check_config, readable
from pilotfish.engine.models.tensors import attention, gated_mlp, linear, norm
from pilotfish.engine.weights.quantization import SCALE, dequantized, scheme_of
from pilotfish.engine.weights.tensors import Tensor, by_name, check_names, check_shape
from pilotfish.errors import ConfigError, ModelError

if TYPE_CHECKING:
    import torch

SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"
EMBEDDING, HEAD, FUSION = "embed_tokens.weight", "lm_head.weight", "fc.weight"
TARGET_IDS = "target_ids"

_UNUSED = ("t2d", "verifier_norm.weight", "verifier_lm_head.weight", "rotary_emb.inv_freq")
"""Tensors that are only needed for training, or follow from the others."""


def read_config(folder: Path) -> Eagle3Config:
    """The head's shape. Raises ModelError for a head that the engine does not know."""
    path = folder / "config.json"
    raw = read_json(path)
    values = Values(path, raw)
    layer = values.within("transformer_layer_config").raw or raw
    if raw.get("norm_before_fc"):
        raise ModelError(f"{path}: norm_before_fc is set, but the engine knows EAGLE-3 heads without it")
    if (layers := layer.get("num_hidden_layers", 1)) != 1:
        raise ModelError(f"{path}: num_hidden_layers is {layers}, but the engine knows EAGLE-3 heads with 1")
    shape = {"model_type": "llama", **layer, "num_hidden_layers": 1}
    with readable(path):
        decoder = check_config(path, llama.read_hf(Values(path, shape)))
    extra, name = values.within("eagle_config").raw, "eagle_aux_hidden_state_layer_ids"
    ids = raw.get(name) or extra.get(name) or ()
    if ids and not (isinstance(ids, list) and len(ids) == 3 and all(map(is_id, ids))):
        raise ModelError(f"{path}: {name} is {ids!r:.200}, but must name three layers")
    return Eagle3Config(
        decoder=decoder,
        draft_vocab_size=values.size("draft_vocab_size", decoder.vocab_size),
        target_hidden_size=values.size("target_hidden_size", decoder.hidden_size),
        feature_layers=tuple(ids),
        norm_before_residual=bool(raw.get("norm_before_residual", False)),
    )


def tensors_of(config: Eagle3Config) -> dict[str, Tensor]:
    """Every tensor by its name, as `read_weights` returns it; head and embedding may be the target's."""
    return by_name(_tensors(config))


def _tensors(config: Eagle3Config) -> Iterator[Tensor]:
    decoder, hidden = config.decoder, config.decoder.hidden_size
    yield from linear("fc", "", (hidden, 3 * config.target_hidden_size))
    yield norm("layer.input_layernorm", "", hidden)
    yield norm("layer.hidden_norm", "", hidden)
    yield from attention(decoder, "layer.self_attn.", "", inputs=2 * hidden)
    yield norm("layer.post_attention_layernorm", "", hidden)
    yield from gated_mlp(decoder, "layer.mlp.", "")
    yield norm("norm", "", hidden)
    yield from linear("lm_head", "", (config.draft_vocab_size, hidden))
    yield from linear("embed_tokens", "", (decoder.vocab_size, hidden))


def check_target(name: str, head: Eagle3Config, target: ModelConfig) -> None:
    """Raise ConfigError unless the head, a drafter called `name`, reads hidden states that the target has."""
    if head.target_hidden_size != target.hidden_size:
        raise ConfigError(
            f"drafter {name!r} reads hidden states of size {head.target_hidden_size}, the target's are "
            f"{target.hidden_size}: it was made for another target"
        )
    layers = head.features_of(target)
    if min(layers) < 0 or max(layers) > target.num_layers:
        raise ConfigError(
            f"drafter {name!r} reads layers {layers}, the target has {target.num_layers}: it was made for another "
            "target"
        )


def optional(config: Eagle3Config) -> set[str]:
    """The names of tensors that a head may take from its target instead."""
    return {EMBEDDING, HEAD} if config.draft_vocab_size == config.decoder.vocab_size else {EMBEDDING}


def declared_name(stored: str) -> str:
    """The declared name of a stored tensor, which is the same in both layouts."""
    name = stored.removeprefix("model.")
    for prefix in ("midlayer.", "layers.0."):
        if name.startswith(prefix):
            return "layer." + name.removeprefix(prefix)
    return name


def read_weights(folder: Path, config: Eagle3Config, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The head's tensors, on the CPU, in `dtype`; and TARGET_IDS, (draft_vocab_size,) int64, unless the head has the
    target's vocabulary as it is. Quantized matrices stay as they are if they can be computed with in `dtype`, each with
    its scales, (rows, 1) float32 (see `weights.quantization`).

    Raises ModelError if one is missing, unknown, or has another shape than the configuration gives it.
    """
    loaded = {declared_name(name): tensor for name, tensor in _load(folder).items()}
    stored = {name: tensor for name, tensor in loaded.items() if not name.endswith(_UNUSED)}
    offsets = stored.pop("d2t", None)
    scales = {name: stored.pop(name) for name in list(stored) if name.endswith(f".weight{SCALE}")}
    declared, shared = tensors_of(config), optional(config)
    check_names(folder, stored.keys(), [name for name in declared if name not in shared or name in stored])
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in stored.items():
        check_shape(folder, name, tuple(tensor.shape), declared[name].shape)
        scheme = scheme_of(tensor.dtype)
        if scheme is None:
            weights[name] = tensor.to(dtype)
            continue
        if name + SCALE not in scales:
            raise ModelError(f"{folder}: tensor {name!r} is {scheme.name}, but has no {name}{SCALE}")
        pair = {name: tensor, name + SCALE: scales[name + SCALE].float().view(-1, 1)}
        computes = str(dtype).removeprefix("torch.") in scheme.dtypes
        weights |= pair if computes else dict(dequantized(pair.items(), dtype))
    if offsets is not None:
        weights[TARGET_IDS] = _target_ids(folder, config, offsets)
    elif config.draft_vocab_size != config.decoder.vocab_size:
        raise ModelError(f"{folder} has no tensor 'd2t', but its vocabulary is not the target's")
    return weights


def _target_ids(folder: Path, config: Eagle3Config, offsets: torch.Tensor) -> torch.Tensor:
    import torch

    if offsets.is_floating_point() or offsets.shape != (config.draft_vocab_size,):
        raise ModelError(
            f"{folder}: tensor 'd2t' is {offsets.dtype} of shape {tuple(offsets.shape)}, but must have an "
            f"integer for each of draft_vocab_size, {config.draft_vocab_size}"
        )
    ids = torch.arange(config.draft_vocab_size) + offsets.long()
    if int(ids.min()) < 0 or int(ids.max()) >= config.decoder.vocab_size:
        raise ModelError(
            f"{folder}: tensor 'd2t' leads to tokens {int(ids.min())} to {int(ids.max())}, but the vocabulary is "
            f"{config.decoder.vocab_size}"
        )
    return ids


def _load(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from pilotfish.engine.weights import torch_archive

    try:
        if (folder / SAFETENSORS).is_file():
            check_file(folder / SAFETENSORS)
            return load_file(str(folder / SAFETENSORS))
        if (folder / PICKLED).is_file():
            return torch_archive.load(folder / PICKLED)
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise ModelError(f"cannot read the weights in {folder}: {error}") from error
    raise ModelError(f"{folder} has neither {SAFETENSORS} nor {PICKLED}")
