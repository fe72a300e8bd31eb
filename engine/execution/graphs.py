"""Captured passes (CUDA graphs): the launches of a pass, recorded once for each bucket and replayed as one.

A captured pass computes what it computed at its capture: the same kernels, sizes and addresses. So a bucket's inputs
lie in static buffers, into which a batch is copied, padded to the bucket; its outputs lie in static buffers as well,
which the next pass of the same model overwrites. `runner` computes eagerly what fits none of the `buckets`.

The buffers are written and read in the order of the device's stream, so a pass may be launched while the one before it
still runs, if everything that reads its outputs was launched before.

Padding never changes other results. Its rows stand behind the batch's, in spans of their own, which see nothing but
each other; its keys and values go to a block that belongs to no sequence.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import torch

from pilotfish.engine.device.transfer import copy_to
from pilotfish.engine.execution.batch import FlatBatch, HostBatch
from pilotfish.engine.execution.batch_layout import PER_ROW, PER_WANTED, BatchLayout, BatchShape
from pilotfish.engine.execution.buckets import Bucket, fitting
from pilotfish.engine.layers.attention.backend import AttentionBackend
from pilotfish.engine.layers.communicator import Communicator

logger = logging.getLogger(__name__)

Replay = Callable[[], None]

WARM_UPS = 2
"""Passes before a capture: kernels are compiled in the first, and workspaces settle."""


class GraphBackend(Protocol):
    """Records what a function does to tensors that stay where they are, and replays it."""

    name: str

    def capture(self, function: Callable[[], None], inputs: Seq[torch.Tensor], outputs: Seq[torch.Tensor]) -> Replay:
        """Record `function`, which reads `inputs`, which are filled, and writes `outputs`. It neither waits for the
        device nor reads from it; the recording fixes everything on the host. It may be called several times."""
        ...

    def memory(self) -> int:
        """Bytes that captures have taken since the backend was made."""
        ...

    def drop(self) -> None:
        """Free the memory of captures that were dropped: nothing refers to their replays any more."""
        ...


class CudaGraphs:
    """torch.cuda.CUDAGraph. All graphs share a pool of memory, which is safe since they are replayed on the same
    stream, one at a time."""

    name = "cuda"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        self._free = torch.cuda.mem_get_info(device)[0]

    def capture(self, function: Callable[[], None], inputs: Seq[torch.Tensor], outputs: Seq[torch.Tensor]) -> Replay:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                function()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads, such as NCCL's watchdog, may call CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            function()
        return graph.replay

    def memory(self) -> int:
        return max(0, self._free - torch.cuda.mem_get_info(self._device)[0])

    def drop(self) -> None:
        gc.collect()
        # What was dropped may have emptied the pool, which torch then gives up.
        self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.empty_cache()


class EagerGraphs:
    """The twin of CudaGraphs on any device: calls the same function on the same buffers, and captures nothing."""

    name = "eager"

    def capture(self, function: Callable[[], None], inputs: Seq[torch.Tensor], outputs: Seq[torch.Tensor]) -> Replay:
        function()
        return function

    def memory(self) -> int:
        return 0

    def drop(self) -> None:
        return


def graph_backend(
    enforce_eager: bool, attention: AttentionBackend, device: torch.device
) -> Callable[[], GraphBackend] | None:
    """Returns what makes the backend, to be called once all else is in memory; None if every pass is to be eager."""
    if enforce_eager or device.type != "cuda":
        return None
    if not attention.capturable:
        logger.warning("graphs: none, since attention is %r, which looks at each sequence on the host", attention.name)
        return None
    return partial(CudaGraphs, device)


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphPlan:
    """The passes of a model that are to be captured."""

    backend: GraphBackend
    buckets: tuple[Bucket, ...]
    """In ascending order."""
    max_len: int
    """Maximum number of tokens of a sequence."""
    padding_block: int
    """The block of the model's KV cache that belongs to no sequence."""
    memory: int
    """Bytes that captures may take in all."""


class PassOutputs(NamedTuple):
    """What a pass computes: tensors of (rows whose logits are wanted, ...), and of (rows, ...)."""

    wanted: tuple[torch.Tensor, ...]
    rows: tuple[torch.Tensor, ...] = ()


Pass = Callable[[FlatBatch, Seq[torch.Tensor]], PassOutputs]
"""Computes outputs from a padded batch and other inputs, (rows, ...) each. All are on the device."""


