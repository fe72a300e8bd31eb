"""Where each token of an answer came from: a drafter, and its place in the draft, or the target. The engine's deltas
say it anyway, so an answer whose provenance nobody wants costs nothing more.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import UNSET

from pilotfish.engine.request import Delta
from pilotfish.server.protocol.usage import TokenOrigin
from pilotfish.text.detokenizer import TokenEntry, Vocabulary


def origins_of(delta: Delta) -> list[tuple[str | None, int]]:
    """Return, for each token of a delta, the drafter and the token's position in the draft, from 1; for the target's
    own token after rejected ones, that drafter and minus the number of its rejected tokens; else (None, 0)."""
    drafter, accepted, rejected = delta.drafter or None, delta.accepted, delta.drafted - delta.accepted
    own = (drafter, -rejected) if rejected else (None, 0)
    return [(drafter, i + 1) if i < accepted else own for i in range(len(delta.token_ids))]


def provenance_of(entries: Sequence[TokenEntry], vocabulary: Vocabulary) -> list[TokenOrigin]:
    """Return an object for each entry that has an origin; an echoed prompt's have none."""
    found = []
    for entry in entries:
        if isinstance(entry.origin, tuple):
            drafter, place = entry.origin
            spelled = vocabulary.bytes_of(entry.token_id).decode("utf-8", "replace")
            if place > 0:
                found.append(TokenOrigin(spelled, drafter, place))
            elif place < 0:
                found.append(TokenOrigin(spelled, None, None, -place, drafter))
            else:
                found.append(TokenOrigin(spelled, None, None, UNSET, UNSET))
    return found
