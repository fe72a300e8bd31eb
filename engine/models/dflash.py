"""DFlash: a block of tokens in one pass, from the target's hidden states (arXiv 2602.06036).

The target's features of a position, fused to one hidden state, are that position's keys and values in every layer; they
go through no layer themselves. A block's rows are the embeddings of the last token and of masks. They run through the
layers, see all positions before the block and each other, and each predicts a token. Nothing else is special to the
layers, which are those of any decoder here.

It knows no sequences, only rows and their batch: a block's rows are spans of one row each that see its last row
(`Span.sees`). Its tensors' shapes and names are the public checkpoints': see `engine.models.dflash_checkpoint`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from math import prod
from typing import Any

import torch

from pilotfish.engine.kernels.protocol import Kernels
from pilotfish.engine.layers.attention.backend import AttentionBackend, AttentionBatch, AttentionParams, LayerCache
from pilotfish.engine.layers.choose import choose_decoder
from pilotfish.engine.layers.communicator import ALONE
from pilotfish.engine.layers.decoder import Decoder, DecoderLayer, DenseMlp, LayerShape
from pilotfish.engine.models.config import DFlashConfig
from pilotfish.engine.models.dflash_checkpoint import LOOKED_UP, tensors_of
from pilotfish.engine.models.dspark import DSparkHeads
from pilotfish.engine.models.eagle3 import SharedWeights
from pilotfish.engine.models.head_files import EMBEDDING, FUSION, HEAD, TARGET_IDS
from pilotfish.engine.models.rope import cos_sin_table
from pilotfish.engine.models.weight_store import LayerWeights, WeightStore
from pilotfish.engine.weights.quantization import SCALE
from pilotfish.engine.weights.tensors import Tensor


@dataclass(frozen=True, slots=True)
class _Layers:
    """Consecutive layers of a kind."""

    decoder: Decoder
    first: int
    stop: int
    causal: bool


class DFlashModel:
    """A DFlash or DSpark drafter of the weights that `dflash_checkpoint.read_weights` returns. An embedding or a head
    that is not among them is taken from `shared`, the embedding with the target's factor, `embedding_scale`."""

    def __init__(
        self,
        config: DFlashConfig,
        kernels: Kernels[Any],
        attention: AttentionBackend,
        weights: Mapping[str, torch.Tensor],
        max_positions: int,
        device: torch.device,
        dtype: torch.dtype,
        shared: SharedWeights,
        embedding_scale: torch.Tensor | None = None,
    ) -> None:
        self.config, self.kernels, self.dtype = config, kernels, dtype
        self._attention = attention
        decoder = config.decoder
        declared = {name: tensor for name, tensor in tensors_of(config).items() if name in weights}
        context = dict(_context_tensors(declared, decoder.num_layers))
        store = WeightStore(declared | {tensor.name: tensor for tensor in context.values()}, kernels, device)
        for name, tensor in weights.items():
            if name != TARGET_IDS:
                store.add(name, tensor)
        # Query, key and value are one matrix for a block's rows; keys and values of all layers another for the others.
        for name, own in context.items():
            store.add(own.name, weights[name])
            if name + SCALE in weights:
                store.add(own.name + SCALE, weights[name + SCALE])
        self._fusion, self._context = store.linear("fc"), store.linear("context")
        self._hidden_norm = store.norm("hidden_norm.weight").float()
        table = cos_sin_table(decoder.rope, decoder.head_dim, max_positions).to(device)
        self._layers = [self._layer(LayerWeights(store, f"layers.{i}."), i, table) for i in range(decoder.num_layers)]
        shape = LayerShape(decoder.num_heads, decoder.num_kv_heads, decoder.head_dim, decoder.rms_norm_eps)
        self._runs = []
        for causal, group in groupby(range(decoder.num_layers), config.causal):
            numbers = list(group)
            layers = [self._layers[i] for i in numbers]
            chosen = choose_decoder(kernels, attention, ALONE, layers, shape)
            self._runs.append(_Layers(chosen, numbers[0], numbers[-1] + 1, causal))
        self._norm = store.norm("norm.weight").float()
        self._embedding = store.linear("embed_tokens") if EMBEDDING in weights else shared.embedding
        self._scale = None if EMBEDDING in weights else embedding_scale
        self.heads = DSparkHeads(config, kernels, store) if config.rank or config.confidence else None
        """DSpark's heads; None for DFlash."""
        self._head = store.linear("lm_head") if HEAD in weights else shared.head
        self.target_ids: torch.Tensor | None = None
        """(draft_vocab_size,) int64: the target's id of each of its tokens; None where they are the same."""
        if TARGET_IDS in weights:
            self.target_ids = weights[TARGET_IDS].to(device)

    @property
    def reading(self) -> int:
        """Parameters that reading a position's features takes, in percent of those of a block's row."""
        apart = (EMBEDDING, FUSION, LOOKED_UP)
        row = sum(prod(each.shape) for name, each in tensors_of(self.config).items() if name not in apart)
        read = sum(each.in_features * each.out_features for each in (self._fusion, self._context))
        return max(1, 100 * read // row)

    @property
    def has_causal_layers(self) -> bool:
        return any(run.causal for run in self._runs)

    def read(
        self,
        features: torch.Tensor,  # (rows, feature layers * target_hidden_size)
        positions: torch.Tensor,  # (rows,) int64
        batch: AttentionBatch,
        caches: list[LayerCache],  # one for each layer
    ) -> None:
        """Write the rows' keys and values, in all layers, to their slots."""
        kernels, shape = self.kernels, self.config.decoder
        fused = kernels.rms_norm(kernels.linear(features, self._fusion), self._hidden_norm, shape.rms_norm_eps)
        found = kernels.linear(fused, self._context).view(len(features), shape.num_layers, 2, shape.num_kv_heads, -1)
        for i, (layer, cache) in enumerate(zip(self._layers, caches, strict=True)):
            key, value = found[:, i, 0], found[:, i, 1].contiguous()
            assert layer.k_norm is not None
            key = kernels.rms_norm(key, layer.k_norm, shape.rms_norm_eps)
            kernels.rotate_(key, positions, layer.cos_sin)
            self._attention.store(key, value, cache, batch)

    def forward(
        self,
        token_ids: torch.Tensor,  # (rows,) int64, target's ids: each block's last token, and then masks
        positions: torch.Tensor,  # (rows,) int64
        batch: AttentionBatch,  # a span of one row for each row
        caches: list[LayerCache],  # one for each layer
    ) -> torch.Tensor:
        """Hidden states of the blocks' rows, normed: (rows, hidden_size)."""
        hidden = self.kernels.embed(token_ids, self._embedding)
        if self._scale is not None:
            hidden.mul_(self._scale)
        causal = _up_to_themselves(batch, self.config.block_size) if self.has_causal_layers else batch
        for run in self._runs:
            own = caches if len(self._runs) == 1 else caches[run.first : run.stop]
            hidden = run.decoder.forward(hidden, positions, causal if run.causal else batch, own)
        return self.kernels.rms_norm(hidden, self._norm, self.config.decoder.rms_norm_eps)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(rows, hidden_size) as `forward` returns them -> (rows, draft_vocab_size)."""
        return self.kernels.linear(hidden, self._head)

    def _layer(self, weights: LayerWeights, i: int, table: torch.Tensor) -> DecoderLayer:
        decoder = self.config.decoder
        window = decoder.sliding_window if decoder.slides(i) else None
        if window is not None and not self.config.causal(i):
            window += self.config.block_size  # of the keys before the block, and all of its own
        return DecoderLayer(
            input_norm=weights.norm("input_layernorm").float(),
            qkv=weights.linear("self_attn.qkv_proj"),
            q_norm=weights.norm("self_attn.q_norm").float(),
            k_norm=weights.norm("self_attn.k_norm").float(),
            output=weights.linear("self_attn.o_proj"),
            mlp_norm=weights.norm("post_attention_layernorm").float(),
            mlp=DenseMlp(weights.linear("mlp.gate_up_proj"), weights.linear("mlp.down_proj"), gate="silu"),
            cos_sin=table,
            attention=AttentionParams(decoder.head_dim**-0.5, window),
        )


def _context_tensors(declared: Mapping[str, Tensor], layers: int) -> Iterator[tuple[str, Tensor]]:
    """The keys' and values' tensors of all layers, by their names, once more as parts of one matrix."""
    for i in range(layers):
        for part in ("k_proj", "v_proj"):
            for kind in ("weight", "bias"):
                name = f"layers.{i}.self_attn.{part}.{kind}"
                if name in declared:
                    yield name, replace(declared[name], name=f"context.{name}", linear="context")


def _up_to_themselves(batch: AttentionBatch, block_size: int) -> AttentionBatch:
    """The batch, of whole blocks, with rows that see none after themselves."""
    rows = len(batch.slots)
    behind = (block_size - 1 - torch.arange(rows, device=batch.slots.device) % block_size).int()
    lens = batch.context_lens - behind
    contexts = [context - (block_size - 1 - i % block_size) for i, context in enumerate(batch.contexts)]
    sums = torch.nn.functional.pad(lens.cumsum(0), (1, 0)).int()
    return replace(batch, context_lens=lens, cu_context_lens=sums, contexts=contexts)
