"""Request, what a client asks for in tokens, and Delta, what a step returns for it. Both cross the process boundary."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from pilotfish.engine.memory.usage import RankMemory
from pilotfish.engine.params import MAX_SEED, SamplingParams
from pilotfish.errors import ParameterError, shown

GRAMMAR_LIMIT = "The answer's grammar cannot be followed any further"
"""How the error of an answer begins whose grammar has run into a limit."""
FinishReason = Literal["stop", "length", "abort", "error", "timeout"]


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence to decode. Never changes; `n` answers to a prompt are n requests (see `fan_out`)."""

    id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    speculation: str | None = None
    """None: the engine's default, the grammar's drafter where tokens are constrained, and the prediction's drafter if
    there is a prediction; "auto": whichever drafter promises most, step by step; "off": plain decoding; or a drafter's
    name."""
    prediction_ids: tuple[int, ...] = ()
    """The expected answer, as far as it is known."""
    adapter: str = ""
    """The name of the low-rank adapter that answers; "": the model itself."""
    salt: bytes = b""
    """Requests share cached prefixes only with those that have the same salt."""
    session: str | None = None
    """The client's name for the session that it is part of; only passed on."""
    tenant: str = ""
    """Who it is for: tenants have equal shares of the engine, multiplied by their weights, and within a tenant its
    users."""
    weight: float = 1.0
    user: str = ""
    priority: int = 0
    """Of a tenant's requests, those with lower numbers go first."""
    deadline: float = 0.0
    """time.monotonic() at which it ends, complete or not; 0: never."""
    arrival: float = 0.0
    """time.monotonic() when the client's request came in (one clock for all processes of a machine)."""


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability (natural log) of a token and of the likeliest ones at its position, likeliest first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class RequestStats(msgspec.Struct, frozen=True, kw_only=True):
    """Statistics of a request that has ended; times are time.monotonic() seconds."""

    arrival: float
    scheduled: float
    first_token: float
    finished: float
    prompt_tokens: int
    cached_prompt_tokens: int
    """Prompt tokens that were found in the prefix cache."""
    generated_tokens: int
    drafter: str
    """The drafter that drafted most of its tokens; "none" if nothing was drafted."""
    drafted_tokens: int
    accepted_tokens: int
    steps: int
    """Engine steps in which it decoded."""
    preemptions: int


class Delta(msgspec.Struct, frozen=True, kw_only=True):
    """The tokens that a step adds to a request. The last one has a finish_reason and stats."""

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None
    """One for each of token_ids, if asked for."""
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    """In the first delta, one for each prompt token (None for the first, which nothing predicts)."""
    scheduled: float | None = None
    """In the first delta, when the request left the queue; `cached_prompt_tokens` is as in RequestStats."""
    cached_prompt_tokens: int = 0
    drafted: int = 0
    """Tokens drafted for this step, and those of token_ids among them: a client that stops in mid-stream, at a stop
    string, gets no `stats`."""
    accepted: int = 0
    drafter: str = ""
    """The drafter of these tokens; "" if nothing was drafted."""
    rejected: tuple[int, ...] = ()
    """The drafted tokens after the accepted ones."""
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    """The end-of-text or stop token that ended it: the last of token_ids, and not part of the text."""
    error: str | None = None
    stats: RequestStats | None = None


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The engine's description of itself, once its model is loaded."""

    model: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    num_blocks: int
    block_size: int
    max_num_seqs: int
    drafters: tuple[str, ...]
    default_drafter: str
    """Default for requests that do not set `speculation`: a drafter's name, "auto" or "off"."""
    dtype: str
    """The dtype that the target computes in."""
    weights: tuple[str, ...] = ()
    """The forms of its matrices, those with the most bytes first: dtypes, and kinds of quantized blocks; () if that is
    not known."""
    device: str
    kernels: str
    tensor_parallel_size: int = 1
    """Number of ranks that the target is sharded over."""
    adapters: tuple[str, ...] = ()
    """Names of the low-rank adapters that are loaded."""
    load_seconds: float
    memory: tuple[RankMemory, ...] = ()
    """Memory of each rank, once the model was loaded."""


def check_request(request: Request, info: EngineInfo) -> None:
    """Raise ParameterError for a request that this engine can never serve."""
    request.params.check()
    if not 0 < request.weight < math.inf:
        raise ParameterError("weight", f"weight is {request.weight!r}, but must be a positive number")
    length, limit = len(request.prompt_ids), info.max_model_len
    if length == 0:
        raise ParameterError("prompt", "the prompt has no tokens, but must have at least one")
    if length + 1 > limit:
        raise ParameterError(
            "prompt",
            f"the prompt has {length} tokens, but this model's context is {limit} tokens, and the answer needs one",
        )
    for name, ids in (
        ("prompt", request.prompt_ids),
        ("prediction", request.prediction_ids),
        ("logit_bias", request.params.logit_bias),
        ("stop_token_ids", request.params.stop_token_ids),
        ("allowed_token_ids", request.params.allowed_token_ids or ()),
        *(("bad_words", word) for word in request.params.bad_words),
    ):
        low, high = min(ids, default=0), max(ids, default=0)
        if low < 0 or high >= info.vocab_size:
            wrong = low if low < 0 else high
            raise ParameterError(
                name, f"{name} has token id {shown(wrong)}, which is not between 0 and {info.vocab_size - 1}"
            )
    never = {word[-1] for word in request.params.bad_words} | {*request.params.stop_token_ids, *info.eos_token_ids}
    if request.params.bad_words and len(never) >= info.vocab_size:
        raise ParameterError("bad_words", "bad_words leave no token that may be drawn")
    if request.adapter and request.adapter not in info.adapters:
        known = ", ".join(map(repr, info.adapters)) or "none"
        raise ParameterError("model", f"the adapter {request.adapter!r} is not loaded: there is {known}")
    if request.speculation not in (None, "auto", "off", *info.drafters):
        known = ", ".join(repr(name) for name in ("auto", "off", *info.drafters))
        raise ParameterError("speculation", f"speculation is {request.speculation!r}, but this server knows {known}")


def drafters_of(request: Request, info: EngineInfo) -> tuple[str, ...]:
    """Return the names of the drafters that may draft for a request, in the order tried without a controller."""
    wanted = info.default_drafter if request.speculation is None else request.speculation
    predicted = bool(request.prediction_ids) and request.speculation in (None, "auto")
    names = ["prediction"] if predicted else []
    if request.params.constrained and wanted != "off" and request.speculation in (None, "auto"):
        names.append("grammar")
    if wanted == "auto":
        names += [name for name in info.drafters if name not in ("prediction", "grammar")]
    elif wanted != "off":
        names.append(wanted)
    return tuple(names)


def fan_out(request: Request, count: int, seed: int) -> list[Request]:
    """Return `count` requests for the same prompt, each with its own seed. The first has `seed` itself, so the first
    of n answers is the answer of n = 1."""
    requests = []
    for i in range(count):
        mixed = (seed + i * 0x9E3779B97F4A7C15) & MAX_SEED if i else seed
        params = msgspec.structs.replace(request.params, seed=mixed)
        identity = request.id if count == 1 else f"{request.id}-{i}"
        requests.append(msgspec.structs.replace(request, id=identity, params=params))
    return requests
