"""Seconds of a step, by a roofline: each matrix takes as long as reading it or multiplying with it, whichever is longer
(Williams, Waterman and Patterson, 2009), and so does attention over its keys and values. All-reduces and the overheads
of kernels and engine come on top."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from math import log2

from gguf import GGMLQuantizationType as Kind

from pilotfish.engine.models.tensors import HEAD
from pilotfish.engine.weights.quantization import SCHEMES
from pilotfish.tools.planner.devices import Device
from pilotfish.tools.planner.heads import PlannedHead
from pilotfish.tools.planner.models import BYTES, Matrix, PlannedModel

KERNELS_PER_LAYER = 10
"""Norm, qkv, rotation with the cache's write, attention and the sum over its parts, output, norm, gate and up,
activation, down: as `tests/engine/execution/test_kernel_count.py` counts them. Sums and other norms are in these."""
LAYER_PRODUCTS = 4
"""Matrix products of a layer."""
FP8_KERNELS = 1
"""Additional kernels of a matrix product in fp8: quantizing its activations."""
FEW_ROWS = 64
"""Most rows of a product that has the activation in it, on devices with `gated_products`."""
HEAD_KERNELS = 2
"""Additional kernels in an EAGLE-3 head's layer: its second norm, and concatenating the two halves of its input."""
ROW_PASSES = 12
"""Times that the row-wise operators of a layer read or write a row's hidden state, as wide as `hidden_size`; its wider
intermediate state counts separately."""


@dataclass(frozen=True, slots=True)
class StepSeconds:
    """The time of one step on one rank, by its cause."""

    weights: float
    """Reading the matrices or multiplying with them, whichever is longer, matrix by matrix."""
    attention: float
    all_reduce: float
    rows: float
    """Row-wise operators."""
    kernels: float
    """Overhead of starting kernels."""
    engine: float
    """Plan, copies, sampling, commit."""

    @property
    def total(self) -> float:
        return sum((getattr(self, field.name) for field in fields(self)), 0.0)


def step_seconds(
    model: PlannedModel,
    device: Device,
    ranks: int,
    rows: int,
    sequences: int,
    context: int,
    logit_rows: int | None = None,
) -> StepSeconds:
    """Return the time of a step over `rows` tokens of `sequences` sequences, each with `context` tokens by then.

    logit_rows: rows that a token is drawn from; None: all. Raises ConfigError for a dtype that the device does not
    compute in, ValueError if the model does not divide by `ranks`.
    """
    drawn = rows if logit_rows is None else logit_rows
    pass_ = pass_seconds(model, device, ranks, rows, sequences, context, drawn)
    engine = device.step_seconds + device.sequence_seconds * sequences
    engine += device.logit_seconds * drawn * model.shape.vocab_size
    return replace(pass_, engine=engine)


def draft_seconds(
    model: PlannedModel | PlannedHead,
    device: Device,
    ranks: int,
    length: int,
    sequences: int,
    context: int,
    new_rows: float = 2.0,
) -> float:
    """Return the seconds of drafting `length` tokens for each sequence: as many passes of one row, the first of which
    reads all tokens since the last draft, `new_rows` a sequence. An EAGLE-3 head first fuses the target's features of
    those."""
    total = 0.0
    if isinstance(model, PlannedHead) and length:
        fusion: Matrix = model.fusion
        rows = max(sequences, round(new_rows * sequences))
        total += _product(device, _rate_dtype(model, fusion.dtype), fusion.params, fusion.bytes, rows)
        total += device.kernel_seconds
    for position in range(length):
        rows = round(new_rows * sequences) if position == 0 else sequences
        step = pass_seconds(model, device, ranks, max(rows, sequences), sequences, context, sequences)
        total += step.total + device.draft_seconds + device.logit_seconds * sequences * model.logit_size
    return total


