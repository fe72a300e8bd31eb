"""DecoderModel: the one model class of all decoder-only families: token embedding, decoder layers, final norm, head.

It is written once against `Kernels`, `AttentionBackend` and `Decoder`, and knows no sequences, only rows and their
batch. Whatever of a family is not in a `ModelConfig` is in its `Family`, one file per family.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch

from pilotfish.engine.kernels.protocol import Kernels
from pilotfish.engine.layers.attention.backend import AttentionBackend, AttentionBatch, AttentionParams, LayerCache
from pilotfish.engine.layers.choose import choose_adapters, choose_decoder
from pilotfish.engine.layers.communicator import ALONE, Communicator
from pilotfish.engine.layers.decoder import Decoder, LayerShape
from pilotfish.engine.models.adapters import Adapters
from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.models.features import FeatureTap
from pilotfish.engine.models.layout import Layout
from pilotfish.engine.models.registry import family_of
from pilotfish.engine.models.rope import cos_sin_table
from pilotfish.engine.models.weight_store import LayerWeights, WeightStore
from pilotfish.engine.weights.blocks import Blocks


class CausalModel(Protocol):
    """What runners need of a model: a `DecoderModel`, or one of the transformers package."""

    config: ModelConfig
    comm: Communicator

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        batch: AttentionBatch,
        caches: list[LayerCache],
        tap: FeatureTap | None = None,
    ) -> torch.Tensor:
        """See `DecoderModel`."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `DecoderModel`."""
        ...


class DecoderModel:
    """Computes hidden states of rows, and logits of the rows that are wanted.

    If the model is sharded, this is one rank's part: all ranks call the same methods with the same rows. `config` is
    the whole model's. `embedding` and `head` are (layout.vocab_part, hidden_size), and the same matrix if tied.

    adaptable: low-rank adapters can be loaded, which `adapters` does then.

    `weights` has the parts of rank `comm.rank` (see `Layout`). They are consumed one by one, so that the peak
    of memory is the model and a few tensors. Raises ModelError if a tensor is missing.
    """

    def __init__(
        self,
        config: ModelConfig,
        kernels: Kernels[Any],
        attention: AttentionBackend,
        weights: Iterable[tuple[str, torch.Tensor | Blocks]],
        max_positions: int,
        device: torch.device,
        comm: Communicator = ALONE,
        adaptable: bool = False,
    ) -> None:
        self.config = config
        self.comm = comm
        self.layout = Layout(config, comm.rank, comm.size)
        self._kernels = kernels
        family = family_of(config.architecture)
        store = WeightStore(self.layout.tensors(), kernels, device, self.layout.vocab_part)
        for name, tensor in weights:
            store.add(name, tensor)
        self.embedding = store.linear("model.embed_tokens")
        self.head = self.embedding if config.tie_embeddings else store.linear("lm_head")
        self.weight_forms = store.forms
        """The forms of its matrices, those with the most bytes first: dtypes, and kinds of quantized blocks."""
        self._norm = store.norm("model.norm.weight")
        self.embedding_scale: torch.Tensor | None = None
        if family.scaled_embedding or config.embedding_scale != 1.0:
            # A tensor, since models are trained with the root rounded to their dtype (25.25, not 25.298, in bfloat16).
            factor = config.hidden_size**0.5 if family.scaled_embedding else config.embedding_scale
            self.embedding_scale = torch.full((), factor, dtype=store.dtype, device=device)

        scale = config.attention_scale or config.head_dim**-0.5
        ropes = dict.fromkeys(map(config.rope_of, range(config.num_layers)))
        tables = {rope: cos_sin_table(rope, config.head_dim, max_positions).to(device) for rope in ropes}
        layers = [
            family.layer(
                LayerWeights(store, f"model.layers.{i}."),
                config,
                AttentionParams(scale, config.sliding_window if config.slides(i) else None, config.attention_softcap),
                tables[config.rope_of(i)],
            )
            for i in range(config.num_layers)
        ]
        shape = LayerShape(self.layout.num_heads, self.layout.num_kv_heads, config.head_dim, config.rms_norm_eps)
        loaded = choose_adapters(kernels, len(layers)) if adaptable else None
        self.decoder: Decoder = choose_decoder(kernels, attention, comm, layers, shape, loaded)
        self.adapters: Adapters | None = None
        if loaded is not None:
            self.adapters = Adapters(config, self.layout, loaded, store.dtype, device)

    def forward(
        self,
        token_ids: torch.Tensor,  # (rows,) int64
        positions: torch.Tensor,  # (rows,) int64
        batch: AttentionBatch,
        caches: list[LayerCache],  # one for each layer
        tap: FeatureTap | None = None,
    ) -> torch.Tensor:
        """Hidden states after the last layer, before the final norm: (rows, hidden_size). Writes the
        rows' keys and values to the caches, and gives `tap` the hidden states that it takes."""
        hidden = self._embed(token_ids)
        if self.embedding_scale is not None:
            hidden.mul_(self.embedding_scale)
        return self.decoder.forward(hidden, positions, batch, caches, tap)

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the embedding, which is sharded by rows: (rows,) int64 -> (rows, hidden_size), a new tensor with the
        same bits on every rank."""
        if self.comm.size == 1:
            return self._kernels.embed(ids, self.embedding)
        here = self.layout.vocabulary
        local = ids - here.start
        elsewhere = (local < 0) | (local >= here.stop - here.start)
        embedded = self._kernels.embed(local.masked_fill_(elsewhere, 0), self.embedding)
        return self.comm.all_reduce(embedded.masked_fill_(elsewhere.unsqueeze(1), 0.0))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(rows, hidden_size) as `forward` returns them -> (rows, vocab_size), on rank 0 only."""
        normed = self._kernels.rms_norm(hidden, self._norm, self.config.rms_norm_eps)
        logits = self._kernels.linear(normed, self.head)
        if self.config.logit_divisor != 1.0:
            logits = logits.div_(self.config.logit_divisor)
        if cap := self.config.logit_softcap:
            logits = logits.div_(cap).tanh_().mul_(cap)
        if self.comm.size == 1:
            return logits
        # The head is sharded by rows; the last parts are padded.
        return self.comm.gather(logits)[:, : self.config.vocab_size]
