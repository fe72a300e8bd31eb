"""Log-probabilities in OpenAI's two JSON forms: that of completions, and that of chat."""

from __future__ import annotations

from collections.abc import Sequence

from pilotfish.server.protocol.responses import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob
from pilotfish.text.detokenizer import TokenEntry, Vocabulary

LOWEST = -9999.0
"""What OpenAI sends for a token that cannot be: JSON has no infinity."""


def completion_logprobs(entries: Sequence[TokenEntry], vocabulary: Vocabulary) -> CompletionLogprobs:
    """Four lists, an item for each token. A token that is but part of a character is spelled "bytes:\\xe2\\x82"."""
    tops: list[dict[str, float] | None] = []
    for entry in entries:
        if entry.logprobs is None:
            tops.append(None)
            continue
        top: dict[str, float] = {}
        for id_, logprob in (*entry.logprobs.top, (entry.token_id, entry.logprobs.logprob)):
            top.setdefault(_spelled(id_, vocabulary), _finite(logprob))
        tops.append(top)
    return {
        "tokens": [_spelled(entry.token_id, vocabulary) for entry in entries],
        "token_logprobs": [None if entry.logprobs is None else _finite(entry.logprobs.logprob) for entry in entries],
        "top_logprobs": tops,
        "text_offset": [entry.offset for entry in entries],
    }


def chat_logprobs(entries: Sequence[TokenEntry], vocabulary: Vocabulary) -> ChatLogprobs:
    """One object for each token, with the bytes that it stands for."""
    content: list[TokenLogprob] = []
    for entry in entries:
        assert entry.logprobs is not None  # prompts have no place in a chat's answer
        alone = _top(entry.token_id, entry.logprobs.logprob, vocabulary)
        content.append({**alone, "top_logprobs": [_top(id_, value, vocabulary) for id_, value in entry.logprobs.top]})
    return {"content": content, "refusal": None}


def _top(id_: int, logprob: float, vocabulary: Vocabulary) -> TopLogprob:
    spelled = vocabulary.bytes_of(id_)
    return {"token": spelled.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(spelled)}


def _spelled(id_: int, vocabulary: Vocabulary) -> str:
    spelled = vocabulary.bytes_of(id_)
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)
