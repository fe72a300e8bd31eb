"""A GGUF file's header: its metadata, and where its tensors lie. No torch.

The format is specified in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3). The gguf
package's own reader makes several numpy objects for every token and merge of the vocabulary, which takes 2.4 s for
SmolLM2's; here long lists are skipped, since the tokenizer is transformers' business, and it takes 0.05 s.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from pilotfish.checkpoints.values import Values
from pilotfish.errors import ModelError

LONGEST_LIST = 256
"""Longer lists are left out of the metadata."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor's location in the file. `shape` is in torch's order (GGUF's own is the reverse)."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    size: int  # bytes


@dataclass(frozen=True, slots=True)
class Header:
    """The part of a GGUF file before its tensors' data: metadata, and where the tensors lie."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]  # by name

    @property
    def architecture(self) -> Any:
        """A string in every valid file; None where the file does not say."""
        return self.metadata.get("general.architecture")

    @property
    def values(self) -> Values:
        """The metadata of the file's architecture."""
        return Values(self.path, self.metadata, f"{self.architecture}.")


def read_header(path: Path) -> Header:
    """Read the header. Raises ModelError unless the file is whole and GGUF version 2 or 3 in little-endian order."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return Header(path, *_Parser(data).header())
    except (OSError, ValueError, struct.error, IndexError) as error:  # ValueError: empty, bad UTF-8, an unknown type
        raise ModelError(f"cannot read {path} as a GGUF file: {error}") from error


def eos_token_ids(metadata: dict[str, Any]) -> tuple[int, ...]:
    """Returns the ids of the tokens that end a text, a turn or a message (Llama 3 has all three)."""
    ids = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    return tuple(dict.fromkeys(id_ for id_ in ids if id_ is not None))


_FORMATS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}


class _Parser:
    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0

    def header(self) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
        """Parse the metadata and the tensors."""
        if self._data[:4] != b"GGUF":
            raise ValueError("it does not start with 'GGUF'")
        self._at = 4
        version = self._number("I")
        if version not in (2, 3):
            raise ValueError(f"its version is {version}, but must be 2 or 3 (in little-endian order)")
        tensor_count, value_count = self._number("Q"), self._number("Q")
        metadata = {}
        for _ in range(value_count):
            name = self._string()
            value = self._value(GGUFValueType(self._number("I")))
            if value is not None:
                metadata[name] = value
        found = [self._tensor() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        start = -(-self._at // alignment) * alignment
        tensors = {}
        for name, kind, shape, offset in found:
            block, size = GGML_QUANT_SIZES[kind]
            count = prod(shape)
            if count % block:
                raise ValueError(f"tensor {name!r} of shape {shape} is not made of blocks of {block}")
            tensors[name] = StoredTensor(name, kind, shape, start + offset, count // block * size)
        end = max((tensor.offset + tensor.size for tensor in tensors.values()), default=start)
        if end > len(self._data):
            raise ValueError(f"it has {len(self._data)} bytes, but its header describes {end}: it was cut short")
        return metadata, tensors

    def _tensor(self) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int]:
        name = self._string()
        shape = tuple(self._number("Q") for _ in range(self._number("I")))
        return name, GGMLQuantizationType(self._number("I")), shape[::-1], self._number("Q")

    def _number(self, letter: str) -> Any:
        layout = struct.Struct("<" + letter)
        value = layout.unpack_from(self._data, self._at)[0]
        self._at += layout.size
        return value

    def _string(self) -> str:
        length = self._number("Q")
        self._at += length
        if self._at > len(self._data):
            raise ValueError("it was cut short")
        return self._data[self._at - length : self._at].decode("utf-8")

    def _value(self, kind: GGUFValueType) -> Any:
        if kind == GGUFValueType.STRING:
            return self._string()
        if kind == GGUFValueType.ARRAY:
            return self._list()
        return self._number(_FORMATS[kind])

    def _list(self) -> list[Any] | None:
        kind, length = GGUFValueType(self._number("I")), self._number("Q")
        if length <= LONGEST_LIST or kind == GGUFValueType.ARRAY:
            return [self._value(kind) for _ in range(length)]
        if kind == GGUFValueType.STRING:
            at, data, unpack = self._at, self._data, struct.Struct("<Q").unpack_from
            for _ in range(length):
                at += 8 + unpack(data, at)[0]
            self._at = at
        else:
            self._at += length * struct.calcsize("<" + _FORMATS[kind])
        return None
