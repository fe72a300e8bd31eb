"""Weights of a Hugging Face folder: one model.safetensors, or several with model.safetensors.index.json.

`checkpoints.safetensors_header` finds the tensors; they are read here, by pread instead of from a mapping: exactly the
bytes of a slice, into memory that is freed as soon as they are on their device. (A mapping's pages count as this
process's memory until the file is closed, and a page fault reads its surroundings, too: all of a row of which a few
columns are wanted.)
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from itertools import islice
from math import prod
from pathlib import Path

import msgspec
import torch

from pilotfish.checkpoints.safetensors_header import read_header
from pilotfish.engine.weights.quantization import SCALE, SCHEMES, Quantization, scheme_of
from pilotfish.engine.weights.read_ahead import Job, read_ahead
from pilotfish.engine.weights.tensors import Part, Tensor, check_names, check_shape, rows_of, shape_of
from pilotfish.errors import ModelError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LARGEST_INDEX = 2**25
"""Bytes. That of a model with 60,000 tensors has a fifth of it."""

THREADS = 4
"""Threads that read."""
FILES = 4
"""Most files that are read at a time."""
READ_AHEAD = 1 << 30
"""Most bytes that are read and not yet taken; less if the files are small."""
CHUNK = 4 << 20
"""Bytes that pass through the host at a time, for each thread, on their way to another device or dtype."""

_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    **{f"I{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": getattr(torch, f"uint{bits}") for bits in (8, 16, 32, 64)},
    "C64": torch.complex64,
    "BOOL": torch.bool,
}
"""torch's dtypes by the format's names."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor's location."""

    path: Path
    file: int
    """Descriptor of the open file."""
    name: str
    """Its name in the file."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""


def iter_weights(
    folder: Path,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    parts: Mapping[str, Part],
    device: torch.device,
    *,
    name_of: Callable[[str], str | None],
    quantization: Quantization | None = None,
    halves: bool = False,
) -> Iterator[tuple[str, torch.Tensor]]:
    """See `engine.models.checkpoint.iter_weights`. Several files are read at a time. Tensors that are read ahead, with
    the one yielded last, take at most READ_AHEAD bytes and a quarter of the largest file, or there is one beside the
    last; those on another device than the CPU are no longer on the host.

    name_of: the declared name of a stored tensor, or None for one that is not used. halves: matrices that are stored in
    16 bits stay in them.
    """
    with ExitStack() as stack:
        found: dict[str, Stored] = {}
        sizes = []
        parted = rows_of(tensors.values(), lambda tensor: tensor.stored)
        for path in shards(folder):
            for stored in _open(path, stack):
                if (name := name_of(stored.name)) is not None:
                    found |= _parted(name, stored, parted)
            sizes.append(path.stat().st_size)
        _check(folder, tensors, found, quantization)
        kept = {name for name in parts if halves and _in_halves(tensors[name], found[name])}
        jobs = [
            _job(name, part, found, found[name].dtype if name in kept else dtype, device)
            for name, part in _side_by_side(parts, found)
        ]
        limit = min(READ_AHEAD, max(sizes) // 4)
        with closing(read_ahead(jobs, THREADS, limit)) as results:
            for weights in results:
                yield from weights


def _in_halves(tensor: Tensor, stored: Stored) -> bool:
    """Whether it is a matrix in 16 bits."""
    return tensor.linear is not None and tensor.kind == "weight" and stored.dtype in (torch.float16, torch.bfloat16)


def _parted(name: str, stored: Stored, parted: Mapping[str, Seq[tuple[Tensor, slice]]]) -> dict[str, Stored]:
    """The declared tensors, or their scales, that this one holds."""
    suffix = SCALE if name.endswith(SCALE) else ""
    parts = parted.get(name.removesuffix(suffix), ())
    if not parts or (suffix and prod(stored.shape) == 1):  # one scale for all rows
        return dict.fromkeys((tensor.name + suffix for tensor, _ in parts), stored) or {name: stored}
    height = parts[-1][1].stop
    check_shape(
        stored.path, stored.name, stored.shape, (height, *(stored.shape[1:] if suffix else parts[0][0].shape[1:]))
    )
    width = prod(stored.shape[1:]) * stored.dtype.itemsize
    return {
        tensor.name + suffix: replace(
            stored, shape=(rows.stop - rows.start, *stored.shape[1:]), offset=stored.offset + rows.start * width
        )
        for tensor, rows in parts
    }


def _check(
    folder: Path, tensors: Mapping[str, Tensor], found: Mapping[str, Stored], quantization: Quantization | None
) -> None:
    """Raise ModelError unless the tensors found are those declared, with scales beside those that are quantized."""
    unused, scales = set(), set()
    if quantization is not None:
        ends = tuple(f".{end}" for end in SCHEMES[quantization.scheme].unused)
        unused = {name for name in found if name.endswith(ends)}
        scales = {name + SCALE for name in tensors} & found.keys()
    check_names(folder, found.keys() - unused - scales, tensors.keys())
    for name, tensor in tensors.items():
        stored, scheme = found[name], scheme_of(found[name].dtype)
        check_shape(stored.path, name, stored.shape, tensor.shape)
        known = quantization is not None and scheme is SCHEMES[quantization.scheme]
        if not stored.dtype.is_floating_point and not known:
            raise ModelError(f"{stored.path}: tensor {name!r} is {stored.dtype}, but must be a floating-point one")
        if scheme is not None and name + SCALE not in scales:
            raise ModelError(
                f"{stored.path}: tensor {name!r} is {stored.dtype}, but has no weight_scale, which {scheme.name} "
                "weights need"
            )
        if name + SCALE not in scales:
            continue
        if scheme is None and quantization is not None:
            raise ModelError(
                f"{stored.path}: tensor {name!r} is {stored.dtype}, but has a weight_scale, which only "
                f"{quantization.scheme} weights need"
            )
        if prod((scale := found[name + SCALE]).shape) not in (1, tensor.shape[0]):
            raise ModelError(
                f"{scale.path}: tensor {name + SCALE!r} has shape {scale.shape}, but must have a scale for each of "
                f"{tensor.shape[0]} output channels, or one for all"
            )


def _side_by_side(parts: Mapping[str, Part], found: Mapping[str, Stored]) -> Iterator[tuple[str, Part]]:
    """The same parts, alternating between FILES files; those of one file keep the order of `parts`."""
    by_file: dict[int, deque[str]] = {}
    for name in parts:
        by_file.setdefault(found[name].file, deque()).append(name)
    files = iter(by_file.values())
    open_files = deque(islice(files, FILES))
    while open_files:
        names = open_files.popleft()
        name = names.popleft()
        yield name, parts[name]
        open_files.extend([names] if names else islice(files, 1))


def _job(
    name: str, part: Part, found: Mapping[str, Stored], dtype: torch.dtype, device: torch.device
) -> Job[list[tuple[str, torch.Tensor]]]:
    """The job that reads the part of a tensor, and of its scales if it is quantized."""
    stored, scale = found[name], found.get(name + SCALE)
    kept = dtype if scale is None else stored.dtype

    def run() -> list[tuple[str, torch.Tensor]]:
        weights = [(name, _read(stored, part, kept, device))]
        if scale is not None:
            weights.append((name + SCALE, _read_scale(scale, part[0], device)))
        return weights

    return Job(run, prod(shape_of(part)) * kept.itemsize)


def _read_scale(stored: Stored, rows: slice, device: torch.device) -> torch.Tensor:
    """(rows, 1) float32, from a scale for each output channel or one for all."""
    count = prod(stored.shape)
    scale = _read(replace(stored, shape=(count,)), (slice(0, 1) if count == 1 else rows,), torch.float32, device)
    return scale.view(-1, 1).expand(rows.stop - rows.start, 1)


def _read(stored: Stored, part: Part, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Read a part of a vector or matrix, in `dtype` on `device`."""
    tensor = torch.empty(shape_of(part), dtype=dtype, device=device)
    if not tensor.numel():
        return tensor
    if device.type == "cpu" and dtype == stored.dtype:
        _fill(_bytes(tensor), stored, part)
        return tensor
    step = max(1, CHUNK * len(tensor) // (tensor.numel() * stored.dtype.itemsize))  # rows
    buffer = torch.empty_like(tensor[:step], dtype=stored.dtype, device="cpu", pin_memory=device.type == "cuda")
    for start in range(0, len(tensor), step):
        chunk = buffer[: len(tensor) - start]
        rows = slice(part[0].start + start, part[0].start + start + len(chunk))
        _fill(_bytes(chunk), stored, (rows, *part[1:]))
        tensor[start : start + step].copy_(chunk)
    return tensor


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a tensor on the CPU."""
    return memoryview(tensor.view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]


def _fill(memory: memoryview, stored: Stored, part: Part) -> None:
    """Read a part of a vector or matrix into `memory`, row by row unless its rows are whole."""
    size = stored.dtype.itemsize
    rows, width = part[0], prod(stored.shape[1:]) * size
    if len(part) == 1 or shape_of(part[1:]) == stored.shape[1:]:
        _read_exactly(stored, memory, stored.offset + rows.start * width)
        return
    start, length = part[1].start * size, (part[1].stop - part[1].start) * size
    for i in range(rows.stop - rows.start):
        _read_exactly(stored, memory[i * length : (i + 1) * length], stored.offset + (rows.start + i) * width + start)


def _read_exactly(stored: Stored, memory: memoryview, offset: int) -> None:
    while len(memory):
        try:
            count = os.preadv(stored.file, [memory], offset)
        except OSError as error:
            raise ModelError(f"cannot read {stored.path}: {error}") from error
        if count == 0:
            raise ModelError(f"{stored.path} ends within tensor {stored.name!r}: it was cut short")
        memory, offset = memory[count:], offset + count


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def shards(folder: Path) -> list[Path]:
    """The folder's weight files. An index decides if there is one, as other files may lie beside its own. Raises
    ModelError for an index that is none, or that names files elsewhere."""
    index = folder / INDEX
    if index.is_file():
        try:
            if (size := index.stat().st_size) > LARGEST_INDEX:
                raise ModelError(f"{index} has {size} bytes, but may have {LARGEST_INDEX}")
            names = sorted(set(msgspec.json.decode(index.read_bytes(), type=_Index).weight_map.values()))
        except (OSError, ValueError, RecursionError) as error:
            raise ModelError(f"cannot read {index}: {error}") from error
        if strange := [name for name in names if Path(name).name != name or "\0" in name]:
            raise ModelError(f"{index}: weight_map names {strange[0]!r:.200}, but must name files of the folder itself")
        if not names:
            raise ModelError(f"{index}: weight_map names no files")
        return [folder / name for name in names]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    raise ModelError(f"{folder} has neither {SINGLE} nor {INDEX}: the engine reads safetensors files (or GGUF) only")


def _open(path: Path, stack: ExitStack) -> list[Stored]:
    """The tensors of a file, which stays open until `stack` is closed."""
    header = read_header(path)
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error}") from error
    stack.callback(os.close, file)
    if unknown := {each.dtype for each in header} - _DTYPES.keys():
        raise ModelError(f"{path} has tensors of {', '.join(sorted(unknown))}, which the engine does not know")
    return [Stored(path, file, each.name, _DTYPES[each.dtype], each.shape, each.offset) for each in header]
