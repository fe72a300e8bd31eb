"""Random weights of a model's shapes, for benchmarks: speed does not depend on the weights' values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from zlib import crc32

import torch

from pilotfish.engine.weights.tensors import Part, Tensor, whole


def iter_weights(
    tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device, parts: Mapping[str, Part]
) -> Iterator[tuple[str, torch.Tensor]]:
    """See `engine.models.checkpoint.iter_weights`; made on `device`.

    A tensor depends on its name, shape, dtype and device type alone, and is made whole before a part of it is taken: a
    sharded model has the same weights as a whole one. Matrices keep the magnitude of their input, and norms
    multiply by 1, so that numbers stay finite in every dtype.
    """
    generator = torch.Generator(device)
    for name, part in parts.items():
        declared = tensors[name]
        tensor = torch.empty(declared.shape, dtype=dtype, device=device)
        if declared.linear is None:
            tensor.fill_(1.0 - declared.norm_offset)
        elif declared.kind == "bias":
            tensor.zero_()
        else:
            tensor.normal_(std=declared.shape[1] ** -0.5, generator=generator.manual_seed(crc32(name.encode())))
        yield name, tensor if part == whole(declared.shape) else tensor[part].clone()
