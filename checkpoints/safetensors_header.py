"""A safetensors file's header: where its tensors lie. No torch, and no safetensors.

The format is specified in https://github.com/huggingface/safetensors#format: 8 bytes with the header's length, the
header, which is JSON, and the tensors' data without gaps. Everything that a header says is held against the file before
it is used. The safetensors package checks as much, but takes many times a header's size in memory.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path

import msgspec

from pilotfish.errors import ModelError

LONGEST_HEADER = 100_000_000
"""Bytes, by the safetensors package."""
MOST_TENSORS = 2**16
"""In a file. Folders of a million million parameters have a few hundred in each."""
MOST_DIMENSIONS = 8

BITS: Mapping[str, int] = {
    **{f"{letter}{bits}": bits for letter in "IU" for bits in (8, 16, 32, 64)},
    "F64": 64,
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "C64": 64,
    "BOOL": 8,
    **dict.fromkeys(("F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F8_E8M0"), 8),
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}
"""Bits of a value by the name of its dtype."""

_METADATA = "__metadata__"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor's location in the file."""

    name: str
    dtype: str
    """A key of BITS."""
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    size: int  # bytes


class _Entry(msgspec.Struct):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def read_header(path: Path) -> list[StoredTensor]:
    """The tensors of a file, in the order of its header. Raises ModelError unless the header describes the file."""
    try:
        with path.open("rb") as file:
            return _parse(file.fileno())
    except (OSError, ValueError, RecursionError) as error:  # ValueError: msgspec's errors, too
        raise ModelError(f"cannot read {path} as a safetensors file: {error}") from error


def check_file(path: Path) -> None:
    """Raise ModelError for a file that the safetensors package should not be asked to read."""
    read_header(path)


def _parse(file: int) -> list[StoredTensor]:
    total = os.fstat(file).st_size
    first = os.pread(file, 8, 0)
    if len(first) < 8:
        raise ValueError(f"it has {len(first)} bytes, but must begin with the length of its header: it was cut short")
    (length,) = struct.unpack("<Q", first)
    if length > min(total - 8, LONGEST_HEADER):
        raise ValueError(
            f"it has {total} bytes, but begins with the length {length} of its header, which may have "
            f"{LONGEST_HEADER}: it was cut short, or is no such file"
        )
    header = os.pread(file, length, 8)
    # A key can also be spelled with escapes, or stand in a text: this only bounds what is decoded next.
    if header.count(b'"data_offsets"') > MOST_TENSORS or header.count(b":") > 16 * MOST_TENSORS:
        raise ValueError(f"its header has more than {MOST_TENSORS} tensors, or very much beside them")
    entries = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
    if len(entries) > MOST_TENSORS + 1:
        raise ValueError(f"its header has more than {MOST_TENSORS} tensors")
    data = 8 + length
    tensors = [_tensor(name, raw, data) for name, raw in entries.items() if name != _METADATA]
    _check_places(tensors, data, total)
    return tensors


def _tensor(name: str, raw: msgspec.Raw, data: int) -> StoredTensor:
    """The tensor of an entry; `data` is the offset of the first tensor's data in the file."""
    try:
        entry = msgspec.json.decode(raw, type=_Entry)
    except msgspec.MsgspecError as error:
        raise ValueError(f"the entry of tensor {name!r:.200} is wrong: {error}") from error
    (begin, end), shape = entry.data_offsets, entry.shape
    if entry.dtype not in BITS:
        raise ValueError(f"tensor {name!r:.200} is {entry.dtype!r:.80}, which the format does not have")
    if len(shape) > MOST_DIMENSIONS or any(size < 0 for size in shape):
        raise ValueError(f"tensor {name!r:.200} has shape {str(shape)[:200]}, which is none")
    bits = prod(shape) * BITS[entry.dtype]
    if bits % 8 or begin < 0 or end - begin != bits // 8:
        raise ValueError(
            f"tensor {name!r:.200} of shape {shape} and dtype {entry.dtype} has {end - begin} bytes, not {bits / 8:g}"
        )
    return StoredTensor(name, entry.dtype, shape, data + begin, end - begin)


def _check_places(tensors: list[StoredTensor], data: int, total: int) -> None:
    """Raise ValueError unless the tensors fill the file from `data` to its end, `total`, without gap or overlap."""
    ordered = sorted(tensors, key=lambda tensor: (tensor.offset, tensor.size))
    if not ordered:
        if data != total:
            raise ValueError(f"its header describes no tensors, but {total - data} bytes follow it")
        return
    first, last = ordered[0], ordered[-1]
    for before, tensor in pairwise(ordered):
        if tensor.offset < before.offset + before.size:
            raise ValueError(f"tensors {before.name!r:.200} and {tensor.name!r:.200} overlap")
        if tensor.offset > before.offset + before.size:
            raise ValueError(f"there is a gap between tensors {before.name!r:.200} and {tensor.name!r:.200}")
    if first.offset != data:
        raise ValueError("there is a gap between its header and its first tensor")
    if (end := last.offset + last.size) != total:
        raise ValueError(f"it has {total} bytes, but its header describes {end}: it was cut short, or has a tail")
