"""Layout: the part of a model on each tensor-parallel rank, after Megatron-LM (arXiv 1909.08053). No torch.

- Tensors are sharded by the axes that their family declares: each rank has some of the query heads, of the key-value
  heads, of the MLP's inner size, and of the vocabulary.
- If ranks outnumber key-value heads, each head is on all the ranks whose queries read it.
- If columns are sharded, each rank computes a summand of the result, and rank 0 alone adds the bias.
- With `expert_parallel` each rank has some of the experts, whole, and of the rest its part.
- Heads and inner sizes must divide by the number of ranks. The vocabulary need not: the last ranks' parts are padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.models.registry import tensors_of
from pilotfish.engine.weights.quantization import SCHEMES
from pilotfish.engine.weights.tensors import Axis, Part, Tensor
from pilotfish.errors import ConfigError

MAX_RANKS = 16
"""Highest number of ranks that is suggested."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The part of rank `rank` of `size`; sizes are this rank's. Raises ConfigError if the model cannot be sharded."""

    config: ModelConfig
    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        check_divides(self.config, self.size)

    @property
    def num_heads(self) -> int:
        return self.config.num_heads // self.size

    @property
    def num_kv_heads(self) -> int:
        return num_kv_heads(self.config, self.size)

    @property
    def intermediate_size(self) -> int:
        return self.config.intermediate_size // self.size

    @property
    def vocab_part(self) -> int:
        """Rows of embedding and head on each rank, padding included."""
        return -(-self.config.vocab_size // self.size)

    @property
    def vocabulary(self) -> slice:
        """The tokens whose rows are here."""
        start, stop = (min(rank * self.vocab_part, self.config.vocab_size) for rank in (self.rank, self.rank + 1))
        return slice(start, stop)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of which this rank has a part, in the order of the computation; their shapes are the model's."""
        tensors = tensors_of(self.config).items()
        return {name: tensor for name, tensor in tensors if self._has(tensor)}

    def _has(self, tensor: Tensor) -> bool:
        if tensor.expert is not None and self.config.expert_parallel:
            assert self.config.experts is not None  # its rank alone has its biases, too
            return tensor.expert * self.size // self.config.experts.count == self.rank
        return self.rank == 0 or not tensor.first_rank_only

    def parts(self) -> dict[str, Part]:
        """The part of each of these tensors that this rank reads."""
        return {name: self._part(tensor) for name, tensor in self.tensors().items()}

    def _part(self, tensor: Tensor) -> Part:
        sizes = zip(tensor.axes, tensor.shape, strict=True)
        return tuple(slice(0, size) if axis is None else self._range(axis) for axis, size in sizes)

    def _range(self, axis: Axis) -> slice:
        """The entries of a sharded dimension that are here."""
        match axis:
            case "vocabulary":
                return self.vocabulary
            case "heads":
                return self._of_heads(self.rank * self.num_heads, self.num_heads)
            case "head":
                return slice(self.rank * self.num_heads, (self.rank + 1) * self.num_heads)
            case "kv_heads":
                return self._of_heads(self.rank * self.config.num_kv_heads // self.size, self.num_kv_heads)
            case "inner":
                return self._share(self.config.intermediate_size)
            case "expert":
                assert self.config.experts is not None
                size = self.config.experts.size
                return slice(0, size) if self.config.expert_parallel else self._share(size)
            case "shared":
                assert self.config.experts is not None
                return self._share(self.config.experts.shared_size)

    def _share(self, size: int) -> slice:
        """The entries that are here of a dimension that divides by the ranks."""
        return slice(self.rank * size // self.size, (self.rank + 1) * size // self.size)

    def _of_heads(self, first: int, count: int) -> slice:
        return slice(first * self.config.head_dim, (first + count) * self.config.head_dim)


def num_kv_heads(config: ModelConfig, ranks: int) -> int:
    """Key-value heads on each rank: one if ranks outnumber them."""
    return max(1, config.num_kv_heads // ranks)


def what_does_not_divide(config: ModelConfig, ranks: int, scheme: str | None = None) -> list[str]:
    """Reasons why a model, its matrices quantized by `scheme`, cannot be sharded over so many ranks; [] if it can."""
    sizes = {"num_heads": config.num_heads, **config.inner_sizes()}
    if config.experts is not None and config.expert_parallel:
        del sizes["experts.size"]
        sizes["experts.count"] = config.experts.count
    reasons = [f"{name} ({size}) does not divide by {ranks}" for name, size in sizes.items() if size % ranks]
    if config.num_kv_heads % ranks and ranks % config.num_kv_heads:
        reasons.append(f"num_kv_heads ({config.num_kv_heads}) neither divides by {ranks} nor divides it")
    if reasons or scheme is None or ranks == 1:
        return reasons
    heads, keys = config.num_heads // ranks, num_kv_heads(config, ranks)
    whole = {"experts.size"} if config.expert_parallel else set()
    matrices = {
        **{name: size // (1 if name in whole else ranks) for name, size in config.inner_sizes().items()},
        "num_heads * head_dim": heads * config.head_dim,
        "(num_heads + 2 * num_kv_heads) * head_dim": (heads + 2 * keys) * config.head_dim,
    }
    multiple = SCHEMES[scheme].multiple
    return [
        f"{name} would be {size} on each rank, not a multiple of {multiple} as {scheme} needs"
        for name, size in matrices.items()
        if size % multiple
    ]


def check_divides(
    config: ModelConfig,
    ranks: int,
    scheme: str | None = None,
    setting: str = "tensor_parallel_size",
    model: str = "the model",
) -> None:
    """Raise ConfigError, naming `setting`, unless the model can be sharded over so many ranks."""
    if ranks == 1:
        return
    if reasons := what_does_not_divide(config, ranks, scheme):
        fitting = [n for n in range(1, MAX_RANKS + 1) if not what_does_not_divide(config, n, scheme)]
        raise ConfigError(f"{setting} is {ranks}, but of {model} {' and '.join(reasons)}: {use_one_of(fitting)}")


def use_one_of(counts: Sequence[int]) -> str:
    """The end of an error about an impossible number of ranks, such as "use 1, 2 or 4"."""
    *most, last = map(str, counts)
    return f"use {', '.join(most)} or {last}" if most else f"use {last}"
