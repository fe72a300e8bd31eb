"""Captured passes (CUDA graphs): the launches of a pass, recorded once for each bucket and replayed as one.

A captured pass computes what it computed at its capture: the same kernels, sizes and addresses. So a bucket's inputs
lie in a static buffer, into which a batch is copied, padded to the bucket; its outputs lie in static buffers as well,
which the next pass of the same model overwrites. `runner` computes eagerly what fits none of the `buckets`.

The buffers are written and read in the order of the device's stream, so a pass may be launched while the one before it
still runs, if everything that reads its outputs was launched before.

Padding never changes other results. Its keys and values go to a block that belongs to no sequence, and a padding span
sees only those. Rows that make a span longer see one more key each, as rows of a draft do; their results go unread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch

from pilotfish.engine.device.transfer import aligned, copy_to
from pilotfish.engine.execution.batch import FlatBatch, HostBatch
from pilotfish.engine.execution.batch_layout import PER_ROW, BatchLayout, BatchShape
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


class EagerGraphs:
    """The twin of CudaGraphs on any device: calls the same function on the same buffers, and captures nothing."""

    name = "eager"

    def capture(self, function: Callable[[], None], inputs: Seq[torch.Tensor], outputs: Seq[torch.Tensor]) -> Replay:
        function()
        return function

    def memory(self) -> int:
        return 0


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
    """Captured in this order, as far as there is memory for them."""
    max_len: int
    """Maximum number of tokens of a sequence."""
    padding_block: int
    """The block of the model's KV cache that belongs to no sequence."""
    memory: int
    """Bytes of captures beyond which no further bucket is captured."""


Pass = Callable[[FlatBatch, torch.Tensor, Seq[torch.Tensor]], Seq[torch.Tensor]]
"""Computes outputs, (rows, ...) each, from a padded batch, its `real_rows` (see `_PaddedLayout`) and other inputs,
(rows, ...) each. All are on the device."""


