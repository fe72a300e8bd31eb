"""Weights of a Hugging Face folder: one model.safetensors, or several with model.safetensors.index.json.

safetensors checks the files; tensors are read here, by pread instead of from its mapping: exactly the bytes of a slice,
into memory that is given back as soon as they are on their device. (A mapping's pages count as this process's memory
until the whole file is closed, and a page fault reads its surroundings, too: of rows of which a few columns are wanted,
all.)
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import islice
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.weights.hf_quantization import IGNORED_TENSORS
from pilotfish.engine.weights.names import HEAD, Part, check_names, check_shape, expected_shapes, shape_of, whole
from pilotfish.engine.weights.quantization import FP8, SCALE
from pilotfish.engine.weights.read_ahead import Job, read_ahead
from pilotfish.errors import ModelError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

THREADS = 4
"""That read at a time."""
FILES = 4
"""That are read at a time, where there are as many."""
READ_AHEAD = 1 << 30
"""Most bytes that are read and not yet taken; less if the files are small."""
CHUNK = 4 << 20
"""Bytes that pass through the host at a time, for each thread, on their way to another device or dtype."""

_BUFFER = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""Old checkpoints hold the rotary frequencies, which follow from the configuration."""

_SIGHT = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")
"""The part of Gemma 3 that sees images, which the engine does not use."""

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
"""By the names that the format has for them."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies."""

    path: Path
    file: int
    """Descriptor of the open file."""
    name: str
    """In the file."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""


def iter_weights(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    parts: Mapping[str, Part] | None = None,
    device: torch.device | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """See `engine.weights.iter_weights`. Several files are read at a time. What is read ahead of the caller, with what
    it was given last, is less than a quarter of the largest file, or a single tensor beside that last one; and what is
    on another device than the CPU is not on the host any more."""
    with ExitStack() as stack:
        places: dict[str, Place] = {}
        sizes = []
        for path in _shards(folder):
            stored = _open(path, stack)
            sizes.append(path.stat().st_size)
            places |= {_text_name(place.name): place for place in stored if not _SIGHT.match(place.name)}
        shapes = expected_shapes(config)
        scales = _check(folder, config, places, shapes)
        wanted = {name: whole(shape) for name, shape in shapes.items()} if parts is None else parts
        jobs = [
            _job(name, part, places, name + SCALE in scales, dtype, device or torch.device("cpu"))
            for name, part in _side_by_side(wanted, places)
        ]
        limit = min(READ_AHEAD, max(sizes) // 4)
        with closing(read_ahead(jobs, THREADS, limit)) as results:
            for tensors in results:
                yield from tensors


def _check(
    folder: Path, config: ModelConfig, places: Mapping[str, Place], shapes: Mapping[str, tuple[int, ...]]
) -> set[str]:
    """Raise ModelError unless the tensors are those of the configuration. Returns the names of scales among them."""
    ignored = {name for name in places if _BUFFER.fullmatch(name)}
    if config.tie_embeddings:
        ignored.add(HEAD)
    scales = set()
    if config.fp8 is not None:
        ignored |= {name for name in places if name.endswith(tuple(f".{end}" for end in IGNORED_TENSORS))}
        scales = {name + SCALE for name in shapes} & places.keys()
    check_names(folder, places.keys() - ignored - scales, shapes.keys())
    for name, shape in shapes.items():
        place = places[name]
        check_shape(place.path, name, place.shape, shape)
        if not place.dtype.is_floating_point:
            raise ModelError(f"{place.path}: tensor {name!r} is {place.dtype}, but must be a floating-point one")
        if (place.dtype == FP8) != (name + SCALE in scales):
            raise ModelError(f"{place.path}: tensor {name!r} is {place.dtype}, {_SCALES[place.dtype != FP8]}")
        if name + SCALE in scales and prod(places[name + SCALE].shape) not in (1, shape[0]):
            raise ModelError(
                f"{places[name + SCALE].path}: tensor {name + SCALE!r} has shape {places[name + SCALE].shape}, but "
                f"must have a scale for each of {shape[0]} output channels, or one for all"
            )
    return scales


_SCALES = ("but has no weight_scale, which fp8 weights need", "but has a weight_scale, which only fp8 weights need")


def _side_by_side(parts: Mapping[str, Part], places: Mapping[str, Place]) -> Iterator[tuple[str, Part]]:
    """The same parts, FILES files' in turns: those of a file in the order of `parts`."""
    by_file: dict[int, deque[str]] = {}
    for name in parts:
        by_file.setdefault(places[name].file, deque()).append(name)
    files = iter(by_file.values())
    open_files = deque(islice(files, FILES))
    while open_files:
        names = open_files.popleft()
        name = names.popleft()
        yield name, parts[name]
        open_files.extend([names] if names else islice(files, 1))


