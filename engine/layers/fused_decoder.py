"""The fused decoder: all layers in one call into the native kernels (decoder.h), on the CPU in float32.

It gives the bits of `OperatorDecoder` without the time that Python takes between two kernels. `choose` has the rule for
the layers that it supports.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence as Seq
from ctypes import c_float, c_int64, c_void_p

import torch

from pilotfish.engine.kernels.native import (
    ACTIVATION_FLOATS,
    CACHE_FORMS,
    GROUP,
    NativeBlocks,
    NativeKernels,
    NativeLinear,
    address,
)
from pilotfish.engine.kernels.protocol import PreparedLinear
from pilotfish.engine.layers.attention.backend import AttentionBatch, LayerCache
from pilotfish.engine.layers.decoder import DecoderLayer, DenseMlp, LayerShape, Mlp, Tap, run_sections
from pilotfish.engine.layers.native_lora import NativeAdapters


class FusedDecoder:
    def __init__(
        self,
        kernels: NativeKernels,
        layers: Seq[DecoderLayer],
        shape: LayerShape,
        adapters: NativeAdapters | None = None,
    ) -> None:
        self.layers, self.shape = layers, shape
        self._kernels, self._adapters = kernels, adapters
        self._structs = (_Layer * len(layers))(*(_layer(layer) for layer in layers))
        if adapters is not None:
            for struct, own in zip(self._structs, adapters.layers, strict=True):
                for name in ("qkv", "output", "gate_up", "down"):
                    setattr(struct, f"{name}_change", ctypes.addressof(own.linear(name).struct))
        self._caches: list[LayerCache] | None = None  # those whose addresses are in the structs
        mlps = [_dense(layer.mlp) for layer in layers]
        self._gelu, self._scale = mlps[0].gate == "gelu", layers[0].attention.scale
        size, gated = layers[0].output.out_features, max(mlp.down.in_features for mlp in mlps)
        inputs = [
            weight.in_features for layer in layers for weight in _weights(layer) if isinstance(weight, NativeBlocks)
        ]
        # Floats a row, of what `decoder.h` computes with.
        self.activations = ACTIVATION_FLOATS * (max(inputs, default=0) // GROUP)
        self.space = kernels.decoder_space(size, shape.heads, shape.kv_heads, shape.head_dim, gated)

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
        self._bind(caches)
        hidden = hidden.clone(memory_format=torch.contiguous_format)
        rows, size = hidden.shape
        shape = self.shape
        dtype = caches[0].keys.dtype
        scratch = self._kernels.attention_scratch(rows, max(batch.contexts), shape.heads, shape.head_dim, dtype)
        space, activations = torch.empty(rows, self.space), torch.empty(rows, self.activations)
        adapted = None
        if batch.adapters:
            assert self._adapters is not None
            adapted = self._adapters.of_pass(batch)
        step = _Step(
            hidden=hidden.data_ptr(),
            input=address(given),
            space=space.data_ptr(),
            activations=activations.data_ptr(),
            scratch=scratch.data_ptr(),
            cu_query_lens=batch.cu_query_lens.data_ptr(),
            context_lens=batch.context_lens.data_ptr(),
            block_tables=batch.block_tables.data_ptr(),
            positions=positions.data_ptr(),
            slots=batch.slots.data_ptr(),
            rows=rows,
            size=size,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            dim=shape.head_dim,
            spans=len(batch.query_lens),
            max_blocks=batch.block_tables.shape[1],
            block_size=batch.block_size,
            form=CACHE_FORMS[dtype],
            gelu=self._gelu,
            adapted=None if adapted is None else ctypes.addressof(adapted.struct),
            scale=self._scale,
            eps=shape.eps,
        )

        def run(first: int, stop: int, hidden: torch.Tensor) -> torch.Tensor:
            """In place: `step` has the address of the hidden states."""
            self._kernels.decode(ctypes.byref(self._structs, first * ctypes.sizeof(_Layer)), stop - first, step)
            return hidden

        return run_sections(run, len(self.layers), hidden, tap)

    def bound(self, caches: list[LayerCache]) -> int:
        """Return the address of the layers' structures, with these caches from now on."""
        self._bind(caches)
        return ctypes.addressof(self._structs)

    def _bind(self, caches: list[LayerCache]) -> None:
        """Set the caches' addresses; a runner passes the same list at every pass."""
        if self._caches is caches:
            return
        for struct, cache in zip(self._structs, caches, strict=True):
            struct.keys, struct.values = cache.keys.data_ptr(), cache.values.data_ptr()
        self._caches = caches


class Weight(ctypes.Structure):
    """`struct weight` of decoder.h; the structures below have the names of theirs there, too."""

    _fields_ = (
        *((name, c_void_p) for name in ("packed", "scale", "bias")),
        *((name, c_int64) for name in ("columns", "in_features")),
        ("parts", c_void_p),
        ("count", c_int64),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("input_norm", "mlp_norm", "q_norm", "k_norm")),
        *((name, c_void_p) for name in ("attention_post_norm", "mlp_post_norm", "cos_sin", "keys", "values")),
        *((name, Weight) for name in ("qkv", "output", "gate_up", "down")),
        ("window", c_int64),
        *((name, c_void_p) for name in ("qkv_change", "output_change", "gate_up_change", "down_change")),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("hidden", "input", "space", "activations", "scratch", "cu_query_lens")),
        *((name, c_void_p) for name in ("context_lens", "block_tables", "positions", "slots")),
        *((name, c_int64) for name in ("rows", "size", "heads", "kv_heads", "dim", "spans", "max_blocks")),
        *((name, c_int64) for name in ("block_size", "form", "gelu")),
        ("adapted", c_void_p),
        *((name, c_float) for name in ("scale", "eps")),
    )


def _layer(layer: DecoderLayer) -> _Layer:
    mlp = _dense(layer.mlp)
    return _Layer(
        input_norm=address(layer.input_norm),
        mlp_norm=address(layer.mlp_norm),
        q_norm=address(layer.q_norm),
        k_norm=address(layer.k_norm),
        attention_post_norm=address(layer.attention_post_norm),
        mlp_post_norm=address(layer.mlp_post_norm),
        cos_sin=address(layer.cos_sin),
        qkv=weight_of(layer.qkv),
        output=weight_of(layer.output),
        gate_up=weight_of(mlp.gate_up),
        down=weight_of(mlp.down),
        window=layer.attention.window or 0,
    )


def _weights(layer: DecoderLayer) -> tuple[PreparedLinear, ...]:
    mlp = _dense(layer.mlp)
    return layer.qkv, layer.output, mlp.gate_up, mlp.down


def _dense(mlp: Mlp) -> DenseMlp:
    assert isinstance(mlp, DenseMlp)
    return mlp


def weight_of(prepared: PreparedLinear) -> Weight:
    """Return a matrix as decoder.h reads it. The caller keeps the matrix."""
    if isinstance(prepared, NativeBlocks):
        return Weight(
            bias=address(prepared.bias),
            columns=prepared.out_features,
            in_features=prepared.in_features,
            parts=ctypes.addressof(prepared.parts),
            count=len(prepared.parts),
        )
    assert isinstance(prepared, NativeLinear)
    return Weight(
        packed=prepared.packed.data_ptr(),
        scale=address(prepared.scale),
        bias=address(prepared.bias),
        columns=prepared.out_features,
        in_features=prepared.in_features,
    )