class GraphedPasses:
    """The captured passes of one model. All ranks of a sharded model capture the same buckets in the same order.

    `inputs`: static buffers for what rows have besides their tokens, (most rows, ...) each. The outputs of `run` are
    static, too, and valid until the next `run`. `captured` has the buckets that were captured, fewest rows first.
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
        self._layouts = {bucket: _PaddedLayout.of(bucket, plan, block_size) for bucket in plan.buckets}
        self._inputs = tuple(inputs)
        self._outputs: tuple[torch.Tensor, ...] | None = None
        self._buffer = torch.zeros(max(layout.size for layout in self._layouts.values()), dtype=torch.uint8)
        self._buffer = self._buffer.to(device)
        self._tensors = {bucket: layout.tensors(self._buffer) for bucket, layout in self._layouts.items()}
        self._replays: dict[Bucket, Replay] = {}
        for bucket in plan.buckets:
            if not _all_agree(plan.backend.memory() < plan.memory, comm, device):
                break
            self._replays[bucket] = self._capture(bucket, function, plan)
        self.captured = tuple(self._replays)
        missing = len(plan.buckets) - len(self.captured)
        logger.info(
            "graphs of %s: %d passes captured, up to %d sequences and %d tokens of each; all graphs take %d MiB%s",
            name,
            len(self.captured),
            max((bucket.spans for bucket in self.captured), default=0),
            max((bucket.length for bucket in self.captured), default=0),
            plan.backend.memory() >> 20,
            f"; {missing} more would exceed cuda_graph_memory ({plan.memory >> 20} MiB)" if missing else "",
        )

    def find(self, host: HostBatch) -> Bucket | None:
        """The captured pass for this batch, if there is one. It depends on the batch alone, so all ranks agree."""
        shape = host.shape
        bucket = fitting(self.captured, shape.spans, max(host.query_lens), shape.rows)
        return bucket if bucket and shape.max_blocks <= self._layouts[bucket].batch.shape.max_blocks else None

    def run(
        self,
        bucket: Bucket,
        host: HostBatch,
        inputs: Seq[torch.Tensor] = (),
        token_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """The outputs of the batch, (rows of the bucket, ...) each.

        inputs: (rows of the batch, ...) each; token_ids: (rows,) on the device, to replace those of a batch with one
        row per span.
        """
        assert self._outputs is not None
        layout = self._layouts[bucket]
        copy_to(layout.fill(host), self._buffer[: layout.size])
        batch, real_rows = self._tensors[bucket]
        rows = host.shape.rows
        for static, given in zip(self._inputs, inputs, strict=True):
            if layout.dense(host):
                static[:rows].copy_(given)
            else:
                static.index_copy_(0, real_rows[:rows], given)
        if token_ids is not None:
            if bucket.length != 1:
                raise ValueError("tokens on the device can be given to passes of one row per span only")
            batch.arrays.token_ids[:rows].copy_(token_ids)
        self._replays[bucket]()
        return tuple(output[: bucket.rows] for output in self._outputs)

    def _capture(self, bucket: Bucket, function: Pass, plan: GraphPlan) -> Replay:
        layout, rows = self._layouts[bucket], bucket.rows
        copy_to(layout.fill(None), self._buffer[: layout.size])
        batch, real_rows = self._tensors[bucket]
        inputs = tuple(static[:rows] for static in self._inputs)
        if self._outputs is None:
            most = max(each.rows for each in plan.buckets)
            made = function(batch, real_rows, inputs)
            self._outputs = tuple(each.new_empty(most, *each.shape[1:]) for each in made)
        outputs = tuple(output[:rows] for output in self._outputs)

        def step() -> None:
            for output, made in zip(outputs, function(batch, real_rows, inputs), strict=True):
                output.copy_(made)

        return plan.backend.capture(step, (self._buffer[: layout.size], *inputs), outputs)


@dataclass(frozen=True, slots=True)
class _PaddedLayout:
    """A bucket's batch in the static buffer: its arrays, and behind them `real_rows`, (rows,) int64: the bucket's row
    of each row of the batch."""

    bucket: Bucket
    batch: BatchLayout
    block_size: int
    padding_block: int

    @staticmethod
    def of(bucket: Bucket, plan: GraphPlan, block_size: int) -> _PaddedLayout:
        # The longest sequence's last span may be padded.
        width = -(-(plan.max_len + bucket.length - 1) // block_size)
        shape = BatchShape(spans=bucket.spans, rows=bucket.rows, wanted=bucket.rows, max_blocks=width)
        return _PaddedLayout(bucket, BatchLayout(shape), block_size, plan.padding_block)

    @property
    def size(self) -> int:
        """Bytes of the batch's arrays, and behind them of `real_rows`."""
        return self.batch.size + aligned(8 * self.bucket.rows)

    def dense(self, host: HostBatch) -> bool:
        """Whether the rows lie in the bucket as they lie in the batch."""
        return host.shape.rows == host.shape.spans * self.bucket.length

    def fill(self, host: HostBatch | None) -> np.ndarray:
        """The buffer of the batch, (size,) uint8, padded to the bucket; None: all of it is padding."""
        length, size = self.bucket.length, self.block_size
        every = np.arange(self.bucket.rows)
        buffer = np.zeros(self.size, dtype=np.uint8)
        arrays = self.batch.on_host(buffer)
        arrays.slots[:] = self.padding_block * size + every % length % size
        arrays.cu_query_lens[:] = np.arange(self.bucket.spans + 1) * length
        arrays.context_lens[:] = length
        arrays.block_tables[:] = self.padding_block
        if host is not None:
            count, given = host.shape.spans, host.arrays
            lengths = np.diff(given.cu_query_lens)
            real = every[: host.shape.rows]
            if not self.dense(host):
                real = real + np.repeat(arrays.cu_query_lens[:count] - given.cu_query_lens[:-1], lengths)
            buffer[self.batch.size :].view(np.int64)[: len(real)] = real
            for name in PER_ROW:
                getattr(arrays, name)[..., real] = getattr(given, name)
            arrays.logit_rows[: host.shape.wanted] = real[given.logit_rows]
            arrays.context_lens[:count] = given.context_lens + (length - lengths)
            used = -(-given.context_lens // size)
            width = host.shape.max_blocks
            own = arrays.block_tables[:count, :width]
            np.copyto(own, given.block_tables, where=np.arange(width) < used[:, None])
        np.cumsum(arrays.context_lens, out=arrays.cu_context_lens[1:])
        return buffer

    def tensors(self, buffer: torch.Tensor) -> tuple[FlatBatch, torch.Tensor]:
        """Views of the static buffer: the batch, and `real_rows`. The lengths that attention reads on the host are
        bounds that hold for every batch."""
        spans, longest = self.bucket.spans, self.batch.shape.max_blocks * self.block_size
        arrays = self.batch.on_device(buffer)
        real_rows = buffer[self.batch.size :].view(torch.int64)[: self.bucket.rows]
        return FlatBatch.of(arrays, [self.bucket.length] * spans, [longest] * spans, self.block_size), real_rows


def _all_agree(willing: bool, comm: Communicator, device: torch.device) -> bool:
    """Whether all ranks are willing, by a collective."""
    if comm.size == 1:
        return willing
    votes = comm.all_reduce(torch.full((1, 1), float(willing), device=device))
    return bool(votes.item() == comm.size)