class GraphedPasses:
    """The captured passes of one model. All ranks of a sharded model capture the same buckets in the same order.

    The largest pass is captured first, so that the smaller ones find their memory in the pool. If captures take more
    than the plan allows, all are dropped, and captured again without the larger half.

    `inputs`: static buffers for what rows have besides their tokens, (most rows, ...) each. The outputs of `run` are
    static, too, and valid until the next `run`. `captured` has the buckets that were captured, in ascending order.
    """

    def __init__(
        self,
        name: str,
        function: Pass,
        plan: GraphPlan,
        block_size: int,
        device: torch.device,
        comm: Communicator,
        inputs: Seq[torch.Tensor] = (),
    ) -> None:
        self._padded = _Padding(block_size, plan.padding_block)
        # The longest sequence's last block may be reached by rows of drafts.
        self._width = -(-(plan.max_len + max((each.length for each in plan.buckets), default=0)) // block_size)
        self._inputs = tuple(inputs)
        self._outputs: PassOutputs | None = None
        spans = max((each.spans + each.spare for each in plan.buckets), default=0)
        self._tables = torch.zeros(spans, self._width, dtype=torch.int32, device=device)
        size = max((self._padded.layout(each, self._width).size for each in plan.buckets), default=0)
        self._buffer = torch.zeros(size, dtype=torch.uint8, device=device)
        self._batches: dict[Bucket, FlatBatch] = {}
        self._replays: dict[Bucket, Replay] = {}
        self.captured: tuple[Bucket, ...] = ()
        """The captured buckets, in ascending order."""
        wanted = plan.buckets
        while wanted and not self._capture_all(wanted, function, plan, comm, device):
            self._replays.clear()
            self._outputs = None
            plan.backend.drop()
            wanted = tuple(bucket for bucket in wanted if 2 * bucket.rows <= wanted[-1].rows)
        self.captured = wanted
        missing = len(plan.buckets) - len(wanted)
        logger.info(
            "graphs of %s: %d passes captured, up to %d sequences and %d rows; all graphs take %d MiB%s",
            name,
            len(wanted),
            max((bucket.spans for bucket in wanted), default=0),
            max((bucket.rows for bucket in wanted), default=0),
            plan.backend.memory() >> 20,
            f"; {missing} larger ones would exceed cuda_graph_memory ({plan.memory >> 20} MiB)" if missing else "",
        )

    def find(self, host: HostBatch) -> Bucket | None:
        """The captured pass for this batch, if there is one. It depends on the batch alone, so all ranks agree."""
        shape = host.shape
        if shape.max_blocks > self._width:
            return None
        return fitting(self.captured, shape.spans, max(host.query_lens), shape.rows, shape.wanted)

    def why_not(self, host: HostBatch) -> str:
        """Why no captured pass fits, as a word for metrics: "logits" of too many rows are wanted, or the pass is too
        large, or has too many sequences: "size"."""
        shape = host.shape
        fewer = fitting(self.captured, shape.spans, max(host.query_lens), shape.rows, min(shape.wanted, shape.spans))
        return "logits" if fewer is not None and shape.max_blocks <= self._width else "size"

    def run(
        self,
        bucket: Bucket,
        host: HostBatch,
        inputs: Seq[torch.Tensor] = (),
        token_ids: torch.Tensor | None = None,
    ) -> PassOutputs:
        """The outputs of the batch; of (rows of the bucket, ...), whose first ones are the batch's.

        inputs: (rows of the batch, ...) each; token_ids: (rows,) on the device, to replace those of a batch with one
        row per span.
        """
        assert self._outputs is not None
        rows = host.shape.rows
        if token_ids is not None and rows != host.shape.spans:
            raise ValueError("tokens on the device can be given to passes of one row per span only")
        self._fill(bucket, host)
        for static, given in zip(self._inputs, inputs, strict=True):
            static[:rows].copy_(given)
        if token_ids is not None:
            self._batches[bucket].arrays.token_ids[:rows].copy_(token_ids)
        self._replays[bucket]()
        return self._outputs

    def _capture_all(
        self, wanted: Seq[Bucket], function: Pass, plan: GraphPlan, comm: Communicator, device: torch.device
    ) -> bool:
        """Capture these buckets; returns whether they take no more memory than they may."""
        for bucket in reversed(wanted):
            self._replays[bucket] = self._capture(bucket, function, plan, wanted)
            if not _all_agree(plan.backend.memory() <= plan.memory, comm, device):
                return False
        return True

    def _capture(self, bucket: Bucket, function: Pass, plan: GraphPlan, wanted: Seq[Bucket]) -> Replay:
        self._fill(bucket, None)
        spans = bucket.spans + bucket.spare
        fixed = self._padded.layout(bucket, 0)
        arrays = fixed.on_device(self._buffer)
        tables = self._tables[:spans]
        longest = self._width * self._padded.block_size
        self._batches[bucket] = batch = FlatBatch.bounded(
            arrays, tables, bucket.length, longest, self._padded.block_size
        )
        inputs = tuple(static[: bucket.rows] for static in self._inputs)
        if self._outputs is None:
            made = function(batch, inputs)
            self._outputs = PassOutputs(
                tuple(each.new_empty(max(b.wanted for b in wanted), *each.shape[1:]) for each in made.wanted),
                tuple(each.new_empty(max(b.rows for b in wanted), *each.shape[1:]) for each in made.rows),
            )
        outputs = tuple(
            output[:count]
            for part, count in zip(self._outputs, (bucket.wanted, bucket.rows), strict=True)
            for output in part
        )

        def step() -> None:
            made = function(batch, inputs)
            for output, each in zip(outputs, (*made.wanted, *made.rows), strict=True):
                output.copy_(each)

        return plan.backend.capture(step, (self._buffer[: fixed.size], tables, *inputs), outputs)

    def _fill(self, bucket: Bucket, host: HostBatch | None) -> None:
        """Copy the batch, padded to the bucket, to the static buffers: all of it by one copy to the device, and the
        block tables from there to the table's rows."""
        packed, width = self._padded.fill(bucket, host)
        copy_to(packed, self._buffer[: len(packed)])
        spans = bucket.spans + bucket.spare
        given = self._padded.layout(bucket, width).on_device(self._buffer).block_tables
        self._tables[:spans, :width].copy_(given)


@dataclass(frozen=True, slots=True)
class _Padding:
    """Pads batches to buckets, for a cache with blocks of `block_size` tokens, of which `block` is no sequence's."""

    block_size: int
    block: int

    def layout(self, bucket: Bucket, width: int) -> BatchLayout:
        """The layout of padded batches with block tables of this width. The tables are the last array, so the others
        lie at the same place whatever the width."""
        spans = bucket.spans + bucket.spare
        return BatchLayout(BatchShape(spans=spans, rows=bucket.rows, wanted=bucket.wanted, max_blocks=width))

    def fill(self, bucket: Bucket, host: HostBatch | None) -> tuple[np.ndarray, int]:
        """The batch padded to the bucket, (bytes,) uint8, and the width of its block tables; None: all is padding."""
        size = self.block_size
        spans, rows = (0, 0) if host is None else (host.shape.spans, host.shape.rows)
        padding = bucket.rows - rows
        width = max(0 if host is None else host.shape.max_blocks, -(-min(padding, bucket.length) // size))
        layout = self.layout(bucket, width)
        buffer = np.zeros(layout.size, dtype=np.uint8)
        arrays = layout.on_host(buffer)
        ends = arrays.cu_query_lens
        ends[spans:] = rows + bucket.length * np.arange(bucket.spans + bucket.spare + 1 - spans)
        np.minimum(ends, bucket.rows, out=ends)
        arrays.context_lens[spans:] = np.diff(ends[spans:])
        arrays.block_tables[spans:] = self.block
        arrays.slots[rows:] = self.block * size + np.arange(padding) % bucket.length % size
        if host is not None:
            given = host.arrays
            ends[:spans] = given.cu_query_lens[:-1]
            for name in PER_ROW:
                getattr(arrays, name)[..., :rows] = getattr(given, name)
            for name in PER_WANTED:
                getattr(arrays, name)[: host.shape.wanted] = getattr(given, name)
            arrays.context_lens[:spans] = given.context_lens
            arrays.block_tables[:spans, : host.shape.max_blocks] = given.block_tables
        np.cumsum(arrays.context_lens, out=arrays.cu_context_lens[1:])
        return buffer, width


def _all_agree(willing: bool, comm: Communicator, device: torch.device) -> bool:
    """Whether all ranks are willing, by a collective."""
    if comm.size == 1:
        return willing
    votes = comm.all_reduce(torch.full((1, 1), float(willing), device=device))
    return bool(votes.item() == comm.size)
