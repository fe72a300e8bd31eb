"""A GGUF file's header: its metadata, and where its tensors lie. No torch.

The format is specified in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3). The gguf
package's own reader makes several numpy objects for every token and merge of the vocabulary, which takes 2.4 s for
SmolLM2's; here long lists are skipped, since the tokenizer is transformers' business, and it takes 0.05 s.

A file may come from anywhere. A count is checked against the bytes that are left before it is looped over, what is kept
is bounded by the constants below, and tensors neither overlap nor reach beyond the file.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from pilotfish.checkpoints.values import Values
from pilotfish.errors import ModelError

LONGEST_LIST = 256
"""Longer lists are left out of the metadata."""
LONGEST_TEXT = 2**20
"""Bytes of a string; longer ones (whole tokenizer.json files, in some) are left out of the metadata as well."""
LONGEST_NAME = 2**16 - 1
"""Bytes of a key, by the specification; a tensor's name may not be longer either."""
MOST_TOKENS = 2**22
"""Strings in a list, which is a vocabulary or its merges."""
MOST_VALUES = 2**16
"""Values of the metadata, those in lists included; and tensors."""
MOST_TEXT = 2**22
"""Bytes of all strings and names that are kept."""
DEEPEST = 4
"""Lists within lists. No known key has any."""
MOST_DIMENSIONS = 4
"""Of a tensor, by the specification (GGML_MAX_DIMS)."""


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
    # ValueError: empty, bad UTF-8, an unknown type; the last two: a list of strings that ends beyond the file
    except (OSError, ValueError, struct.error, OverflowError) as error:
        raise ModelError(f"cannot read {path} as a GGUF file: {error}") from error


