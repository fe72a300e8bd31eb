"""Where each token of an answer came from: a drafter, and its place in the draft, or the target. The engine's deltas
say it anyway, so an answer whose provenance nobody wants costs nothing more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pilotfish.engine.request import Delta
from pilotfish.server.protocol.usage import TokenOrigin
from pilotfish.text.detokenizer import TokenEntry, Vocabulary


class Origin(NamedTuple):
    drafter: str | None
    """The drafter of the draft that the token, or the rejected ones in its place, are from; None if there was none."""
    position: int = 0
    """In the draft, from 1; 0 for the target's own token."""
    rejected: tuple[int, ...] = ()
    """The drafted tokens in whose place the target drew this one."""


def origins_of(delta: Delta) -> list[Origin]:
    """Return the origin of each token of a delta."""
    drafter, accepted = delta.drafter or None, delta.accepted
    own = Origin(drafter, 0, delta.rejected) if delta.rejected else Origin(None)
    return [Origin(drafter, i + 1) if i < accepted else own for i in range(len(delta.token_ids))]


def provenance_of(entries: Sequence[TokenEntry], vocabulary: Vocabulary) -> list[TokenOrigin]:
    """Return an object for each entry that has an origin; an echoed prompt's have none."""
    found = []
    for entry in entries:
        if isinstance(origin := entry.origin, Origin):
            token = _spelled(entry.token_id, vocabulary)
            if origin.position:
                found.append(TokenOrigin(token, origin.drafter, origin.position))
            elif origin.rejected:
                others = [_spelled(id_, vocabulary) for id_ in origin.rejected]
                found.append(TokenOrigin(token, None, None, len(others), others, origin.drafter))
            else:
                found.append(TokenOrigin(token, None, None))
    return found


def _spelled(id_: int, vocabulary: Vocabulary) -> str:
    return vocabulary.bytes_of(id_).decode("utf-8", "replace")
