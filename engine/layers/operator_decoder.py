"""The decoder that runs everywhere: any layer, operator by operator, with any kernels and attention backend."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any

import torch

from pilotfish.engine.kernels.protocol import Kernels
from pilotfish.engine.layers.attention.backend import AttentionBackend, AttentionBatch, LayerCache
from pilotfish.engine.layers.communicator import Communicator
from pilotfish.engine.layers.decoder import DecoderLayer, LayerShape, Linears, Tap, run_sections


@dataclass(frozen=True, slots=True)
class _Pass:
    positions: torch.Tensor
    batch: AttentionBatch
    given: torch.Tensor | None


class OperatorDecoder:
    def __init__(
        self,
        kernels: Kernels[Any],
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
        step = _Pass(positions, batch, given)

        def run(first: int, stop: int, hidden: torch.Tensor) -> torch.Tensor:
            for layer, cache in zip(self.layers[first:stop], caches[first:stop], strict=True):
                hidden = self._layer(layer, cache, hidden, step)
            return hidden

        return run_sections(run, len(self.layers), hidden, tap)

    def _layer(self, layer: DecoderLayer, cache: LayerCache, hidden: torch.Tensor, step: _Pass) -> torch.Tensor:
        linears, kernels, eps = self._linears, self._kernels, self.shape.eps
        if layer.adapter is not None:
            linears = replace(linears, adapter=layer.adapter, batch=step.batch)
        x = step.given if layer.input_norm is None else kernels.rms_norm(hidden, layer.input_norm, eps)
        assert x is not None, "a layer without an input norm needs a given input"
        attended = self._attend(layer, cache, linears.apply("qkv", x, layer.qkv), step)
        residual = hidden if layer.attention_post_norm is None else None
        change = linears.summed("output", attended, layer.output, residual)
        hidden = self._added(hidden, change, layer.attention_post_norm)
        residual = hidden if layer.mlp_post_norm is None else None
        change = layer.mlp.forward(linears, kernels.rms_norm(hidden, layer.mlp_norm, eps), residual)
        return self._added(hidden, change, layer.mlp_post_norm)

    def _added(self, hidden: torch.Tensor, change: torch.Tensor, post_norm: torch.Tensor | None) -> torch.Tensor:
        """Without a norm after it, `change` has its residual already."""
        return change if post_norm is None else hidden + self._kernels.rms_norm(change, post_norm, self.shape.eps)

    def _attend(self, layer: DecoderLayer, cache: LayerCache, qkv: torch.Tensor, step: _Pass) -> torch.Tensor:
        shape, kernels = self.shape, self._kernels
        heads, kv_heads = shape.heads, shape.kv_heads
        qkv = qkv.view(len(qkv), heads + 2 * kv_heads, shape.head_dim)
        query, key, value = qkv.split((heads, kv_heads, kv_heads), dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            query = kernels.rms_norm(query, layer.q_norm, shape.eps)
            key = kernels.rms_norm(key, layer.k_norm, shape.eps)
            kernels.rotate_(query, step.positions, layer.cos_sin)
            kernels.rotate_(key, step.positions, layer.cos_sin)
            value = value.contiguous()
        else:
            kernels.rotate_(qkv[:, : heads + kv_heads], step.positions, layer.cos_sin)  # both in one call
        return self._attention.attend(query, key, value, cache, step.batch, layer.attention)
