"""Low-rank adapters (LoRA, arXiv 2106.09685) in PEFT's folders: adapter_config.json and adapter_model.safetensors.

An adapter changes a linear by scale * b @ a. Ranks, scales and targets may differ from matrix to matrix.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from pilotfish.checkpoints.huggingface import read_json
from pilotfish.checkpoints.patterns import module_pattern
from pilotfish.checkpoints.safetensors_header import check_file
from pilotfish.checkpoints.values import Values
from pilotfish.engine.weights.tensors import Tensor, rows_of
from pilotfish.errors import ModelError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MOST_PATTERNS = 64
LONGEST_NAME = 512
_PREFIX = "base_model.model."
_ABSENT: Mapping[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "target_parameters": (None, []),
    "fan_in_fan_out": (False, None),
    "trainable_token_indices": (None, []),
}
"""Fields of adapter_config.json with the values of an adapter that is low-rank matrices and nothing else."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """The change of one matrix, b @ a."""

    a: torch.Tensor  # (rank, in_features)
    b: torch.Tensor  # (out_features, rank), times the scale


def read_adapter(
    folder: Path, tensors: Mapping[str, Tensor], declared_name: Callable[[str], str | None]
) -> dict[str, LowRank]:
    """The changes of declared matrices by their names, in float32. `tensors` are the model's, `declared_name` is its
    family's. Raises ModelError for a folder that cannot be read, and for an adapter that changes what is no matrix of a
    layer of this model."""
    path = folder / CONFIG
    if not path.is_file():
        raise ModelError(f"{folder} has no {CONFIG}: an adapter is a folder that PEFT has written")
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{path}: peft_type is {config.get('peft_type')!r}, but the engine knows 'LORA'")
    for name, known in _ABSENT.items():
        if (value := config.get(name)) not in known:
            raise ModelError(f"{path}: {name} is {value!r:.200}, but the engine knows adapters with {known[0]!r} only")
    check_file(folder / WEIGHTS)
    try:
        stored = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot read {folder / WEIGHTS}: {error}") from error
    scales = _Scales.of(Values(path, config))
    found: dict[str, LowRank] = {}
    parted = rows_of(tensors.values(), lambda tensor: tensor.stored)
    for module in _modules(stored, folder):
        a, b = (stored[f"{_PREFIX}{module}.lora_{letter}.weight"].float() for letter in "AB")
        if a.dim() != 2 or b.dim() != 2 or not len(a):
            raise ModelError(f"{folder}: the adapter's matrices for {module!r} are no matrices, or empty")
        b = b * scales.scale(module, len(a))
        parts = _parts(declared_name(f"{module}.weight"), tensors, parted)
        if not parts or not all(part.quantizable and part.expert is None for part, _ in parts):
            raise ModelError(f"{folder}: the adapter changes {module!r}, but the engine adapts layers' dense matrices")
        wanted = (parts[-1][1].stop, parts[0][0].shape[1])
        if (len(b), a.shape[1]) != wanted or b.shape[1] != len(a):
            shapes = f"{tuple(b.shape)} and {tuple(a.shape)}"
            raise ModelError(f"{folder}: the adapter's matrices for {module!r} are {shapes}, but the model's {wanted}")
        for part, rows in parts:
            found[part.name] = LowRank(a, b[rows])
    return found


def _parts(
    name: str | None, tensors: Mapping[str, Tensor], parted: Mapping[str, Sequence[tuple[Tensor, slice]]]
) -> Sequence[tuple[Tensor, slice]]:
    """The declared matrices that a stored one of this name holds, with their rows; none if there is no such matrix."""
    if name is not None and name in tensors:
        return [(tensors[name], slice(0, tensors[name].shape[0]))]
    return parted.get(name, ()) if name is not None else ()


def _modules(stored: Iterable[str], folder: Path) -> list[str]:
    """The modules that the adapter changes. Raises ModelError for tensors that are something else."""
    names = set(stored)
    if long := [name for name in names if len(name) > LONGEST_NAME]:
        raise ModelError(f"{folder}: the adapter has a tensor with a name of {len(long[0])} characters")
    modules = {match[1] for name in names if (match := re.fullmatch(rf"{_PREFIX}(.+)\.lora_A\.weight", name))}
    others = names - {f"{_PREFIX}{module}.lora_{letter}.weight" for module in modules for letter in "AB"}
    if others or len(names) != 2 * len(modules):
        what = ", ".join(map(repr, sorted(others)[:3])) or "an A without its B"
        raise ModelError(f"{folder}: the adapter has {what}, but the engine knows pairs of lora_A and lora_B")
    return sorted(modules)


@dataclass(frozen=True, slots=True)
class _Scales:
    """What adapter_config.json says of ranks and scales."""

    alpha: float
    rank: float
    alphas: Mapping[str, float]
    ranks: Mapping[str, float]
    stabilized: bool

    @staticmethod
    def of(values: Values) -> _Scales:
        alphas, ranks = (_patterns(values, name) for name in ("alpha_pattern", "rank_pattern"))
        alpha, rank = values.number("lora_alpha", 8), values.size("r", 8)
        return _Scales(alpha, rank, alphas, ranks, bool(values.get("use_rslora")))

    def scale(self, module: str, rank: int) -> float:
        """alpha / rank, or alpha / sqrt(rank) of a rank-stabilized adapter (arXiv 2312.03732). Raises ModelError unless
        matrices of this rank are the module's."""
        declared = _own(self.ranks, module, self.rank)
        if declared != rank:
            raise ModelError(f"{CONFIG} gives {module!r} the rank {declared:g}, but its matrices have {rank}")
        return _own(self.alphas, module, self.alpha) / (math.sqrt(rank) if self.stabilized else rank)


def _own(patterns: Mapping[str, float], module: str, default: float) -> float:
    """The value of the first pattern that matches the end of the module's name, as PEFT matches it."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _patterns(values: Values, name: str) -> Mapping[str, float]:
    """The numbers that adapter_config.json gives to modules by patterns of their names. Raises ModelError."""
    found = values.within(name)
    if len(found.raw) > MOST_PATTERNS:
        raise values.error(f"{name} has {len(found.raw)} patterns, but may have {MOST_PATTERNS}")
    for pattern in found.raw:
        try:
            module_pattern(pattern)
        except ValueError as error:
            raise values.error(f"{name}: {error}") from error
    return {pattern: found.positive(pattern) for pattern in found.raw}
