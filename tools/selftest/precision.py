"""Errors in units of a dtype's own precision."""

from __future__ import annotations

import math

import torch

from pilotfish.tools.selftest.check import Finding


class Worst:
    """The largest of several errors, and its position."""

    def __init__(self) -> None:
        self.error, self.where = 0.0, ""

    def add(self, error: float, where: str) -> None:
        larger = not error <= self.error and not math.isnan(self.error)  # NaN is larger than everything
        if larger or not self.where:
            self.error, self.where = error, where

    def finding(self, bound: float) -> Finding:
        return Finding(measured=self.error, bound=bound, detail=f"largest at {self.where}" if self.error else "")


def units(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> float:
    """Return the largest error in units in the last place of `dtype`: of the number itself, or of its row's root mean
    square if that is larger, since small sums of large numbers are no more exact than that. NaN if there is one.

    wanted: float64 on the CPU; found: the same shape, any dtype and device.
    """
    if found.shape != wanted.shape:
        raise ValueError(f"the result has shape {tuple(found.shape)}, not {tuple(wanted.shape)}")
    size = torch.maximum(wanted.abs(), wanted.square().mean(-1, keepdim=True).sqrt())
    size.clamp_(min=torch.finfo(torch.float32).tiny)
    errors = (found.cpu().double() - wanted).abs() / size
    return float(errors.max()) / torch.finfo(dtype).eps