def pass_seconds(
    model: PlannedModel | PlannedHead,
    device: Device,
    ranks: int,
    rows: int,
    sequences: int,
    context: int,
    logit_rows: int,
) -> StepSeconds:
    """Return the time of a model's pass alone, without the engine's own work."""
    shape, width = model.shape, BYTES[model.dtype]
    weights = 0.0
    for (head, dtype, params, size, share), count in _matrices(model, ranks):
        own = logit_rows if head else rows
        read = 1 - (1 - share) ** own  # of the experts: those that any row takes, each row on its own
        weights += count * read * _product(device, dtype, params, size, own * share / read if read else 0)
    heads = shape.num_heads / ranks
    flops = 4 * shape.num_layers * rows * heads * shape.head_dim * model.seen(context)
    keys = sequences * model.seen(context) * model.kv_bytes_per_token(ranks)
    # Scores are computed in the activations' dtype: an fp8 cache is widened on the way.
    rate = device.attention_flops or device.rate(model.dtype, rows)
    attention = max(keys / (device.bandwidth * device.bandwidth_share), flops / rate)
    wide = (3 * shape.intermediate_size + (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim * 2) / ranks
    passed = shape.num_layers * rows * (ROW_PASSES * shape.hidden_size + wide) * width
    return StepSeconds(
        weights=weights,
        attention=attention,
        all_reduce=(2 * shape.num_layers + 1) * all_reduce_seconds(device, ranks, rows * shape.hidden_size * width)
        + all_reduce_seconds(device, ranks, logit_rows * shape.vocab_size * width),
        rows=passed / (device.row_bandwidth or device.bandwidth * device.bandwidth_share),
        kernels=kernel_count(model, device.gated_products and rows <= FEW_ROWS) * device.kernel_seconds,
        engine=0.0,
    )


def kernel_count(model: PlannedModel | PlannedHead, gated: bool = False) -> int:
    """Return the number of kernels that a pass runs, one after the other. gated: whether a layer's activation is part
    of the product in front of it."""
    products = LAYER_PRODUCTS * FP8_KERNELS if any(dtype == "fp8" for (_, dtype, *_), _ in _matrices(model, 1)) else 0
    layer = KERNELS_PER_LAYER + products - gated
    if isinstance(model, PlannedHead):
        return layer + HEAD_KERNELS + 3
    return model.shape.num_layers * layer + 3


def all_reduce_seconds(device: Device, ranks: int, size: float) -> float:
    """Return the seconds of an all-reduce of `size` bytes over `ranks` GPUs: 2 log2(n) messages' latency, and 2 (n - 1)
    / n of the bytes over the link (the lower bound in Thakur, Rabenseifner and Gropp, 2005)."""
    if ranks == 1:
        return 0.0
    latency = 2 * log2(ranks) * device.link_latency
    return latency + 2 * (ranks - 1) / ranks * size / (device.link_bandwidth * device.link_share)


def _product(device: Device, dtype: str, params: int, size: int, rows: float) -> float:
    if rows == 0:
        return 0.0
    reading = size / (device.bandwidth * device.bandwidth_share)
    return max(reading, 2.0 * rows * params / device.rate(dtype, max(1, round(rows))))


def _rate_dtype(model: PlannedModel | PlannedHead, dtype: str) -> str:
    """Return the dtype in which a matrix is multiplied; some quantization schemes widen it to the model's dtype, and
    the figures of a CPU have nothing nearer to the products of bytes that blocks need."""
    if dtype in Kind.__members__:
        return model.dtype
    return (SCHEMES[dtype].arithmetic or model.dtype) if dtype in SCHEMES else dtype


_Group = tuple[bool, str, int, int, float]


@lru_cache(maxsize=256)
def _matrices(model: PlannedModel | PlannedHead, ranks: int) -> tuple[tuple[_Group, int], ...]:
    """Return the matrices of a pass, grouped: ((whether it is the head, dtype, params, bytes, share), count)."""
    found = Counter(
        (each.name == HEAD, _rate_dtype(model, each.dtype), each.params, each.bytes, each.share)
        for each in model.matrices(ranks)
    )
    return tuple(found.items())
