"""Log-probabilities in OpenAI's two forms, for completions and for chat."""

from __future__ import annotations

from collections.abc import Sequence

from pilotfish.server.protocol.chat import ChatLogprobs, TokenLogprob, TopLogprob
from pilotfish.server.protocol.completions import CompletionLogprobs
from pilotfish.text.detokenizer import TokenEntry, Vocabulary

LOWEST = -9999.0
"""OpenAI's value for a token that cannot be sampled: JSON has no infinity."""


def completion_logprobs(entries: Sequence[TokenEntry], vocabulary: Vocabulary) -> CompletionLogprobs:
    """Return four lists with an item for each token."""
    tops: list[dict[str, float] | None] = []
    for entry in entries:
        if entry.logprobs is None:
            tops.append(None)
            continue
        top: dict[str, float] = {}
        for id_, logprob in (*entry.logprobs.top, (entry.token_id, entry.logprobs.logprob)):
            top.setdefault(_spelled(id_, vocabulary), _finite(logprob))
        tops.append(top)
    return CompletionLogprobs(
        tokens=[_spelled(entry.token_id, vocabulary) for entry in entries],
        token_logprobs=[None if entry.logprobs is None else _finite(entry.logprobs.logprob) for entry in entries],
        top_logprobs=tops,
        text_offset=[entry.offset for entry in entries],
    )


def chat_logprobs(entries: Sequence[TokenEntry], vocabulary: Vocabulary) -> ChatLogprobs:
    """Return an object for each token, with its bytes."""

    def fields(id_: int, logprob: float) -> tuple[str, float, list[int]]:
        spelled = vocabulary.bytes_of(id_)
        return spelled.decode("utf-8", "replace"), _finite(logprob), list(spelled)

    content = []
    for entry in entries:
        assert entry.logprobs is not None  # only a prompt's first token has none, and chat echoes no prompt
        top = [TopLogprob(*fields(id_, logprob)) for id_, logprob in entry.logprobs.top]
        content.append(TokenLogprob(*fields(entry.token_id, entry.logprobs.logprob), top))
    return ChatLogprobs(content)


def _spelled(id_: int, vocabulary: Vocabulary) -> str:
    spelled = vocabulary.bytes_of(id_)
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)
