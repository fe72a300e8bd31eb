"""WholeDrafts: a head's drafts in one call into the native kernels (draft.h), on the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence as Seq
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass

import numpy as np
import torch

from pilotfish.engine.execution.batch import Span, pack
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
from pilotfish.engine.layers.attention.backend import LayerCache
from pilotfish.engine.layers.fused_decoder import FusedDecoder, Weight, weight_of
from pilotfish.engine.models.eagle3 import Eagle3Model
from pilotfish.engine.sampling.noise import row_keys


@dataclass(frozen=True, slots=True)
class WantedDraft:
    """The draft that a span begins."""

    limit: int
    """Its most tokens, at least 1."""
    floor: float
    """It ends once the product of its tokens' chances is below."""
    position: int
    """Index of its first token, in tokens from the start of the prompt."""
    seed: int
    temperature: float
    """0: each token is the likeliest. Truncation (top_p and its like) is left to the target: it would take longer than
    the tokens that are drawn in vain."""


@dataclass(frozen=True, slots=True)
class WholeDraft:
    tokens: list[int]
    chances: list[float]


class WholeDrafts:
    """`grow` gives the drafts of `models.eagle3.Eagle3Model` and `drafters.growth.Growth`. See `whole_drafts`."""

    def __init__(self, model: Eagle3Model, decoder: FusedDecoder, cache: LayerCache, block_size: int) -> None:
        assert isinstance(model.kernels, NativeKernels)
        self._kernels, self._cache, self._block_size = model.kernels, cache, block_size
        self._model = model  # keeps what the structure points to
        ids = None if model.target_ids is None else model.target_ids.to(torch.int32)
        self._ids, shape = ids, decoder.shape
        widest = [
            ACTIVATION_FLOATS * (weight.in_features // GROUP)
            for weight in (model.fusion, model.head)
            if isinstance(weight, NativeBlocks)
        ]
        self._head = _Head(
            fusion=weight_of(model.fusion),
            embedding=weight_of(model.embedding),
            head=weight_of(model.head),
            embedding_norm=address(model.embedding_norm),
            hidden_norm=address(model.hidden_norm),
            norm=address(model.norm),
            layer=decoder.bound([cache]),
            target_ids=None if ids is None else ids.data_ptr(),
            size=model.config.decoder.hidden_size,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            dim=shape.head_dim,
            space=decoder.space,
            activations=max(decoder.activations, *widest, 0),
            normed_residual=model.config.norm_before_residual,
            scale=decoder.layers[0].attention.scale,
            eps=shape.eps,
        )

    def grow(
        self, spans: Seq[Span], features: torch.Tensor, wanted: Seq[WantedDraft | None]
    ) -> tuple[list[WholeDraft], list[int]]:
        """Compute the spans, whose rows have these features of the target, (rows, layers * target_hidden_size), and
        grow a draft from the last row of each that begins one. Its blocks have room for the draft.

        Returns a draft for each span, and the rows of each pass after the first.
        """
        most = max((draft.limit for draft in wanted if draft is not None), default=1)
        host, count, form = pack(spans, self._block_size, ahead=most), len(spans), CACHE_FORMS[self._cache.keys.dtype]
        arrays, context = host.arrays, max(host.contexts) + most
        limits = np.zeros(count, np.int64)
        floors, temperatures = np.zeros(count, np.float32), np.zeros(count, np.float32)
        keys = np.zeros((count, most), np.int64)
        for i, draft in enumerate(wanted):
            if draft is None:
                continue
            limits[i], floors[i], temperatures[i] = draft.limit, draft.floor, draft.temperature
            if draft.temperature:
                keys[i] = row_keys([draft.seed] * most, np.arange(draft.position, draft.position + most))
        tokens, counts = np.empty((count, most), np.int64), np.empty(count, np.int64)
        chances, passes = np.empty((count, most), np.float32), np.empty(most, np.int64)
        shape = host.shape
        size = self._kernels.draft_space(self._head, shape.rows, count, shape.max_blocks, context, form)
        space, features = torch.empty(size + 64, dtype=torch.uint8), features.contiguous()
        step = _Drafting(
            features=address(features),
            tokens=arrays.token_ids.ctypes.data,
            positions=arrays.positions.ctypes.data,
            slots=arrays.slots.ctypes.data,
            cu_query_lens=arrays.cu_query_lens.ctypes.data,
            context_lens=arrays.context_lens.ctypes.data,
            block_tables=arrays.block_tables.ctypes.data,
            rows=shape.rows,
            spans=count,
            max_blocks=shape.max_blocks,
            block_size=self._block_size,
            form=form,
            limits=limits.ctypes.data,
            floors=floors.ctypes.data,
            temperatures=temperatures.ctypes.data,
            keys=keys.ctypes.data,
            most=most,
            drafted=tokens.ctypes.data,
            chances=chances.ctypes.data,
            counts=counts.ctypes.data,
            passes=passes.ctypes.data,
        )
        self._kernels.draft(self._head, step, context, (space.data_ptr() + 63) // 64 * 64)
        drafts = [
            WholeDraft(own[:length], their[:length])
            for own, their, length in zip(tokens.tolist(), chances.tolist(), counts.tolist(), strict=True)
        ]
        return drafts, [rows for rows in passes.tolist() if rows]


def whole_drafts(model: Eagle3Model, cache: LayerCache, block_size: int) -> WholeDrafts | None:
    """Return what grows the model's drafts in one call; None where the native kernels do not compute all of it."""
    decoder = model.decoder
    if not isinstance(model.kernels, NativeKernels) or not isinstance(decoder, FusedDecoder):
        return None
    if not _embeds(model.embedding) or not all(_known(weight) for weight in (model.fusion, model.head)):
        return None
    return WholeDrafts(model, decoder, cache, block_size)


def _known(weight: PreparedLinear) -> bool:
    return isinstance(weight, NativeLinear | NativeBlocks)


def _embeds(weight: PreparedLinear) -> bool:
    if isinstance(weight, NativeBlocks):
        return len(weight.parts) == 1
    return isinstance(weight, NativeLinear) and weight.scale is None


class _Head(ctypes.Structure):
    """`struct draft_head` of draft.h."""

    _fields_ = (
        *((name, Weight) for name in ("fusion", "embedding", "head")),
        *((name, c_void_p) for name in ("embedding_norm", "hidden_norm", "norm", "layer", "target_ids")),
        *((name, c_int64) for name in ("size", "heads", "kv_heads", "dim", "space", "activations", "normed_residual")),
        *((name, c_float) for name in ("scale", "eps")),
    )


class _Drafting(ctypes.Structure):
    """`struct drafting` of draft.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("features", "tokens", "positions", "slots")),
        *((name, c_void_p) for name in ("cu_query_lens", "context_lens", "block_tables")),
        *((name, c_int64) for name in ("rows", "spans", "max_blocks", "block_size", "form")),
        *((name, c_void_p) for name in ("limits", "floors", "temperatures", "keys")),
        ("most", c_int64),
        *((name, c_void_p) for name in ("drafted", "chances", "counts", "passes")),
    )
