"""Tensors of a file that torch.save has written (pytorch_model.bin), without unpickling: no code of the file runs.

Such a file is a zip archive with the bytes of each storage and `data.pkl`, a pickle of a dictionary that names them
(https://docs.pytorch.org/docs/stable/notes/serialization.html). `pickletools.genops` lists a pickle's operations
and executes none; the few that a dictionary of tensors consists of are carried out here, on plain values.
"""

from __future__ import annotations

import pickletools  # nosec B403  # which lists operations and executes none
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from pilotfish.errors import ModelError

LARGEST_PICKLE = 2**22
"""Bytes of data.pkl. A tensor takes about 200."""
DEEPEST = 2**16
"""Values on the stack, to which a dictionary's items belong."""

_DTYPES: Mapping[str, torch.dtype] = {
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch DoubleStorage": torch.float64,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = object()


@dataclass(frozen=True, slots=True)
class _Global:
    name: str


@dataclass(frozen=True, slots=True)
class _Storage:
    key: str
    dtype: torch.dtype
    count: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def load(path: Path) -> dict[str, torch.Tensor]:
    """The tensors by their names, on the CPU. Raises ModelError for a file that is no dictionary of dense tensors."""
    try:
        with zipfile.ZipFile(path) as archive:
            return _load(archive)
    except (OSError, ValueError, IndexError, TypeError, KeyError, zipfile.BadZipFile) as error:
        raise ModelError(
            f"cannot read {path} as a dictionary of tensors, written by torch.save: {error}; save it as safetensors"
        ) from error


def _load(archive: zipfile.ZipFile) -> dict[str, torch.Tensor]:
    members = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in members if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"it has {len(pickles)} files data.pkl, not one")
    if any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
        raise ValueError("it is compressed, which torch.save does not do")
    if members[pickles[0]].file_size > LARGEST_PICKLE:
        raise ValueError(f"its data.pkl has {members[pickles[0]].file_size} bytes, but may have {LARGEST_PICKLE}")
    named = _interpreted(archive.read(pickles[0]))
    folder = pickles[0].removesuffix("data.pkl")
    storages: dict[str, torch.Tensor] = {}
    tensors = {}
    for name, tensor in named.items():
        storage = tensor.storage
        if storage.key not in storages:
            content = bytearray(archive.read(f"{folder}data/{storage.key}"))
            if len(content) != storage.count * storage.dtype.itemsize or not content:
                raise ValueError(f"the storage of tensor {name!r:.200} has {len(content)} bytes")
            storages[storage.key] = torch.frombuffer(content, dtype=torch.uint8)
        tensors[name] = _viewed(name, tensor, storages[storage.key].view(storage.dtype))
    return tensors


def _viewed(name: str, tensor: _Tensor, storage: torch.Tensor) -> torch.Tensor:
    """The tensor's part of its storage. Raises ValueError for one that is not contiguous, or not within it."""
    contiguous = tuple(prod(tensor.shape[i + 1 :]) for i in range(len(tensor.shape)))
    whole = all(isinstance(each, int) and each > 0 for each in tensor.shape) and isinstance(tensor.offset, int)
    if (
        not whole
        or tensor.offset < 0
        or any(
            size > 1 and stride != wanted
            for size, stride, wanted in zip(tensor.shape, tensor.stride, contiguous, strict=True)
        )
    ):
        raise ValueError(f"tensor {name!r:.200} of shape {tensor.shape} is empty, or not contiguous")
    end = tensor.offset + prod(tensor.shape)
    if end > len(storage):
        raise ValueError(f"tensor {name!r:.200} ends at {end}, but its storage at {len(storage)}")
    return storage[tensor.offset : end].view(tensor.shape)


def _interpreted(pickle: bytes) -> dict[str, _Tensor]:
    """The dictionary that a pickle makes."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def marked() -> list[Any]:
        at = next((i for i in reversed(range(len(stack))) if stack[i] is _MARK), -1)
        if at < 0:
            raise ValueError("its pickle is damaged")
        items = stack[at + 1 :]
        del stack[at:]
        return items

    operations: Iterable[tuple[Any, Any, Any]] = pickletools.genops(pickle)
    for operation, argument, _ in operations:
        if len(stack) > DEEPEST:
            raise ValueError("its pickle is nested too deep")
        match operation.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                break
            case "MARK":
                stack.append(_MARK)
            case "EMPTY_DICT":
                stack.append({})
            case "TUPLE":
                stack.append(tuple(marked()))
            case "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                at = len(stack) - _TUPLES[name]
                stack[at:] = [tuple(stack[at:])]
            case "NONE" | "NEWTRUE" | "NEWFALSE" as name:
                stack.append(_CONSTANTS[name])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_Global(argument))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                arguments, called = stack.pop(), stack.pop()
                stack.append(_called(called, arguments))
            case "BUILD":  # attributes, such as a state_dict's _metadata
                stack.pop()
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                stack[-1][key] = value
            case "SETITEMS":
                items = marked()
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case name:
                raise ValueError(f"its pickle has the operation {name}, which a dictionary of tensors does not need")
    found = stack.pop()
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(tensor, _Tensor) for name, tensor in found.items()
    ):
        raise ValueError("its pickle is not a dictionary of tensors")
    return found


def _storage(id_: Any) -> _Storage:
    kind, storage, key, _, count = id_
    if kind != "storage" or not isinstance(storage, _Global) or storage.name not in _DTYPES:
        raise ValueError(f"it has a storage that is {getattr(storage, 'name', storage)!r:.80}")
    if not isinstance(key, str) or not isinstance(count, int):
        raise ValueError("it has a storage without a name or a size")
    return _Storage(key, _DTYPES[storage.name], count)


def _called(function: Any, arguments: Any) -> Any:
    """What a function of the few that are known returns."""
    match function:
        case _Global("collections OrderedDict") if arguments == ():
            return {}
        case _Global("torch._utils _rebuild_tensor_v2"):
            storage, offset, shape, stride = arguments[:4]
            if not isinstance(storage, _Storage):
                raise ValueError("it has a tensor without a storage")
            return _Tensor(storage, offset, tuple(shape), tuple(stride))
        case _Global("torch._utils _rebuild_parameter"):
            return arguments[0]
    raise ValueError(f"its pickle calls {getattr(function, 'name', function)!r:.80}, which is not called")
