"""Tensors of GGUF files under Hugging Face's names: dequantized, or matrices in the blocks that they are stored in.

Tensor names are those of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; `checkpoints.gguf_header` finds the
tensors, the gguf package dequantizes them. torch is imported only to make tensors of the values.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind

from pilotfish.checkpoints.gguf_header import StoredTensor, read_header
from pilotfish.engine.weights.blocks import KINDS, PLAIN, Blocks, Storage
from pilotfish.engine.weights.tensors import Part, Tensor, check_names, check_shape, rows_of, shape_of
from pilotfish.errors import ModelError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")

CHUNK = 1 << 18
"""Values that are dequantized at a time: the gguf package's intermediate arrays then stay in the processor's cache."""


def iter_weights(
    path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype, parts: Mapping[str, Part]
) -> Iterator[tuple[str, torch.Tensor]]:
    """See `engine.models.checkpoint.iter_weights`; on the CPU, dequantized in float32, then rounded to `dtype`.

    Only wanted rows are read, and of these only the blocks that hold a wanted column are dequantized.
    """
    for name, tensor in iter_stored(path, tensors, dtype, parts, PLAIN):
        assert not isinstance(tensor, Blocks)
        yield name, tensor


def iter_stored(
    path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype, parts: Mapping[str, Part], storage: Storage
) -> Iterator[tuple[str, torch.Tensor | Blocks]]:
    """As `iter_weights`; matrices that `storage` has stay as they are. A part that begins or ends within a block is
    dequantized."""
    import torch

    names = {tensor.gguf: name for name, tensor in tensors.items() if not tensor.gguf_stored}
    parted = rows_of(tensors.values(), lambda tensor: tensor.gguf_stored)
    found: dict[str, StoredTensor] = {}
    for name, each in read_header(path).tensors.items():
        if name in parted:
            found |= _parted(path, each, parted[name])
        elif not _derived(name):
            found[names.get(name, name)] = each
    check_names(path, found.keys(), tensors.keys())
    for name, tensor in tensors.items():
        if tensor.shape == (1, *found[name].shape):  # converters have stored matrices of one row as vectors
            found[name] = replace(found[name], shape=tensor.shape)
        check_shape(path, found[name].name, found[name].shape, tensor.shape)
    cut: list[StoredTensor] = []
    with path.open("rb") as file:
        for name, part in parts.items():
            tensor, stored = tensors[name], found[name]
            if tensor.linear is not None and len(part) == 2 and _stays(stored.kind, storage):
                if not _cuts_blocks(stored.kind, part[1]):
                    kept = _read_kept(file, stored, part)
                    yield name, _changed(kept, partial(_unpaired, size=tensor.paired_rows))
                    continue
                cut.append(stored)
            values = torch.from_numpy(read_array(path, file, stored, part))
            values = _unpaired(values, tensor.paired_rows)
            if tensor.norm_offset:
                values = values - tensor.norm_offset
            yield name, values.to(dtype)
    if cut:
        logger.warning(
            "%d matrices become %s on this rank, such as %r: its part of them begins or ends within a block of %s",
            *(len(cut), str(dtype).removeprefix("torch."), cut[0].name, cut[0].kind.name),
        )


def _stays(kind: Kind, storage: Storage) -> bool:
    return (storage.blocks and kind in KINDS) or (storage.halves and kind in (Kind.F16, Kind.BF16))


def _cuts_blocks(kind: Kind, columns: slice) -> bool:
    block, _ = GGML_QUANT_SIZES[kind]
    return bool(columns.start % block or columns.stop % block)


def _read_kept(file: BinaryIO, stored: StoredTensor, part: Part) -> torch.Tensor | Blocks:
    """A part of a matrix, which cuts no block, in the form that it is stored in."""
    import torch

    block, size = GGML_QUANT_SIZES[stored.kind]
    rows, columns = part
    raw = _read_rows(file, stored, stored.shape[0], rows)[
        :, columns.start // block * size : columns.stop // block * size
    ]
    found = torch.from_numpy(np.ascontiguousarray(raw))
    if stored.kind in KINDS:
        return Blocks(stored.name, stored.kind, found)
    return found.view(torch.float16 if stored.kind == Kind.F16 else torch.bfloat16)


def _changed(matrix: torch.Tensor | Blocks, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor | Blocks:
    return matrix.mapped(change) if isinstance(matrix, Blocks) else change(matrix)


def _parted(path: Path, stored: StoredTensor, parts: Sequence[tuple[Tensor, slice]]) -> dict[str, StoredTensor]:
    """The declared tensors that this one holds."""
    height, shape = parts[-1][1].stop, stored.shape
    if len(shape) == len(parts[0][0].shape) + 1:  # a matrix or bias of each expert
        shape = (shape[0] * shape[1], *shape[2:])
    check_shape(path, stored.name, shape, (height, *parts[0][0].shape[1:]))
    width = stored.size // height
    return {
        tensor.name: replace(
            stored,
            shape=tensor.shape,
            offset=stored.offset + rows.start * width,
            size=(rows.stop - rows.start) * width,
        )
        for tensor, rows in parts
    }


def read_array(path: Path, file: BinaryIO, stored: StoredTensor, part: Part) -> np.ndarray:
    """Read a part of a vector or matrix, in float32; `file` is `path`, opened."""
    block, size = GGML_QUANT_SIZES[stored.kind]
    if len(part) == 1:
        (columns,), rows, height = part, slice(0, 1), 1
    else:
        rows, columns = part
        height = stored.shape[0]
    first, last = columns.start // block, -(-columns.stop // block)
    raw = _read_rows(file, stored, height, rows)[:, first * size : last * size]
    values = _dequantized(path, stored, raw, (last - first) * block)
    skipped = columns.start - first * block
    return values[:, skipped : skipped + columns.stop - columns.start].reshape(shape_of(part))


def _read_rows(file: BinaryIO, stored: StoredTensor, height: int, rows: slice) -> np.ndarray:
    """Read rows of a tensor that has `height` of them, as they are stored: (rows, bytes) uint8."""
    row_bytes = stored.size // height
    file.seek(stored.offset + rows.start * row_bytes)
    count = rows.stop - rows.start
    return np.fromfile(file, dtype=np.uint8, count=count * row_bytes).reshape(count, row_bytes)


def _derived(name: str) -> bool:
    """Whether the tensor holds rotary frequencies, which are in the RopeConfig; old files have copies in each layer."""
    return name in ROPE_FACTORS or name.endswith((".attn_rot_embd.weight", ".rope_freqs.weight"))


def _dequantized(path: Path, stored: StoredTensor, raw: np.ndarray, width: int) -> np.ndarray:
    """Dequantize (rows, bytes) uint8 -> (rows, width) float32."""
    if stored.kind == Kind.F32:
        return np.ascontiguousarray(raw).view(np.float32)
    step = max(1, CHUNK // width)
    values = np.empty((len(raw), width), dtype=np.float32)
    try:
        for i in range(0, len(raw), step):
            values[i : i + step] = gguf.dequantize(np.ascontiguousarray(raw[i : i + step]), stored.kind)
    except NotImplementedError as error:
        raise ModelError(
            f"{path}: tensor {stored.name!r} is {stored.kind.name}, which the engine cannot read: convert it to one of "
            f"F32, F16, BF16, {', '.join(kind.name for kind in KINDS)}"
        ) from error
    return values


def _unpaired(values: torch.Tensor, size: int) -> torch.Tensor:
    """Reorder each head's `size` rows as `Tensor.paired_rows` says, from llama.cpp's order to Hugging Face's."""
    if not size:
        return values
    return values.view(-1, size // 2, 2, *values.shape[1:]).transpose(1, 2).reshape(values.shape)
