"""gpt-oss's folders: a layer's experts in one tensor, gate and up row by row, as MXFP4 blocks or as plain numbers.

Blocks are (experts, rows, columns / 32, 16) uint8, two numbers of four bits a byte (E2M1, the lower first), with an
exponent for each block, (experts, rows, columns / 32) uint8 (E8M0): OCP Microscaling Formats, version 1.0. They are
dequantized. Plain numbers are transposed: (experts, columns, rows).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pilotfish.checkpoints.safetensors_header import check_file
from pilotfish.engine.weights import safetensors
from pilotfish.engine.weights.tensors import Part, Tensor
from pilotfish.errors import ModelError

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The numbers of four bits without a sign, which is the highest bit."""
BLOCK = 32


def read_folder(
    folder: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype, parts: Mapping[str, Part], device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    """See `Family.read_folder`: all tensors but those of experts, then these."""
    plain = {name: tensor for name, tensor in tensors.items() if tensor.expert is None}
    yield from safetensors.iter_weights(
        folder,
        plain,
        dtype,
        {name: part for name, part in parts.items() if name in plain},
        device,
        name_of=lambda stored: None if ".mlp.experts." in stored else stored,
    )
    with ExitStack() as stack:
        stored = _Stored.open(folder, stack)
        for name, part in parts.items():
            expert = tensors[name].expert
            if expert is not None:
                yield name, _read(stored, name, expert, tensors[name], part).to(device, dtype)


@dataclass(frozen=True, slots=True)
class _Stored:
    folder: Path
    files: Mapping[str, Any]
    """The open file of each tensor."""

    @staticmethod
    def open(folder: Path, stack: ExitStack) -> _Stored:
        files: dict[str, Any] = {}
        for path in safetensors.shards(folder):
            check_file(path)
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise ModelError(f"cannot read {path}: {error}") from error
            files |= dict.fromkeys(file.keys(), file)
        return _Stored(folder, files)

    def of(self, name: str, expert: int, shape: tuple[int, ...]) -> torch.Tensor:
        """An expert's part of a stored tensor, of this shape. Raises ModelError."""
        if name not in self.files:
            raise ModelError(f"{self.folder} lacks tensor {name!r}")
        part = self.files[name].get_slice(name)
        if (found := tuple(part.get_shape()))[1:] != shape or expert >= found[0]:
            raise ModelError(
                f"{self.folder}: tensor {name!r} has shape {found}, but the configuration makes it (experts, "
                f"{', '.join(map(str, shape))})"
            )
        tensor: torch.Tensor = part[expert]
        return tensor


def _read(stored: _Stored, name: str, expert: int, tensor: Tensor, part: Part) -> torch.Tensor:
    """A part of an expert's matrix or bias, in float32."""
    prefix, _, rest = name.partition(".experts.")
    which, kind = rest.split(".")[1:]
    gated = which != "down_proj"
    whole = f"{prefix}.experts.{'gate_up_proj' if gated else which}"
    rows = tensor.shape[0] * (2 if gated else 1)
    if kind == "bias":
        values = stored.of(f"{whole}_bias", expert, (rows,)).float()
    elif f"{whole}_blocks" in stored.files:
        blocks = tensor.shape[1] // BLOCK
        packed = stored.of(f"{whole}_blocks", expert, (rows, blocks, BLOCK // 2))
        values = dequantized(packed, stored.of(f"{whole}_scales", expert, (rows, blocks)))
    else:
        values = stored.of(whole, expert, (tensor.shape[1], rows)).T.float()
    if gated:
        values = values[(which == "up_proj") :: 2]
    return values[part].contiguous()


def dequantized(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """MXFP4 (rows, blocks, 16) uint8 and (rows, blocks) uint8 -> (rows, 32 * blocks) float32."""
    numbers = torch.tensor([*E2M1, *(-number for number in E2M1)])
    pairs = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(2)
    exponents = torch.exp2(scales.float() - 127.0)
    return (numbers[pairs.int()] * exponents.unsqueeze(2)).flatten(1)
