"""Attention for GPUs where a backend leaves a long context to one multiprocessor: it computes what keeps the GPU busy,
and another one, which divides contexts, computes the rest.

flash-attn-4 does not split contexts on Hopper: each span and key-value head is one program, whatever its length. On an
H200 (132 multiprocessors, 8 key-value heads) one row at 8k tokens took it 100 us and the Triton kernels 31, at 128k
1,366 and 229; for 64 sequences of 2k it took 157 us and they 218, and for a prompt of 2k 101 and 176
(benchmarks/results/gpu/h200/flash4.json).
"""

from __future__ import annotations

import torch

from pilotfish.engine.layers.attention.backend import AttentionBackend, AttentionBatch, AttentionParams, LayerCache

SHORT = 64
"""Most rows of a span for which a context is divided; longer ones have tiles enough to keep the GPU busy."""


class UnsplitAttention:
    """whole: the backend that does not split, whose cache, name and block size are used; divided: the one that does,
    which reads the same cache; processors: multiprocessors of the device.

    The choice follows from the batch's bounds alone, so a captured pass replays the one that it was captured with.
    """

    capturable = True

    def __init__(self, whole: AttentionBackend, divided: AttentionBackend, processors: int) -> None:
        self.name, self.block_size = whole.name, whole.block_size
        self.allocate, self.store = whole.allocate, whole.store
        self._whole, self._divided, self._processors = whole, divided, processors

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        cache: LayerCache,
        batch: AttentionBatch,
        params: AttentionParams,
    ) -> torch.Tensor:
        programs = len(batch.query_lens) * cache.keys.shape[2]
        few = max(batch.query_lens) <= SHORT and programs < self._processors
        chosen = self._divided if few else self._whole
        return chosen.attend(query, key, value, cache, batch, params)
