"""Chooses the decoder: the fused or the joined one if it supports the layers, the kernels and the attention backend."""

from __future__ import annotations

import logging
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Any

from pilotfish.engine.kernels.native import NativeBlocks, NativeKernels, NativeLinear
from pilotfish.engine.kernels.protocol import Kernels
from pilotfish.engine.kernels.torch import TorchKernels
from pilotfish.engine.layers.attention.backend import AttentionBackend
from pilotfish.engine.layers.attention.native import NativeAttention
from pilotfish.engine.layers.communicator import Communicator
from pilotfish.engine.layers.decoder import Decoder, DecoderLayer, DenseMlp, LayerShape
from pilotfish.engine.layers.fused_decoder import FusedDecoder
from pilotfish.engine.layers.joined_decoder import JoinedDecoder
from pilotfish.engine.layers.lora import AdaptedDecoder, KernelAdapters, LoadedAdapters
from pilotfish.engine.layers.native_lora import NativeAdapters
from pilotfish.engine.layers.operator_decoder import OperatorDecoder

logger = logging.getLogger(__name__)


def choose_decoder(
    kernels: Kernels[Any],
    attention: AttentionBackend,
    comm: Communicator,
    layers: Seq[DecoderLayer],
    shape: LayerShape,
    adapters: LoadedAdapters | None = None,
) -> Decoder:
    """Return the decoder of these layers, to which `adapters` may be loaded, if given."""
    if adapters is None:
        return _plain(kernels, attention, comm, layers, shape)
    if isinstance(adapters, NativeAdapters) and why_not_fused(kernels, attention, comm, layers) is None:
        assert isinstance(kernels, NativeKernels)
        return FusedDecoder(kernels, layers, shape, adapters)
    adapted = [replace(layer, adapter=own) for layer, own in zip(layers, adapters.layers, strict=True)]
    plain = _plain(kernels, attention, comm, layers, shape)
    return AdaptedDecoder(plain, OperatorDecoder(kernels, attention, comm, adapted, shape))


def choose_adapters(kernels: Kernels[Any], layers: int) -> LoadedAdapters:
    """Return what computes with low-rank adapters, by these kernels, in so many layers."""
    return NativeAdapters(kernels, layers) if isinstance(kernels, NativeKernels) else KernelAdapters(kernels, layers)


def _plain(
    kernels: Kernels[Any],
    attention: AttentionBackend,
    comm: Communicator,
    layers: Seq[DecoderLayer],
    shape: LayerShape,
) -> Decoder:
    if isinstance(kernels, TorchKernels) and kernels.fuses:
        reason = why_not_joined(attention, layers)
        if reason is None:
            return JoinedDecoder(kernels, attention, comm, layers, shape)
    else:
        reason = why_not_fused(kernels, attention, comm, layers)
    if reason is not None:
        logger.debug("decoder: operator by operator, since %s", reason)
        return OperatorDecoder(kernels, attention, comm, layers, shape)
    assert isinstance(kernels, NativeKernels)
    return FusedDecoder(kernels, layers, shape)


def why_not_joined(attention: AttentionBackend, layers: Seq[DecoderLayer]) -> str | None:
    """Return why `JoinedDecoder` cannot compute these layers, or None if it can."""
    if isinstance(attention, NativeAttention):
        return "the native attention's cache has a layout of its own"
    for i, layer in enumerate(layers):
        if layer.whole_norms:
            return f"layer {i} norms all heads of a query at once"
        if layer.residual_scale != 1.0:
            return f"layer {i} scales what it adds to the hidden states"
        if (layer.q_norm is None) != (layer.k_norm is None):
            return f"layer {i} has a norm of query or key alone"
    return None


def why_not_fused(
    kernels: Kernels[Any], attention: AttentionBackend, comm: Communicator, layers: Seq[DecoderLayer]
) -> str | None:
    """Return why `FusedDecoder` cannot compute these layers, or None if it can."""
    if not isinstance(kernels, NativeKernels):
        return f"the kernels are {kernels.name!r}, not 'native'"
    if not isinstance(attention, NativeAttention):
        return f"the attention backend is {attention.name!r}, not 'native'"
    if comm.size > 1:
        return f"the model is sharded over {comm.size} ranks"
    reasons = (_why_not(layer, layers[0]) for layer in layers)
    return next((f"layer {i} {reason}" for i, reason in enumerate(reasons) if reason), None)


def _why_not(layer: DecoderLayer, first: DecoderLayer) -> str | None:
    if layer.adapter is not None:
        return "has an adapter"
    if not isinstance(layer.mlp, DenseMlp):
        return f"has an MLP that is not dense ({type(layer.mlp).__name__})"
    for weight in (layer.qkv, layer.output, layer.mlp.gate_up, layer.mlp.down):
        if not isinstance(weight, NativeLinear | NativeBlocks):
            return f"has a linear of another kind ({type(weight).__name__})"
    if (layer.q_norm is None) != (layer.k_norm is None):
        return "has a norm of query or key alone"
    if layer.attention.softcap:
        return "caps attention scores"
    if layer.attention.sinks is not None:
        return "has attention sinks"
    if layer.mlp_norm is None:
        return "has no norm before its MLP"
    if layer.whole_norms:
        return "norms all heads of a query at once"
    if layer.residual_scale != 1.0:
        return "scales what it adds to the hidden states"
    assert isinstance(first.mlp, DenseMlp)
    if (layer.mlp.gate, layer.attention.scale) != (first.mlp.gate, first.attention.scale):
        return "has another gate or attention scale than layer 0"
    return None
