"""Files of heads that draft for a target: tensors in model.safetensors or pytorch_model.bin, plain or quantized, and
the vocabulary of a head that has its own. torch is imported only to read them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pilotfish.checkpoints.safetensors_header import check_file
from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.weights.quantization import SCALE, dequantized, scheme_of
from pilotfish.engine.weights.tensors import Tensor, check_names, check_shape
from pilotfish.errors import ConfigError, ModelError

if TYPE_CHECKING:
    import torch

SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"
EMBEDDING, HEAD, FUSION = "embed_tokens.weight", "lm_head.weight", "fc.weight"
TARGET_IDS = "target_ids"
"""The name of the target's id of each of a head's tokens, (draft_vocab_size,) int64."""

_UNUSED = ("t2d", "verifier_norm.weight", "verifier_lm_head.weight", "rotary_emb.inv_freq")
"""Tensors that are only needed for training, or follow from the others."""


def check_features(name: str, hidden_size: int, layers: Collection[int], target: ModelConfig) -> None:
    """Raise ConfigError unless the target has the hidden states that a drafter called `name` reads: of this size, as
    they enter these layers."""
    if hidden_size != target.hidden_size:
        raise ConfigError(
            f"drafter {name!r} reads hidden states of size {hidden_size}, the target's are {target.hidden_size}: it "
            "was made for another target"
        )
    if min(layers) < 0 or max(layers) > target.num_layers:
        raise ConfigError(
            f"drafter {name!r} reads layers {tuple(layers)}, the target has {target.num_layers}: it was made for "
            "another target"
        )


def shared_tensors(draft_vocab_size: int, vocab_size: int) -> set[str]:
    """The names of tensors that a head with this vocabulary may take from its target instead."""
    return {EMBEDDING, HEAD} if draft_vocab_size == vocab_size else {EMBEDDING}


def read_weights(
    folder: Path,
    declared: Mapping[str, Tensor],
    may_lack: Collection[str],
    declared_name: Callable[[str], str],
    dtype: torch.dtype,
    draft_vocab_size: int,
    vocab_size: int,
    looked_up: Collection[str] = (EMBEDDING,),
) -> dict[str, torch.Tensor]:
    """The head's tensors by their declared names, on the CPU, in `dtype`; and TARGET_IDS, unless the head has the
    target's vocabulary as it is. Quantized matrices stay as they are if they can be computed with in `dtype`, each with
    its scales, (rows, 1) float32 (see `weights.quantization`); those whose rows are looked up cannot.

    Raises ModelError if one that it may not lack is missing, or one is unknown, or has another shape than declared.
    """
    loaded = {declared_name(name): tensor for name, tensor in _load(folder).items()}
    stored = {name: tensor for name, tensor in loaded.items() if not name.endswith(_UNUSED)}
    offsets = stored.pop("d2t", None)
    scales = {name: stored.pop(name) for name in list(stored) if name.endswith(f".weight{SCALE}")}
    check_names(folder, stored.keys(), [name for name in declared if name not in may_lack or name in stored])
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
        computes = str(dtype).removeprefix("torch.") in scheme.dtypes and name not in looked_up
        weights |= pair if computes else dict(dequantized(pair.items(), dtype))
    if offsets is not None:
        weights[TARGET_IDS] = _target_ids(folder, draft_vocab_size, vocab_size, offsets)
    elif draft_vocab_size != vocab_size:
        raise ModelError(f"{folder} has no tensor 'd2t', but its vocabulary is not the target's")
    return weights


def _target_ids(folder: Path, draft_vocab_size: int, vocab_size: int, offsets: torch.Tensor) -> torch.Tensor:
    import torch

    if offsets.is_floating_point() or offsets.shape != (draft_vocab_size,):
        raise ModelError(
            f"{folder}: tensor 'd2t' is {offsets.dtype} of shape {tuple(offsets.shape)}, but must have an "
            f"integer for each of draft_vocab_size, {draft_vocab_size}"
        )
    ids = torch.arange(draft_vocab_size) + offsets.long()
    if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        raise ModelError(
            f"{folder}: tensor 'd2t' leads to tokens {int(ids.min())} to {int(ids.max())}, but the vocabulary is "
            f"{vocab_size}"
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
