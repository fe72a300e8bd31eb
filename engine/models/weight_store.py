"""WeightStore: gathers a model's tensors as they are read, and lays out each matrix as soon as its parts are there."""

from __future__ import annotations

from typing import Any

import torch

from engine.errors import ModelError
from engine.kernels.interface import Kernels, PreparedLinear
from engine.models.config import ModelConfig

_FUSED = {
    "self_attn.q_proj": ("self_attn.qkv_proj", 0, 3),
    "self_attn.k_proj": ("self_attn.qkv_proj", 1, 3),
    "self_attn.v_proj": ("self_attn.qkv_proj", 2, 3),
    "mlp.gate_proj": ("mlp.gate_up_proj", 0, 2),
    "mlp.up_proj": ("mlp.gate_up_proj", 1, 2),
}


class WeightStore:
    """Collects named tensors, fuses and lays out the matrices. Names are Hugging Face's, less the last part."""

    def __init__(self, config: ModelConfig, kernels: Kernels[Any], device: torch.device) -> None:
        self._kernels, self._device = kernels, device
        self._tensors: dict[str, torch.Tensor] = {}  # norms and biases
        self._parts: dict[str, dict[int, torch.Tensor]] = {}
        self._linears: dict[str, PreparedLinear] = {}
        self._biased = {
            "self_attn.qkv_proj": config.qkv_bias,
            "self_attn.o_proj": config.output_bias,
            "mlp.gate_up_proj": config.mlp_bias,
            "mlp.down_proj": config.mlp_bias,
        }

    def add(self, name: str, tensor: torch.Tensor) -> None:
        tensor = tensor.to(self._device)
        module, _, kind = name.rpartition(".")
        if kind == "weight" and tensor.ndim == 1:
            self._tensors[name] = tensor
            return
        path, index, count = _fused_place(module)
        parts = self._parts.setdefault(f"{path}.{kind}", {})
        parts[index] = tensor
        biased = next((wanted for end, wanted in self._biased.items() if path.endswith(end)), False)
        kinds = ["weight", "bias"] if biased else ["weight"]
        if any(part.dtype == torch.float8_e4m3fn for part in self._parts.get(f"{path}.weight", {}).values()):
            kinds.append("weight_scale")
        if all(len(self._parts.get(f"{path}.{k}", ())) == count for k in kinds):
            fused = {k: _joined(self._parts.pop(f"{path}.{k}")) for k in kinds}
            try:
                prepared = self._kernels.prepare_linear(fused["weight"], fused.get("bias"), fused.get("weight_scale"))
            except ValueError as error:
                raise ModelError(f"the model's {path!r} cannot be computed with: {error}") from error
            self._linears[path] = prepared

    def tensor(self, name: str) -> torch.Tensor:
        if name not in self._tensors:
            raise ModelError(f"the model's files have no tensor {name!r}")
        return self._tensors.pop(name)

    def linear(self, path: str) -> PreparedLinear:
        if path not in self._linears:
            there = sorted(name for name in self._parts if name.startswith(path + "."))
            raise ModelError(
                f"the model's files lack tensors of {path!r}" + (f"; only parts of {there} are there" if there else "")
            )
        return self._linears.pop(path)


def _fused_place(module: str) -> tuple[str, int, int]:
    """Where a matrix lies: (path of the fused one, its index in it, how many there are)."""
    for end, (fused, index, count) in _FUSED.items():
        if module.endswith(end):
            return module.removesuffix(end) + fused, index, count
    return module, 0, 1


def _joined(parts: dict[int, torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([parts[i] for i in range(len(parts))])
