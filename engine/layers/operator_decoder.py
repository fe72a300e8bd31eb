"""The decoder that runs everywhere: any layer, operator by operator, with any kernels and attention backend."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from functools import partial
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
        given = hidden if step.given is None else step.given
        x = given if layer.input_norm is None else kernels.rms_norm(hidden, layer.input_norm, eps)
        attended = self._attend(layer, cache, linears.apply("qkv", x, layer.qkv), step)
        hidden = self._added(
            hidden, layer, layer.attention_post_norm, partial(linears.summed, "output", attended, layer.output)
        )
        x = hidden if layer.mlp_norm is None else kernels.rms_norm(hidden, layer.mlp_norm, eps)
        return self._added(hidden, layer, layer.mlp_post_norm, partial(layer.mlp.forward, linears, x))

    def _added(
        self,
        hidden: torch.Tensor,
        layer: DecoderLayer,
        post_norm: torch.Tensor | None,
        change: Callable[[torch.Tensor | None], torch.Tensor],
    ) -> torch.Tensor:
        """The hidden states with the change, which is computed with its residual where nothing comes between them."""
        if post_norm is None and layer.residual_scale == 1.0:
            return change(hidden)
        found = change(None)
        if post_norm is not None:
            found = self._kernels.rms_norm(found, post_norm, self.shape.eps)
        if layer.residual_scale != 1.0:
            found = found * layer.residual_scale
        return hidden + found

    def _attend(self, layer: DecoderLayer, cache: LayerCache, qkv: torch.Tensor, step: _Pass) -> torch.Tensor:
        shape, kernels = self.shape, self._kernels
        heads, kv_heads = shape.heads, shape.kv_heads
        qkv = qkv.view(len(qkv), heads + 2 * kv_heads, shape.head_dim)
        query, key, value = qkv.split((heads, kv_heads, kv_heads), dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            if layer.whole_norms:
                query = self._normed(query, layer.q_norm)
                key = self._normed(key, layer.k_norm)
            else:
                query = kernels.rms_norm(query, layer.q_norm, shape.eps)
                key = kernels.rms_norm(key, layer.k_norm, shape.eps)
            kernels.rotate_(query, step.positions, layer.cos_sin)
            kernels.rotate_(key, step.positions, layer.cos_sin)
            value = value.contiguous()
        else:
            kernels.rotate_(qkv[:, : heads + kv_heads], step.positions, layer.cos_sin)  # both in one call
        return self._attention.attend(query, key, value, cache, step.batch, layer.attention)

    def _normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Queries or keys, (rows, heads, head_dim), all heads normed at once."""
        return self._linears.sharded_rms_norm(x.flatten(1), weight, self.shape.eps).view(x.shape)
