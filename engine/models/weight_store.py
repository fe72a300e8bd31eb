"""WeightStore: gathers a model's tensors as they are read, and lays out each matrix as soon as its parts are there."""

from __future__ import annotations

from typing import Any

import torch

from pilotfish.engine.kernels.protocol import Kernels, PreparedLinear
from pilotfish.engine.models.layout import Layout
from pilotfish.errors import ModelError

_FUSED = {
    "self_attn.q_proj": ("self_attn.qkv_proj", 0, 3),
    "self_attn.k_proj": ("self_attn.qkv_proj", 1, 3),
    "self_attn.v_proj": ("self_attn.qkv_proj", 2, 3),
    "mlp.gate_proj": ("mlp.gate_up_proj", 0, 2),
    "mlp.up_proj": ("mlp.gate_up_proj", 1, 2),
}

_VOCABULARIES = ("model.embed_tokens", "lm_head")


class WeightStore:
    """Collects named tensors, fuses and lays out the matrices. Names are Hugging Face's, less the last part.

    The tensors are the parts that `layout` gives to its rank.
    """

    def __init__(self, layout: Layout, kernels: Kernels[Any], device: torch.device) -> None:
        self._kernels, self._device, self._layout = kernels, device, layout
        self._tensors: dict[str, torch.Tensor] = {}  # norms and biases
        self._parts: dict[str, dict[int, torch.Tensor]] = {}
        self._linears: dict[str, PreparedLinear] = {}
        config, first = layout.config, layout.rank == 0
        self._biased = {
            "self_attn.qkv_proj": config.qkv_bias,
            "self_attn.o_proj": config.output_bias and first,  # one rank adds the bias of what is summed over all
            "mlp.gate_up_proj": config.mlp_bias,
            "mlp.down_proj": config.mlp_bias and first,
        }

    def add(self, name: str, tensor: torch.Tensor) -> None:
        tensor = tensor.to(self._device)
        module, _, kind = name.rpartition(".")
        if kind == "weight" and tensor.ndim == 1:
            self._tensors[name] = tensor
            return
        if module in _VOCABULARIES:
            tensor = _padded(tensor, self._layout.vocab_part)
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


def _padded(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """The same with rows of zeros at the end, so that there are `rows`."""
    if len(tensor) == rows:
        return tensor
    padded = tensor.new_zeros(rows, *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    return padded


def _joined(parts: dict[int, torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([parts[i] for i in range(len(parts))])
