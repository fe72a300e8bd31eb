"""Sequence: a request being decoded, with its tokens and its KV cache blocks."""

from __future__ import annotations

from dataclasses import dataclass, field

from pilotfish.engine.answer_grammar import AnswerGrammar
from pilotfish.engine.memory.block_table import BlockTable
from pilotfish.engine.params import SamplingParams
from pilotfish.engine.request import Request, TokenLogprobs


@dataclass(slots=True, eq=False)
class Sequence:
    """`tokens` is prompt and answer; the KV cache holds `tokens[:computed]` (and perhaps rejected tokens beyond it,
    which the next step overwrites). While decoding, computed == len(tokens) - 1: the last token has not run yet."""

    request: Request
    seed: int
    blocks: BlockTable
    drafters: tuple[str, ...] = ()
    """Names of the drafters that may draft for it; empty for plain decoding."""
    adapter: int = 0
    """The number of its low-rank adapter; 0: none."""
    stops: frozenset[int] = frozenset()
    """Stop and end-of-text tokens that end the sequence."""
    grammar: AnswerGrammar | None = None
    """What its answer may be, if that is restricted."""
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    cached_prompt_tokens: int = 0
    drafted: dict[str, int] = field(default_factory=dict)
    """Number of drafted tokens, by drafter."""
    accepted: int = 0
    steps: int = 0
    preemptions: int = 0
    number: int = 0
    """Its place in the order of arrival."""
    place: int = 0
    """Its place in the order in which sequences run (see `engine.shares`), lower ones first; `turn` and `user_turn` are
    how many its tenant and its user have up to it, the former divided by the tenant's weight."""
    turn: float = 0.0
    user_turn: int = 0
    scheduled: float = 0.0
    first_token: float = 0.0
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.tokens:
            self.tokens = list(self.request.prompt_ids)

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def output_len(self) -> int:
        return len(self.tokens) - len(self.request.prompt_ids)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether prompt log-probabilities are requested and some are not known yet."""
        return self.params.prompt_logprobs is not None and len(self.prompt_logprobs) < self.prompt_len

    @property
    def decoding(self) -> bool:
        """Whether all but the last token are computed, so that the next step draws a token."""
        return self.computed == len(self.tokens) - 1