def eos_token_ids(header: Header) -> tuple[int, ...]:
    """Returns the ids of the tokens that end a text, a turn or a message (Llama 3 has all three). Raises ModelError for
    what are no ids."""
    values = Values(header.path, header.metadata)
    ids = (values.id(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
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


_SMALLEST = {GGUFValueType.STRING: 8, GGUFValueType.ARRAY: 12}
"""Bytes of the shortest value of a kind that has no fixed size."""


class _Parser:
    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0
        self._values = 0
        self._text = 0

    def header(self) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
        """Parse the metadata and the tensors."""
        if self._data[:4] != b"GGUF":
            raise ValueError("it does not start with 'GGUF'")
        self._at = 4
        version = self._number("I")
        if version not in (2, 3):
            raise ValueError(f"its version is {version}, but must be 2 or 3 (in little-endian order)")
        tensor_count, value_count = self._number("Q"), self._number("Q")
        self._check_count("tensors", tensor_count, 24, MOST_VALUES)
        self._check_count("metadata values", value_count, 13, MOST_VALUES)
        metadata: dict[str, Any] = {}
        seen = set[str]()
        for _ in range(value_count):
            name = self._name()
            if name in seen:
                raise ValueError(f"it has the key {name!r:.200} twice")
            seen.add(name)
            value = self._value(GGUFValueType(self._number("I")))
            if value is not None:
                metadata[name] = value
        alignment = metadata.get("general.alignment", 32)
        if not _is_alignment(alignment):
            raise ValueError(f"general.alignment is {alignment!r:.80}, but must be a positive multiple of 8")
        tensors: dict[str, StoredTensor] = {}
        for _ in range(tensor_count):
            tensor = self._tensor()
            if tensor.name in tensors:
                raise ValueError(f"it has the tensor {tensor.name!r:.200} twice")
            tensors[tensor.name] = tensor
        start = -(-self._at // alignment) * alignment
        placed = {name: replace(tensor, offset=start + tensor.offset) for name, tensor in tensors.items()}
        self._check_places(placed, alignment, start)
        return metadata, placed

    def _check_places(self, tensors: dict[str, StoredTensor], alignment: int, start: int) -> None:
        """Raise ValueError unless tensors lie one behind the other within the file."""
        end = max((tensor.offset + tensor.size for tensor in tensors.values()), default=start)
        if end > len(self._data):
            raise ValueError(f"it has {len(self._data)} bytes, but its header describes {end}: it was cut short")
        for before, tensor in pairwise(sorted(tensors.values(), key=lambda tensor: tensor.offset)):
            if tensor.offset < before.offset + before.size:
                raise ValueError(f"tensors {before.name!r:.200} and {tensor.name!r:.200} overlap")
        for tensor in tensors.values():
            if (tensor.offset - start) % alignment:
                raise ValueError(f"the offset of tensor {tensor.name!r:.200} is not a multiple of {alignment}")

    def _tensor(self) -> StoredTensor:
        """A tensor, with its offset from the start of the data."""
        name, dimensions = self._name(), self._number("I")
        if not 0 < dimensions <= MOST_DIMENSIONS:
            raise ValueError(f"tensor {name!r:.200} has {dimensions} dimensions, but must have 1 to {MOST_DIMENSIONS}")
        shape = tuple(self._number("Q") for _ in range(dimensions))[::-1]
        number, offset = self._number("I"), self._number("Q")
        if number not in list(GGMLQuantizationType):
            raise ValueError(f"tensor {name!r:.200} is of type {number}, which no version of the format known here has")
        kind = GGMLQuantizationType(number)
        block, size = GGML_QUANT_SIZES[kind]
        if 0 in shape or shape[-1] % block:
            raise ValueError(
                f"tensor {name!r:.200} of shape {shape} does not have rows of blocks of {block}, as {kind.name} needs: "
                "convert it to F16 or BF16"
            )
        return StoredTensor(name, kind, shape, offset, prod(shape) // block * size)

    def _check_count(self, what: str, count: int, least: int, most: int) -> None:
        """Raise ValueError if so many of at least `least` bytes each cannot be in the rest of the file, or are more
        than `most`."""
        left = len(self._data) - self._at
        if count * least > left:
            raise ValueError(f"it has {left} bytes left for {count} {what}: it was cut short, or its header is wrong")
        if count > most:
            raise ValueError(f"it has {count} {what}, but may have {most}")

    def _number(self, letter: str) -> Any:
        layout = struct.Struct("<" + letter)
        if self._at + layout.size > len(self._data):
            raise ValueError("it was cut short")
        value = layout.unpack_from(self._data, self._at)[0]
        self._at += layout.size
        return value

    def _name(self) -> str:
        name = self._string(LONGEST_NAME)
        if name is None:
            raise ValueError(f"it has a name of more than {LONGEST_NAME} bytes")
        return name

    def _string(self, longest: int) -> str | None:
        """The next string; None if it is longer than `longest` bytes."""
        length = self._number("Q")
        if self._at + length > len(self._data):
            raise ValueError("it was cut short")
        self._at += length
        if length > longest:
            return None
        self._text += length
        if self._text > MOST_TEXT:
            raise ValueError(f"its names and strings have more than {MOST_TEXT} bytes")
        return self._data[self._at - length : self._at].decode("utf-8")

    def _value(self, kind: GGUFValueType, depth: int = 0) -> Any:
        self._values += 1
        if self._values > MOST_VALUES:
            raise ValueError(f"its metadata has more than {MOST_VALUES} values")
        if kind == GGUFValueType.STRING:
            return self._string(LONGEST_TEXT)
        if kind == GGUFValueType.ARRAY:
            return self._list(depth + 1)
        return self._number(_FORMATS[kind])

    def _list(self, depth: int) -> list[Any] | None:
        if depth > DEEPEST:
            raise ValueError(f"its metadata has lists nested more than {DEEPEST} deep")
        kind, length = GGUFValueType(self._number("I")), self._number("Q")
        size = struct.calcsize("<" + _FORMATS[kind]) if kind in _FORMATS else _SMALLEST[kind]
        most = MOST_TOKENS if kind not in _FORMATS else len(self._data)
        self._check_count(f"values in a list of {kind.name.lower()}", length, size, most)
        if length <= LONGEST_LIST or kind == GGUFValueType.ARRAY:
            return [self._value(kind, depth) for _ in range(length)]
        if kind == GGUFValueType.STRING:
            at, data, unpack = self._at, self._data, struct.Struct("<Q").unpack_from
            for _ in range(length):
                at += 8 + unpack(data, at)[0]
            self._at = at
        else:
            self._at += length * size
        return None


def _is_alignment(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0 and value % 8 == 0