def _job(
    name: str, part: Part, places: Mapping[str, Place], scaled: bool, dtype: torch.dtype, device: torch.device
) -> Job[list[tuple[str, torch.Tensor]]]:
    """Reads the part of a tensor, and of its scales if it has any."""
    place = places[name]
    kept = place.dtype if scaled else dtype

    def run() -> list[tuple[str, torch.Tensor]]:
        tensors = [(name, _read(place, part, kept, device))]
        if scaled:
            tensors.append((name + SCALE, _read_scale(places[name + SCALE], part[0], device)))
        return tensors

    return Job(run, prod(shape_of(part)) * kept.itemsize)


def _read_scale(place: Place, rows: slice, device: torch.device) -> torch.Tensor:
    """(rows, 1) float32, from a scale for each output channel or one for all."""
    count = prod(place.shape)
    flat = Place(place.path, place.file, place.name, place.dtype, (count,), place.offset)
    scale = _read(flat, (slice(0, 1) if count == 1 else rows,), torch.float32, device)
    return scale.view(-1, 1).expand(rows.stop - rows.start, 1)


def _read(place: Place, part: Part, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """That part of a vector or matrix, in `dtype` on `device`."""
    tensor = torch.empty(shape_of(part), dtype=dtype, device=device)
    if not tensor.numel():
        return tensor
    if device.type == "cpu" and dtype == place.dtype:
        _fill(_bytes(tensor), place, part)
        return tensor
    step = max(1, CHUNK * len(tensor) // (tensor.numel() * place.dtype.itemsize))  # rows
    buffer = torch.empty_like(tensor[:step], dtype=place.dtype, device="cpu", pin_memory=device.type == "cuda")
    for start in range(0, len(tensor), step):
        chunk = buffer[: len(tensor) - start]
        rows = slice(part[0].start + start, part[0].start + start + len(chunk))
        _fill(_bytes(chunk), place, (rows, *part[1:]))
        tensor[start : start + step].copy_(chunk)
    return tensor


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a tensor on the CPU."""
    return memoryview(tensor.view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]


def _fill(memory: memoryview, place: Place, part: Part) -> None:
    """Read that part of a vector or matrix, row by row if it is not whole rows."""
    size = place.dtype.itemsize
    rows, width = part[0], prod(place.shape[1:]) * size
    if len(part) == 1 or shape_of(part[1:]) == place.shape[1:]:
        _read_exactly(place, memory, place.offset + rows.start * width)
        return
    start, length = part[1].start * size, (part[1].stop - part[1].start) * size
    for i in range(rows.stop - rows.start):
        _read_exactly(place, memory[i * length : (i + 1) * length], place.offset + (rows.start + i) * width + start)


def _read_exactly(place: Place, memory: memoryview, offset: int) -> None:
    while len(memory):
        try:
            count = os.preadv(place.file, [memory], offset)
        except OSError as error:
            raise ModelError(f"cannot read {place.path}: {error}") from error
        if count == 0:
            raise ModelError(f"{place.path} ends within tensor {place.name!r}: it was cut short")
        memory, offset = memory[count:], offset + count


def _text_name(stored: str) -> str:
    """The name that a tensor of a model's text part has where the model has no other part."""
    if stored.startswith("model.language_model."):
        return "model." + stored.removeprefix("model.language_model.")
    return stored.removeprefix("language_model.")


def _shards(folder: Path) -> list[Path]:
    """The folder's weight files. An index decides if there is one, as other files may lie beside its own."""
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"cannot read {index}: {error}") from error
        return [folder / name for name in names]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    raise ModelError(f"{folder} has neither {SINGLE} nor {INDEX}: the engine reads safetensors files (or GGUF) only")


def _open(path: Path, stack: ExitStack) -> list[Place]:
    """The tensors of a file, which stays open as long as `stack`."""
    try:
        with safe_open(path, framework="numpy"):  # checks that the header describes the file
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, file)
        (length,) = struct.unpack("<Q", os.pread(file, 8, 0))
        header = json.loads(os.pread(file, length, 8))
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot read {path}: {error}") from error
    header.pop("__metadata__", None)
    if unknown := {entry["dtype"] for entry in header.values()} - _DTYPES.keys():
        raise ModelError(f"{path} has tensors of {', '.join(sorted(unknown))}, which the engine does not know")
    return [
        Place(path, file, name, _DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    ]
