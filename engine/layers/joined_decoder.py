"""The decoder for kernels that have several operators in one launch: what a layer adds to the hidden states is added by
the norm that comes next, which may be the next layer's, and one launch turns queries and keys and fills the cache.

The same arithmetic as `operator_decoder`, rounded at the same places; `choose` has the rule for layers that it knows.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Any

import torch

from pilotfish.engine.kernels.protocol import FusedKernels
from pilotfish.engine.layers.attention.backend import AttentionBackend, AttentionBatch, LayerCache
from pilotfish.engine.layers.communicator import Communicator
from pilotfish.engine.layers.decoder import DecoderLayer, LayerShape, Linears, Tap


class JoinedDecoder:
    def __init__(
        self,
        kernels: FusedKernels[Any],
        attention: AttentionBackend,
        comm: Communicator,
        layers: Seq[DecoderLayer],
        shape: LayerShape,
    ) -> None:
        self.layers, self.shape = layers, shape
        self._kernels, self._attention = kernels, attention
        self._linears = Linears(kernels, comm)

    def forward(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        batch: AttentionBatch,
        caches: list[LayerCache],
        tap: Tap | None = None,
        given: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `Decoder.forward`."""
        add_norm, eps = self._kernels.add_norm, self.shape.eps
        change: torch.Tensor | None = None  # not yet added to `hidden`, nor normed by `post_norm`
        post_norm: torch.Tensor | None = None
        taken = frozenset(tap.layers) if tap is not None else frozenset()
        for i, (layer, cache) in enumerate(zip(self.layers, caches, strict=True)):
            linears = self._linears
            if layer.adapter is not None:
                linears = replace(linears, adapter=layer.adapter, batch=batch)
            hidden, x = add_norm(hidden, change, post_norm, layer.input_norm, eps)
            if tap is not None and i in taken:
                tap.take(i, hidden)
            if layer.input_norm is None and given is not None:
                x = given
            attended = self._attend(layer, cache, linears.apply("qkv", x, layer.qkv), positions, batch)
            change = linears.summed("output", attended, layer.output, None)
            hidden, x = add_norm(hidden, change, layer.attention_post_norm, layer.mlp_norm, eps)
            change, post_norm = layer.mlp.forward(linears, x, None), layer.mlp_post_norm
        hidden, _ = add_norm(hidden, change, post_norm, None, eps)
        if tap is not None and len(self.layers) in taken:
            tap.take(len(self.layers), hidden)
        return hidden

    def _attend(
        self,
        layer: DecoderLayer,
        cache: LayerCache,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        batch: AttentionBatch,
    ) -> torch.Tensor:
        shape = self.shape
        norms = None if layer.q_norm is None or layer.k_norm is None else (layer.q_norm, layer.k_norm)
        qkv = qkv.view(len(qkv), shape.heads + 2 * shape.kv_heads, shape.head_dim)
        query = self._kernels.rotate_and_write(
            *(qkv, shape.kv_heads, norms, positions, layer.cos_sin, shape.eps),
            *((cache.keys, cache.values), batch.slots),
        )
        return self._attention.attend(query, None, None, cache, batch, layer.attention)
