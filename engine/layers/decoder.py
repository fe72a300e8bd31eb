"""A decoder's layers in one call into the native kernels (decoder.h), where nothing but them is needed: the CPU in
float32, a model that is not divided. To the same bits as the operators one by one, which the models spell out."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence as Seq
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from pilotfish.engine.kernels.native import NativeInt8Linear, NativeKernels, NativeLinear
from pilotfish.engine.kernels.protocol import Kernels, PreparedLinear
from pilotfish.engine.layers.attention.backend import AttentionBackend, AttentionBatch, LayerCache
from pilotfish.engine.layers.attention.native import NativeAttention
from pilotfish.engine.layers.communicator import Communicator


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One layer's weights. None: norms that the architecture has not."""

    input_norm: torch.Tensor | None
    qkv: PreparedLinear  # query, key and value heads in this order
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    output: PreparedLinear
    attention_post_norm: torch.Tensor | None  # of what attention adds to the hidden states
    mlp_norm: torch.Tensor
    gate_up: PreparedLinear  # gate, then up
    down: PreparedLinear
    mlp_post_norm: torch.Tensor | None
    cos_sin: torch.Tensor  # (max_positions, head_dim) float32; shared by the layers of a kind
    window: int | None


@dataclass(frozen=True, slots=True)
class LayerShape:
    heads: int
    kv_heads: int
    head_dim: int
    gate: Literal["silu", "gelu"]
    attention_scale: float
    eps: float


class Tap(Protocol):
    """Looks at hidden states on their way (`engine.models.features`)."""

    @property
    def layers(self) -> Seq[int]: ...

    def take(self, layer: int, hidden: torch.Tensor) -> None:
        """`hidden` is what enters `layer`, one of `layers`."""
        ...


def native_decoder(
    kernels: Kernels[Any],
    attention: AttentionBackend,
    comm: Communicator,
    layers: Seq[DecoderLayer],
    shape: LayerShape,
) -> NativeDecoder | None:
    """None where the operators are to be called one by one."""
    if not isinstance(kernels, NativeKernels) or not isinstance(attention, NativeAttention) or comm.size > 1:
        return None
    return NativeDecoder(kernels, layers, shape)


class NativeDecoder:
    def __init__(self, kernels: NativeKernels, layers: Seq[DecoderLayer], shape: LayerShape) -> None:
        self._kernels = kernels
        self._weights = tuple(layers)  # what the addresses below are of
        self._shape = shape
        self._layers = (_Layer * len(layers))(*(_layer(weights) for weights in layers))
        self._caches: list[LayerCache] | None = None
        size, gated = layers[0].output.out_features, max(weights.down.in_features for weights in layers)
        self._space = kernels.decoder_space(size, shape.heads, shape.kv_heads, shape.head_dim, gated)

    def forward(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        batch: AttentionBatch,
        caches: list[LayerCache],
        tap: Tap | None = None,
        given: torch.Tensor | None = None,
    ) -> None:
        """`hidden`, (rows, hidden_size) contiguous, becomes what leaves the last layer.

        given: (rows, in_features of qkv) contiguous, what attention reads in the place of the hidden states' norm, for
        one layer that has no such norm.
        """
        self._read(caches)
        rows, size = hidden.shape
        shape = self._shape
        longest = -(-max(batch.contexts) // batch.block_size) * batch.block_size
        space, scratch = torch.empty(rows, self._space), self._kernels.attention_scratch(longest)
        step = _Step(
            hidden=hidden.data_ptr(),
            input=None if given is None else given.data_ptr(),
            space=space.data_ptr(),
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
            scratch_size=longest,
            gelu=shape.gate == "gelu",
            scale=shape.attention_scale,
            eps=shape.eps,
        )
        first, count = 0, len(self._layers)
        for stop in sorted({count, *(tap.layers if tap else ())}):
            self._kernels.decode(ctypes.byref(self._layers, first * ctypes.sizeof(_Layer)), stop - first, step)
            if tap is not None:
                tap.take(stop, hidden)
            first = stop

    def _read(self, caches: list[LayerCache]) -> None:
        """A runner gives the same list at every pass."""
        if self._caches is caches:
            return
        for layer, cache in zip(self._layers, caches, strict=True):
            layer.keys, layer.values = cache.keys.data_ptr(), cache.values.data_ptr()
        self._caches = caches


class _Weight(ctypes.Structure):
    """`struct weight` of decoder.h; the other structures' names are theirs, too."""

    _fields_ = (
        *((name, c_void_p) for name in ("packed", "scale", "bias")),
        *((name, c_int64) for name in ("columns", "in_features")),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("input_norm", "mlp_norm", "q_norm", "k_norm")),
        *((name, c_void_p) for name in ("attention_post_norm", "mlp_post_norm", "cos_sin", "keys", "values")),
        *((name, _Weight) for name in ("qkv", "output", "gate_up", "down")),
        ("window", c_int64),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("hidden", "input", "space", "scratch", "cu_query_lens")),
        *((name, c_void_p) for name in ("context_lens", "block_tables", "positions", "slots")),
        *((name, c_int64) for name in ("rows", "size", "heads", "kv_heads", "dim", "spans", "max_blocks")),
        *((name, c_int64) for name in ("block_size", "scratch_size", "gelu")),
        *((name, c_float) for name in ("scale", "eps")),
    )


def _layer(weights: DecoderLayer) -> _Layer:
    return _Layer(
        input_norm=_address(weights.input_norm),
        mlp_norm=_address(weights.mlp_norm),
        q_norm=_address(weights.q_norm),
        k_norm=_address(weights.k_norm),
        attention_post_norm=_address(weights.attention_post_norm),
        mlp_post_norm=_address(weights.mlp_post_norm),
        cos_sin=_address(weights.cos_sin),
        qkv=_weight(weights.qkv),
        output=_weight(weights.output),
        gate_up=_weight(weights.gate_up),
        down=_weight(weights.down),
        window=weights.window or 0,
    )


def _weight(prepared: PreparedLinear) -> _Weight:
    assert isinstance(prepared, NativeLinear | NativeInt8Linear)
    scale = prepared.scale if isinstance(prepared, NativeInt8Linear) else None
    return _Weight(
        packed=prepared.packed.data_ptr(),
        scale=_address(scale),
        bias=_address(prepared.bias),
        columns=prepared.out_features,
        in_features=prepared.in_features,
    )


def _address(tensor: torch.Tensor | None) -> int | None:
    if tensor is None:
        return None
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    return tensor.data_ptr()
