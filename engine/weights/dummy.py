"""Random weights of a model's shapes, for benchmarks: what a model costs does not depend on what it says."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from engine.models.config import ModelConfig
from engine.weights.names import expected_shapes

SEED = 0


def iter_weights(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """See `engine.weights.iter_weights`; made on `device`. The same shapes give the same weights on such a device.

    Matrices keep the size of what they multiply, norms multiply by about 1, so that numbers stay finite in every dtype.
    """
    generator = torch.Generator(device).manual_seed(SEED)
    for name, shape in expected_shapes(config).items():
        tensor = torch.empty(shape, dtype=dtype, device=device)
        if name.endswith("norm.weight"):
            tensor.fill_(0.0 if config.architecture == "gemma3" else 1.0)  # Gemma's norms add 1
        elif name.endswith(".bias"):
            tensor.zero_()
        else:
            tensor.normal_(std=shape[1] ** -0.5, generator=generator)
        yield name, tensor
