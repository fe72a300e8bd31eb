"""Matrices as int8 with one scale a row: a quarter of float32's bytes, for drafts that are kept in a repository."""

from __future__ import annotations

import torch


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, columns) -> int8 of the same shape, and (rows,) float32 scales: weight is about values * scale."""
    scale = weight.float().abs().amax(1).clamp(min=1e-12) / 127
    return (weight.float() / scale.unsqueeze(1)).round().to(torch.int8), scale
