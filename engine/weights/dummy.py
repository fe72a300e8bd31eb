"""Random weights of a model's shapes, for benchmarks: what a model costs does not depend on what it says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from zlib import crc32

import torch

from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.weights.names import Part, expected_shapes, whole


def iter_weights(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, parts: Mapping[str, Part] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """See `engine.weights.iter_weights`; made on `device`. The same shapes give the same weights on such a device.

    A tensor follows from its name and shape, and is made whole before a part of it is taken: the ranks of a divided
    model have the very weights of the model that is not divided. Matrices keep the size of what they multiply, norms
    multiply by about 1, so that numbers stay finite in every dtype.
    """
    generator = torch.Generator(device)
    shapes = expected_shapes(config)
    for name, part in ({name: whole(shape) for name, shape in shapes.items()} if parts is None else parts).items():
        shape = shapes[name]
        tensor = torch.empty(shape, dtype=dtype, device=device)
        if name.endswith("norm.weight"):
            tensor.fill_(0.0 if config.architecture == "gemma3" else 1.0)  # Gemma's norms add 1
        elif name.endswith(".bias"):
            tensor.zero_()
        else:
            tensor.normal_(std=shape[1] ** -0.5, generator=generator.manual_seed(crc32(name.encode())))
        yield name, tensor if part == whole(shape) else tensor[part].clone()
