"""SamplingParams: how one sequence's tokens are drawn, and when it ends. Text-level stops live in the server."""

from __future__ import annotations

import math

import msgspec

from pilotfish.errors import ParameterError, shown
from pilotfish.text.grammar.grammar import Grammar

MAX_LOGPROBS = 20
MAX_SEED = 2**63 - 1


class Thinking(msgspec.Struct, frozen=True, kw_only=True):
    """A budget for the reasoning before an answer."""

    budget: int
    """Tokens of reasoning after which it is closed."""
    end: tuple[int, ...]
    """The tokens that close it."""
    begin: tuple[int, ...] = ()
    """The tokens that open it; () if the prompt has opened it."""
    again: tuple[int, ...] = ()
    """The tokens that open further reasoning, which counts to the same budget; (): there is none."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the tokens of one sequence are drawn.

    They apply in the usual order: logit_bias, repetition penalty, presence and frequency penalties, allowed_token_ids
    and bad_words, grammar and thinking, then temperature, top_k, top_p, min_p, typical_p. Greedy is temperature 0.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 or -1: all tokens."""
    min_p: float = 0.0
    typical_p: float = 1.0
    """Locally typical sampling (arXiv 2202.00666): the tokens nearest to the expected information that together have
    this probability; 1: all."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    """Presence and frequency penalties count the answer's tokens, as in OpenAI's API."""
    repetition_penalty: float = 1.0
    """Counts prompt and answer (CTRL, arXiv 1909.05858)."""
    logit_bias: dict[int, float] = {}
    allowed_token_ids: tuple[int, ...] | None = None
    """The only tokens that may be drawn; None: all."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Sequences of tokens that may not occur in the answer: the last token of each is never drawn after the others."""
    logprobs: int | None = None
    """Log-probabilities (natural) to return, of the model's own distribution before all of the above. None: none;
    0: the drawn token's; n: also those of the n likeliest tokens."""
    prompt_logprobs: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    """Number of tokens before which no end-of-text or stop token is drawn."""
    max_tokens: int = 16
    ignore_eos: bool = False
    grammar: Grammar | None = None
    """What the whole answer must match; once it does and nothing may follow, the answer ends, also with ignore_eos."""
    thinking: Thinking | None = None
    seed: int | None = None
    """None: the engine draws one when it takes the request."""

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def depends_on_text(self) -> bool:
        """Whether the distribution of a token depends on which tokens came before it, beyond the model's logits."""
        return self.penalizes or self.constrained or any(len(word) > 1 for word in self.bad_words)

    @property
    def constrained(self) -> bool:
        """Whether a grammar, or a budget of reasoning, says which tokens may come next."""
        return self.grammar is not None or self.thinking is not None

    @property
    def penalizes(self) -> bool:
        return self.repetition_penalty != 1.0 or bool(self.presence_penalty or self.frequency_penalty)

    @property
    def forbids(self) -> bool:
        """Whether some tokens may not be drawn, apart from `min_tokens`."""
        return self.allowed_token_ids is not None or bool(self.bad_words)

    @property
    def alters_logits(self) -> bool:
        """Whether logits are changed before temperature: by a bias, a penalty, `min_tokens`, or what is forbidden."""
        return self.penalizes or self.forbids or self.constrained or bool(self.logit_bias) or self.min_tokens > 0

    def check(self) -> SamplingParams:
        """Return self. Raises ParameterError, with the field and its bounds, for the first field out of bounds."""
        _between("temperature", self.temperature, 0.0, 2.0)
        _between("top_p", self.top_p, 0.0, 1.0)
        _between("top_k", self.top_k, -1, math.inf)
        _between("min_p", self.min_p, 0.0, 1.0)
        _between("typical_p", self.typical_p, 0.0, 1.0, open_low=True)
        _between("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _between("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _between("repetition_penalty", self.repetition_penalty, 0.0, math.inf, open_low=True)
        _between("min_tokens", self.min_tokens, 0, math.inf)
        _between("max_tokens", self.max_tokens, 1, math.inf)
        if self.min_tokens > self.max_tokens:
            raise ParameterError(
                "min_tokens",
                f"min_tokens ({shown(self.min_tokens)}) must not exceed max_tokens ({shown(self.max_tokens)})",
            )
        for name, count in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if count is not None:
                _between(name, count, 0, MAX_LOGPROBS)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise ParameterError("allowed_token_ids", "allowed_token_ids is empty, but must have at least one token id")
        if not all(self.bad_words):
            raise ParameterError("bad_words", "bad_words has an empty word, but each must have at least one token")
        if self.thinking is not None:
            _between("thinking.budget", self.thinking.budget, 0, math.inf)
            if not self.thinking.end:
                raise ParameterError("thinking", "thinking.end is empty, but must have the tokens that close reasoning")
        if self.seed is not None:
            _between("seed", self.seed, -MAX_SEED - 1, MAX_SEED)
        for token, bias in self.logit_bias.items():
            if not -100.0 <= bias <= 100.0:
                raise ParameterError(
                    "logit_bias",
                    f"logit_bias of token {shown(token)} is {shown(bias)}, but must be between -100 and 100",
                )
        return self


def _between(name: str, value: float, low: float, high: float, open_low: bool = False) -> None:
    inside = (low < value if open_low else low <= value) and value <= high  # false for nan, too
    if inside and (isinstance(value, int) or math.isfinite(value)):  # an int may be too large for isfinite
        return
    if high == math.inf:
        wanted = f"finite and greater than {low}" if open_low else f"at least {low}"
    else:
        wanted = f"greater than {low} and at most {high}" if open_low else f"between {low} and {high}"
    raise ParameterError(name, f"{name} is {shown(value)}, but must be {wanted}")
