"""Low-rank adapters for the native kernels: all adapters of a pass in one call for each linear (low_rank.h).

`FusedDecoder` computes with the same structures, to the same bits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from ctypes import c_int32, c_int64, c_void_p
from typing import Any

import torch

from pilotfish.engine.kernels.native import NativeKernels, NativeLinear
from pilotfish.engine.layers.attention.backend import AttentionBatch
from pilotfish.engine.layers.lora import LowRankChange, LowRankPart


class _Part(ctypes.Structure):
    """`struct low_rank_part` of low_rank.h; the structures below have the names of theirs there, too."""

    _fields_ = (
        *((name, c_void_p) for name in ("a", "b")),
        *((name, c_int64) for name in ("rank", "first", "columns")),
    )


class _Change(ctypes.Structure):
    _fields_ = (("parts", c_void_p), ("count", c_int64))


class _Linear(ctypes.Structure):
    _fields_ = (("changes", c_void_p), ("most", c_int64))


class _Chunk(ctypes.Structure):
    _fields_ = (("slot", c_int32), ("begin", c_int32), ("end", c_int32))


class _Pass(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("rows", "chunks", "scratch")),
        *((name, c_int64) for name in ("count", "scratch_size")),
    )


class LinearAdapters:
    """What all adapters change in one linear, as the kernel reads it, at an address that stays."""

    def __init__(self) -> None:
        self.struct = _Linear()
        self._parts: dict[int, tuple[Any, list[NativeLinear]]] = {}  # by slot: the structures, and whose addresses
        self._changes: Any = None

    def put(self, slot: int, parts: Seq[tuple[int, NativeLinear, NativeLinear]]) -> None:
        """Set the parts of a slot, each with the first output that it changes."""
        structs = (_Part * len(parts))(
            *(
                _Part(a.packed.data_ptr(), b.packed.data_ptr(), a.out_features, first, b.out_features)
                for first, a, b in parts
            )
        )
        self._parts[slot] = structs, [matrix for _, *matrices in parts for matrix in matrices]
        self._bind()

    def drop(self, slot: int) -> None:
        if self._parts.pop(slot, None) is not None:
            self._bind()

    def _bind(self) -> None:
        changes = (_Change * (max(self._parts, default=-1) + 1))()
        for slot, (structs, _) in self._parts.items():
            changes[slot] = _Change(ctypes.addressof(structs), len(structs))
        self._changes = changes
        self.struct.changes = ctypes.addressof(changes)
        self.struct.most = max((len(structs) for structs, _ in self._parts.values()), default=0)


class AdaptedPass:
    """Which rows of a pass have which adapter, as the kernel reads it."""

    def __init__(self, batch: AttentionBatch, slots: Mapping[int, int], tile: int, scratch: torch.Tensor) -> None:
        rows: list[torch.Tensor] = []
        chunks: list[tuple[int, int, int]] = []
        end = 0
        for number, own in batch.adapters:
            found = torch.arange(len(batch.slots)) if own is None else own
            begin, end = end, end + len(found)
            chunks += [(slots[number], i, min(i + tile, end)) for i in range(begin, end, tile)]
            rows.append(found)
        self._rows = torch.cat(rows).to(torch.int32)
        self._chunks = (_Chunk * len(chunks))(*(_Chunk(*chunk) for chunk in chunks))
        self._scratch = scratch  # (threads, floats of each)
        self.struct = _Pass(
            rows=self._rows.data_ptr(),
            chunks=ctypes.addressof(self._chunks),
            scratch=scratch.data_ptr(),
            count=len(chunks),
            scratch_size=scratch.shape[1],
        )


class NativeAdapters:
    """`LoadedAdapters` of the native kernels. Adapters have slots, which are given away again, in every linear."""

    def __init__(self, kernels: NativeKernels, count: int) -> None:
        self._kernels = kernels
        self._slots: dict[int, int] = {}
        self._widest = self._highest = 0
        self._last: tuple[AttentionBatch, AdaptedPass] | None = None
        self.layers = [NativeLayerAdapter(self, kernels) for _ in range(count)]

    def put(self, number: int, changes: Seq[Mapping[str, LowRankChange]]) -> None:
        """See `LoadedAdapters`."""
        self._last = None
        slot = next(i for i in range(len(self._slots) + 1) if i not in self._slots.values())
        self._slots[number] = slot
        for layer, own in zip(self.layers, changes, strict=True):
            for name, change in own.items():
                layer.linear(name).put(slot, [self._prepared(part) for part in change.parts])

    def drop(self, number: int) -> None:
        """See `LoadedAdapters`."""
        slot = self._slots.pop(number, None)
        if slot is not None:
            self._last = None
            for layer in self.layers:
                for linear in layer.linears.values():
                    linear.drop(slot)

    def of_pass(self, batch: AttentionBatch) -> AdaptedPass:
        """Return a batch's rows by adapter. Its last caller's is kept: each linear of a pass asks for the same."""
        if self._last is None or self._last[0] is not batch:
            kernels = self._kernels
            tile = kernels.max_tile
            scratch = torch.empty(kernels.threads, tile * (self._widest + self._highest + kernels.panel))
            self._last = batch, AdaptedPass(batch, self._slots, tile, scratch)
        return self._last[1]

    def _prepared(self, part: LowRankPart) -> tuple[int, NativeLinear, NativeLinear]:
        """Packed, with a rank of whole panels."""
        rank, panel = len(part.a), self._kernels.panel
        missing = -rank % panel
        a = torch.nn.functional.pad(part.a, (0, 0, 0, missing))
        b = torch.nn.functional.pad(part.b, (0, missing))
        self._widest, self._highest = max(self._widest, a.shape[1]), max(self._highest, len(a))
        return part.first, self._kernels.prepare_panels(a), self._kernels.prepare_panels(b)


class NativeLayerAdapter:
    """The `Adapter` of one layer."""

    def __init__(self, adapters: NativeAdapters, kernels: NativeKernels) -> None:
        self.linears: dict[str, LinearAdapters] = {}
        self._adapters, self._kernels = adapters, kernels

    def linear(self, name: str) -> LinearAdapters:
        """Return the changes of a linear: none, if there are none yet."""
        return self.linears.setdefault(name, LinearAdapters())

    def add_(self, name: str, x: torch.Tensor, y: torch.Tensor, batch: AttentionBatch) -> None:
        """See `Adapter.add_`."""
        linear = self.linears.get(name)
        if batch.adapters and linear is not None and linear.struct.most:
            self._kernels.low_rank_(linear.struct, self._adapters.of_pass(batch).struct, x, y)
