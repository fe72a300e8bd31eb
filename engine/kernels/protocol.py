"""The interface of kernels: the operators of a model that are worth a special implementation.

Models are written once against `Kernels`. `torch.py` is the reference, on every device; `native.py` is for the CPU.
Attention over the paged cache has an interface of its own, `engine.layers.attention`.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Literal, Protocol, TypeVar

import torch

from pilotfish.engine.weights.blocks import Blocks

Gate = Literal["silu", "gelu"]
"""The activation of a gated MLP: SiLU, or GELU by its tanh approximation."""


class PreparedLinear(Protocol):
    """A weight matrix (out_features, in_features) and an optional bias, in the layout that its kernels want."""

    @property
    def in_features(self) -> int: ...

    @property
    def out_features(self) -> int: ...


Prepared = TypeVar("Prepared", bound=PreparedLinear)


class Kernels(Protocol[Prepared]):
    """Operators on tensors of one device and, but for positions and ids, of one dtype. Results are new tensors unless a
    method says otherwise."""

    name: str

    def prepare_linear(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, scale: torch.Tensor | None = None
    ) -> Prepared:
        """Lay out `weight` (out_features, in_features), once, at loading. The caller drops its own copy afterwards.

        scale: (out_features, 1) float32, given if `weight` is float8_e4m3fn or int8: the matrix is weight * scale. An
        fp8 matrix is multiplied in fp8 (see `engine.kernels.fp8`), an int8 one stays in int8 where the kernels support
        it. A matrix in fp8, or kept in int8, cannot be embedded from. Raises ValueError for unsupported weights.
        """
        ...

    def prepare_blocks(self, parts: Seq[torch.Tensor | Blocks], bias: torch.Tensor | None = None) -> Prepared:
        """As `prepare_linear`, of a matrix whose rows are those of the parts one after the other, in quantized blocks
        or in float32. Raises ValueError for kernels that do not compute with blocks, and for a scale that is not
        finite."""
        ...

    def linear(self, x: torch.Tensor, weight: Prepared, residual: torch.Tensor | None = None) -> torch.Tensor:
        """x @ weight.T + bias + residual: (rows, in_features) -> (rows, out_features)."""
        ...

    def gated_linear(self, x: torch.Tensor, weight: Prepared, gate: Gate) -> torch.Tensor:
        """`silu_mul` or `gelu_mul` of linear(x, weight): (rows, in_features) -> (rows, out_features / 2)."""
        ...

    def embed(self, ids: torch.Tensor, weight: Prepared) -> torch.Tensor:
        """Look up rows of a weight matrix: (rows,) int64 -> (rows, in_features). A tied head is its own embedding."""
        ...

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x / sqrt(mean(x^2) + eps) * weight over the last dimension of (rows, size) or (rows, heads, size)
        (arXiv 1910.07467)."""
        ...

    def rotate_(self, x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor) -> None:
        """Rotary embedding (arXiv 2104.09864), halves convention, of x (rows, heads, head_dim), in place.

        positions (rows,) int64; cos_sin (max_position, head_dim) float32: cosines, then sines, of half the dimensions.
        """
        ...

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up of (rows, 2 * size), gate first -> (rows, size)."""
        ...

    def gelu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """gelu(gate) * up of (rows, 2 * size), gate first -> (rows, size), by the tanh approximation of GELU
        (arXiv 1606.08415)."""
        ...


class FusedKernels(Kernels[Prepared], Protocol[Prepared]):
    """Kernels that also have several operators of a layer in one, for caches in flash-attn's layout."""

    fuses: bool
    """Whether these are fewer launches than the operators one by one."""

    def add_norm(
        self,
        hidden: torch.Tensor,  # (rows, size)
        change: torch.Tensor | None,  # (rows, size)
        post_weight: torch.Tensor | None,  # (size,)
        weight: torch.Tensor | None,  # (size,)
        eps: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return hidden + change, or hidden + rms_norm(change, post_weight), and the rms_norm of that with `weight`.

        The first is `hidden` itself without a change, the second is the first without a weight.
        """
        ...

    def rotate_and_write(
        self,
        qkv: torch.Tensor,  # (rows, heads + 2 * kv_heads, head_dim) contiguous: queries, keys, values
        kv_heads: int,
        norms: tuple[torch.Tensor, torch.Tensor] | None,  # of queries and of keys, (head_dim,) each
        positions: torch.Tensor,  # (rows,) int64
        cos_sin: torch.Tensor,  # (max_position, head_dim) float32
        eps: float,
        cache: tuple[torch.Tensor, torch.Tensor],  # keys, values: (num_blocks, block_size, kv_heads, head_dim)
        slots: torch.Tensor,  # (rows,) int64: block * block_size + offset
    ) -> torch.Tensor:
        """Norm queries and keys head by head, if there are `norms`, rotate both, and write keys and values to their
        slots, in the cache's dtype. Returns the queries, (rows, heads, head_dim); `qkv` is used up."""
        ...
