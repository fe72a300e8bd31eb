"""The weights of EAGLE-3 drafts on disk, in the two public layouts, read as they are published; the drafts' shapes are
`eagle3_config`'s.

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

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from pilotfish.engine.models.config import Eagle3Config
from pilotfish.engine.weights.eagle3_config import PICKLED, SAFETENSORS, expected_shapes, plain_name, read_config
from pilotfish.engine.weights.names import check_names, check_shape
from pilotfish.errors import ModelError

__all__ = ["expected_shapes", "read_config", "read_weights"]

_UNUSED = ("t2d", "verifier_norm.weight", "verifier_lm_head.weight", "rotary_emb.inv_freq")
"""What checkpoints hold for training, or what follows from the rest."""


def read_weights(folder: Path, config: Eagle3Config, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The draft's tensors, on the CPU, the layer's under "layer.", in `dtype`; and `target_ids`, (draft_vocab_size,)
    int64, unless the draft has the target's vocabulary as it is. For float32, int8 matrices stay what they are, each
    with its `NAME.weight_scale`, (rows, 1) float32.

    Raises ModelError if one is missing, unknown, or has another shape than the configuration makes it.
    """
    loaded = {plain_name(name): tensor for name, tensor in _load(folder).items()}
    stored = {name: tensor for name, tensor in loaded.items() if not name.endswith(_UNUSED)}
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
