"""Adapters: the low-rank adapters (LoRA) of a model, loaded beside it and numbered from 1; 0 is the model without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pilotfish.engine.kernels.protocol import Kernels
from pilotfish.engine.layers.lora import LayerAdapters, PreparedLowRank
from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.models.layout import Layout
from pilotfish.engine.models.registry import family_of, tensors_of
from pilotfish.engine.models.rope import rotated_first
from pilotfish.engine.weights.lora import LowRank, read_adapter
from pilotfish.engine.weights.tensors import Tensor

NAMES = {"qkv_proj": "qkv", "o_proj": "output", "gate_up_proj": "gate_up", "down_proj": "down"}
"""Names of linears (see `engine.layers.decoder.Adapter`) by the last component of their paths."""


class Adapters:
    """`layers` are the slots of the model's layers; each rank has its part of each adapter, as of the model."""

    def __init__(
        self,
        config: ModelConfig,
        layout: Layout,
        kernels: Kernels[Any],
        layers: Sequence[LayerAdapters],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._config, self._layout, self._kernels = config, layout, kernels
        self._layers, self._dtype, self._device = layers, dtype, device
        self._last = 0

    @torch.inference_mode()
    def load(self, folder: Path) -> int:
        """Load the adapter in a PEFT folder and return its number. Raises ModelError."""
        found = read_adapter(folder, tensors_of(self._config), family_of(self._config.architecture).declared_name)
        number = self._last + 1
        for layer, changes in zip(self._layers, self._by_layer(found), strict=True):
            layer.put(number, changes)
        self._last = number
        return number

    def drop(self, number: int) -> None:
        """Free an adapter that no sequence has any more."""
        for layer in self._layers:
            layer.drop(number)

    def _by_layer(self, found: Mapping[str, LowRank]) -> list[dict[str, PreparedLowRank]]:
        """Each layer's changes by the names of its linears, prepared."""
        fused: dict[str, list[Tensor]] = {}
        for tensor in self._layout.tensors().values():
            if tensor.linear is not None and tensor.kind == "weight":
                fused.setdefault(tensor.linear, []).append(tensor)
        layers: list[dict[str, PreparedLowRank]] = [{} for _ in self._layers]
        for path, parts in fused.items():
            if any(part.name in found for part in parts):
                index, _, within = path.removeprefix("model.layers.").partition(".")
                before, _, last = within.rpartition(".")
                name = ("shared_" if before.endswith("shared_expert") else "") + NAMES[last]
                layers[int(index)][name] = self._prepared(parts, found)
        return layers

    def _prepared(self, parts: Sequence[Tensor], found: Mapping[str, LowRank]) -> PreparedLowRank:
        """The change of a fused matrix: the parts' `a` one below the other, their `b` along the diagonal."""
        ranges = self._layout.parts()
        lowest = [found.get(part.name) for part in parts]
        rank = sum(len(low.a) for low in lowest if low is not None)
        heights = [ranges[part.name][0].stop - ranges[part.name][0].start for part in parts]
        columns = ranges[parts[0].name][1]
        a = torch.zeros(rank, columns.stop - columns.start)
        b = torch.zeros(sum(heights), rank)
        row = column = 0
        for part, low, height in zip(parts, lowest, heights, strict=True):
            if low is not None:
                own = low.b[ranges[part.name][0]]
                if part.turned is not None:
                    head_dim, rotated = part.turned
                    own = own.view(-1, head_dim, own.shape[1])[:, rotated_first(head_dim, rotated)].flatten(0, 1)
                a[column : column + len(low.a)] = low.a[:, columns]
                b[row : row + height, column : column + len(low.a)] = own
                column += len(low.a)
            row += height
        a, b = (each.to(self._device, self._dtype) for each in (a, b))
        return PreparedLowRank(self._kernels.prepare_linear(a), self._kernels.prepare_linear(b))
