"""The operators of a model in which its ranks speak with each other. For a model that is not divided each is the plain
operator and nothing more.

What they give to every rank is the same there, to the last bit, so that all ranks go on with the same hidden states.
"""

from __future__ import annotations

from typing import Any

import torch

from pilotfish.engine.kernels.protocol import Kernels, PreparedLinear
from pilotfish.engine.layers.communicator import Communicator
from pilotfish.engine.models.layout import Layout


def embed(
    kernels: Kernels[Any], comm: Communicator, layout: Layout, ids: torch.Tensor, weight: PreparedLinear
) -> torch.Tensor:
    """Rows of an embedding that is divided by rows: (rows,) int64 -> (rows, hidden_size), new on every rank."""
    if comm.size == 1:
        return kernels.embed(ids, weight)
    here = layout.vocabulary
    local = ids - here.start
    elsewhere = (local < 0) | (local >= here.stop - here.start)
    embedded = kernels.embed(local.masked_fill_(elsewhere, 0), weight)
    return comm.all_reduce(embedded.masked_fill_(elsewhere.unsqueeze(1), 0.0))


def summed_linear(
    kernels: Kernels[Any],
    comm: Communicator,
    x: torch.Tensor,
    weight: PreparedLinear,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """A linear that is divided by columns, on what those before it left on each rank: (rows, part of in_features) ->
    (rows, out_features), new on every rank.

    The residual is added to the sum: in 16 bits a summand as large as it would cost the others their digits.
    """
    if comm.size == 1:
        return kernels.linear(x, weight, residual=residual)
    y = comm.all_reduce(kernels.linear(x, weight))
    return y if residual is None else y.add_(residual)


def logits(
    kernels: Kernels[Any], comm: Communicator, layout: Layout, x: torch.Tensor, head: PreparedLinear
) -> torch.Tensor:
    """A head that is divided by rows: (rows, hidden_size) -> (rows, vocab_size) on rank 0. Elsewhere it is not to be
    read."""
    if comm.size == 1:
        return kernels.linear(x, head)
    return comm.gather(kernels.linear(x, head))[:, : layout.config.vocab_size]  # without the last part's padding
