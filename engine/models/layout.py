"""Layout: what of a model lies on which tensor-parallel rank, after Megatron-LM (arXiv 1909.08053). No torch.

- Rows are divided of query, key, value, gate and up (each rank computes some heads and some of the MLP's inner size),
  and of embedding and head (each rank knows some of the tokens). A bias goes with its rows.
- Columns are divided of what reads those: the output and down projections. Each rank has a summand of their result, and
  one alone adds the bias.
- Where ranks outnumber key-value heads, each head is on several ranks, those whose queries read it.
- Norms are everywhere.
- Heads and inner size must divide. The vocabulary need not: the last ranks' parts are shorter, and padded to be equal.
"""

from __future__ import annotations

from dataclasses import dataclass

from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.weights.names import Part, expected_shapes, whole
from pilotfish.errors import ConfigError

MAX_RANKS = 16
"""Highest number of ranks that is suggested."""

_FP8_MULTIPLE = 16
"""As `engine.kernels.fp8.MULTIPLE`."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Rank `rank` of `size`. Sizes are those of this rank. Raises ConfigError for a model that cannot be divided so."""

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
        start, stop = (min(place * self.vocab_part, self.config.vocab_size) for place in (self.rank, self.rank + 1))
        return slice(start, stop)

    def parts(self) -> dict[str, Part]:
        """What this rank reads of each tensor, in the order of the computation; a tensor that it does not need is not
        there."""
        parts = ((name, self._part(name, shape)) for name, shape in expected_shapes(self.config).items())
        return {name: part for name, part in parts if part is not None}

    def _part(self, name: str, shape: tuple[int, ...]) -> Part | None:
        module, _, kind = name.rpartition(".")
        rows, *rest = whole(shape)
        match module.rpartition(".")[2]:
            case "embed_tokens" | "lm_head":
                return self.vocabulary, *rest
            case "q_proj":
                return self._of_heads(self.rank * self.num_heads, self.num_heads), *rest
            case "k_proj" | "v_proj":
                return self._of_heads(self.rank * self.config.num_kv_heads // self.size, self.num_kv_heads), *rest
            case "gate_proj" | "up_proj":
                return self._inner, *rest
            case "o_proj" | "down_proj" if kind != "weight":
                return (rows,) if self.rank == 0 else None
            case "o_proj":
                return rows, self._of_heads(self.rank * self.num_heads, self.num_heads)
            case "down_proj":
                return rows, self._inner
        return rows, *rest

    @property
    def _inner(self) -> slice:
        return slice(self.rank * self.intermediate_size, (self.rank + 1) * self.intermediate_size)

    def _of_heads(self, first: int, count: int) -> slice:
        return slice(first * self.config.head_dim, (first + count) * self.config.head_dim)


def num_kv_heads(config: ModelConfig, ranks: int) -> int:
    """Key-value heads on each rank: split, or one each where ranks outnumber them."""
    return max(1, config.num_kv_heads // ranks)


def what_does_not_divide(config: ModelConfig, ranks: int, fp8: bool = False) -> list[str]:
    """Why a model (fp8: its layers' matrices in fp8) cannot be divided over so many ranks: sizes; nothing if it can."""
    sizes = {"num_heads": config.num_heads, "intermediate_size": config.intermediate_size}
    reasons = [f"{name} ({size}) does not divide by {ranks}" for name, size in sizes.items() if size % ranks]
    if config.num_kv_heads % ranks and ranks % config.num_kv_heads:
        reasons.append(f"num_kv_heads ({config.num_kv_heads}) neither divides by {ranks} nor divides it")
    if reasons or not fp8 or ranks == 1:
        return reasons
    heads, keys = config.num_heads // ranks, num_kv_heads(config, ranks)
    matrices = {
        "intermediate_size": config.intermediate_size // ranks,
        "num_heads * head_dim": heads * config.head_dim,
        "(num_heads + 2 * num_kv_heads) * head_dim": (heads + 2 * keys) * config.head_dim,
    }
    return [
        f"{name} would be {size} on each rank, not a multiple of {_FP8_MULTIPLE} as fp8 needs"
        for name, size in matrices.items()
        if size % _FP8_MULTIPLE
    ]


def check_divides(
    config: ModelConfig, ranks: int, fp8: bool = False, setting: str = "tensor_parallel_size", model: str = "the model"
) -> None:
    """Raise ConfigError, naming `setting`, unless the model can be divided over so many ranks."""
    if ranks == 1:
        return
    if reasons := what_does_not_divide(config, ranks, fp8):
        would = [n for n in range(1, MAX_RANKS + 1) if not what_does_not_divide(config, n, fp8)]
        raise ConfigError(
            f"{setting} is {ranks}, but of {model} {' and '.join(reasons)}: {', '.join(map(str, would))} would do"
        )
