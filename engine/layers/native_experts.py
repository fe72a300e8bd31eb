"""All experts of a layer in one call of the native kernels (experts.h)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence as Seq
from ctypes import c_int64, c_void_p

import torch

from pilotfish.engine.kernels.native import ACTIVATION_FLOATS, GROUP, NativeBlocks, NativeKernels, NativeLinear
from pilotfish.engine.kernels.protocol import PreparedLinear
from pilotfish.engine.layers.fused_decoder import Weight, weight_of

_Pair = tuple[NativeLinear | NativeBlocks, NativeLinear | NativeBlocks]


class _Expert(ctypes.Structure):
    """`struct expert` of experts.h; the structure below has the name of its own there, too."""

    _fields_ = (("gate_up", Weight), ("down", Weight))


class _Experts(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("experts", "x", "probs", "chosen", "out", "space", "places", "activations")),
        *((name, c_int64) for name in ("count", "rows", "each", "size", "inner")),
    )


class NativeExperts:
    """The matrices of a layer's experts, gate and up fused and down, as the kernel reads them; None: it is on another
    rank. The caller keeps the matrices."""

    def __init__(self, experts: Seq[_Pair | None]) -> None:
        self._structs = (_Expert * len(experts))(
            *(_Expert() if each is None else _Expert(*map(weight_of, each)) for each in experts)
        )
        self._inner = next(down.in_features for _, down in filter(None, experts))

    @staticmethod
    def of(experts: Seq[tuple[PreparedLinear, PreparedLinear] | None]) -> NativeExperts | None:
        """Return None for experts that the kernel does not know: of other kernels, or none on this rank."""
        here: list[_Pair | None] = []
        for each in experts:
            if each is None:
                here.append(None)
            elif isinstance(each[0], NativeLinear | NativeBlocks) and isinstance(each[1], NativeLinear | NativeBlocks):
                here.append((each[0], each[1]))
            else:
                return None
        return NativeExperts(here) if any(here) else None

    def forward(
        self, kernels: NativeKernels, x: torch.Tensor, probs: torch.Tensor, chosen: torch.Tensor
    ) -> torch.Tensor:
        """The sum over each row's experts that are on this rank, (rows, hidden_size).

        x: (rows, hidden_size); probs: float32, and chosen: int64, (rows, experts of a row) each.
        """
        x, probs, chosen = x.contiguous(), probs.contiguous(), chosen.contiguous()
        (rows, size), each, count = x.shape, probs.shape[1], len(self._structs)
        out = torch.empty_like(x)
        space = torch.empty(rows * each, 2 * size + 3 * self._inner)
        # An expert has each row once at most.
        activations = torch.empty(rows, ACTIVATION_FLOATS * (max(size, self._inner) // GROUP))
        places = torch.empty(count + 1 + rows * each, dtype=torch.int64)
        kernels.experts(
            _Experts(
                experts=ctypes.addressof(self._structs),
                x=x.data_ptr(),
                probs=probs.data_ptr(),
                chosen=chosen.data_ptr(),
                out=out.data_ptr(),
                space=space.data_ptr(),
                places=places.data_ptr(),
                count=count,
                rows=rows,
                each=each,
                size=size,
                inner=self._inner,
                activations=activations.data_ptr(),
            )
        )
        return out
