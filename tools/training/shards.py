"""Shards: a folder of numbered safetensors files, whose writing can be interrupted."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


@dataclass(frozen=True, slots=True)
class Shards:
    """A folder of 00000.safetensors and so on. A shard appears whole or not at all."""

    folder: Path

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        """Return the number of shards from 0 without a gap."""
        count = 0
        while self._path(count).is_file():
            count += 1
        return count

    def write(self, shard: int, tensors: dict[str, torch.Tensor]) -> None:
        partial = self._path(shard).with_suffix(".partial")
        save_file(tensors, str(partial))
        os.replace(partial, self._path(shard))

    def read(self, shard: int) -> dict[str, torch.Tensor]:
        return load_file(str(self._path(shard)))

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:05}.safetensors"
