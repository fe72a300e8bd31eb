"""Adapters: the low-rank adapters (LoRA) of a model, loaded beside it and numbered from 1; 0 is the model without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from pilotfish.engine.layers.lora import LoadedAdapters, LowRankChange, LowRankPart
from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.models.layout import Layout
from pilotfish.engine.models.registry import family_of, tensors_of
from pilotfish.engine.models.rope import rotated_first
from pilotfish.engine.weights.lora import LowRank, read_adapter
from pilotfish.engine.weights.tensors import Tensor

NAMES = {"qkv_proj": "qkv", "o_proj": "output", "gate_up_proj": "gate_up", "down_proj": "down"}
"""Names of linears (see `engine.layers.decoder.Adapter`) by the last component of their paths."""


class Adapters:
    """Loads adapters into `loaded`; each rank has its part of each adapter, as of the model."""

    def __init__(
        self,
        config: ModelConfig,
        layout: Layout,
        loaded: LoadedAdapters,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._config, self._layout, self._loaded = config, layout, loaded
        self._dtype, self._device = dtype, device
        self._last = 0

    @torch.inference_mode()
    def load(self, folder: Path) -> int:
        """Load the adapter in a PEFT folder and return its number. Raises ModelError."""
        found = read_adapter(folder, tensors_of(self._config), family_of(self._config.architecture).declared_name)
        number = self._last + 1
        self._loaded.put(number, self._by_layer(found))
        self._last = number
        return number

    def drop(self, number: int) -> None:
        """Free an adapter that no sequence has any more."""
        self._loaded.drop(number)

    def _by_layer(self, found: Mapping[str, LowRank]) -> list[dict[str, LowRankChange]]:
        """Each layer's changes by the names of its linears."""
        fused: dict[str, list[Tensor]] = {}
        for tensor in self._layout.tensors().values():
            if tensor.linear is not None and tensor.kind == "weight":
                fused.setdefault(tensor.linear, []).append(tensor)
        layers: list[dict[str, LowRankChange]] = [{} for _ in self._loaded.layers]
        for path, parts in fused.items():
            if any(part.name in found for part in parts):
                index, _, within = path.removeprefix("model.layers.").partition(".")
                before, _, last = within.rpartition(".")
                name = ("shared_" if before.endswith("shared_expert") else "") + NAMES[last]
                layers[int(index)][name] = self._change(parts, found)
        return layers

    def _change(self, parts: Sequence[Tensor], found: Mapping[str, LowRank]) -> LowRankChange:
        """The change of a fused matrix, of which each part has its own."""
        ranges = self._layout.parts()
        columns = ranges[parts[0].name][1]
        changes, row = [], 0
        for part in parts:
            rows = ranges[part.name][0]
            low = found.get(part.name)
            if low is not None:
                b = low.b[rows]
                if part.turned is not None:
                    head_dim, rotated = part.turned
                    b = b.view(-1, head_dim, b.shape[1])[:, rotated_first(head_dim, rotated)].flatten(0, 1)
                a, b = (each.to(self._device, self._dtype).contiguous() for each in (low.a[:, columns], b))
                changes.append(LowRankPart(row, a, b))
            row += rows.stop - rows.start
        return LowRankChange(row, changes)
