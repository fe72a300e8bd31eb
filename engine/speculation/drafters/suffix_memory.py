"""SuffixMemoryDrafter: drafts from the past texts of the same tenant: what followed where the end of the text occurred.

Suffix decoding over past answers as in SuffixDecoding (arXiv 2411.04975), with a way back after a disagreement: the
answers of agents repeat earlier ones with changes, and go on as before behind them. Where texts are kept, and that
nobody meets another's, is `text_store`'s part.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from hashlib import blake2b

from pilotfish.engine.config import EngineConfig
from pilotfish.engine.draft import NO_DRAFT, Draft
from pilotfish.engine.request import Request
from pilotfish.engine.sequence import Sequence
from pilotfish.engine.speculation.drafters.drafter import DraftRequest, PastUse
from pilotfish.engine.speculation.drafters.text_store import LARGEST, LENGTHS, SMALLEST, TextStore
from pilotfish.errors import ConfigError

TAIL = LENGTHS[-1]
"""Tokens at the end of a text that are looked at."""
STEADY = 8
"""Tokens in a row that must agree for an earlier text to be one that is returned to after a disagreement."""
NEAR, FAR = 8, 32
"""How far behind a disagreement the text's last token is looked for, and its last two."""
LOST = 24
"""Tokens after a disagreement for which they are looked for."""
SURPLUS = 8
"""Tokens of a draft beyond twice those that agree."""
UNANIMOUS, MAJORITIES = 0.9, (0.15, 0.6, 0.8)
"""How often the first token is right that all occurrences have; that at most half of them have, more than half, more
than three quarters; and that of a text that was returned to, by the bits of the number of tokens that agree since."""
RETURNED = (0.05, 0.45, 0.6, 0.75, 0.9)
CORPUS_TOKEN = 14
"""Bytes that hold a token of a corpus for sure, with its part of the index."""

_BACK, _CORPUS = 100, 200
"""The first class of evidence of drafts from a place that was returned to, and what is added to those of a corpus."""
_PIECE = 4096
"""Tokens of a corpus that are kept as one text."""


class SuffixMemoryDrafter:
    """Drafts from texts of the same tenant and salt, which it keeps in `nbytes` bytes when their sequences end.

    Of all occurrences of the text's end, those count that agree the longest; each drafted token is what most of them go
    on with, the latest of equals. Where the answer disagrees with an earlier text that it followed, it is expected to
    come back: behind one replaced token, or where its last two tokens are a little later in that text, or its last one.
    Of the two ways the one is taken that is right more often (figures of `benchmarks/agent_traffic.py`: what is learned
    from other tenants' requests must not matter here).

    Each token has its class of evidence: how long the occurrences agree (LENGTHS), of how many it is the next, and
    which share of them that is; at a place that was returned to, how many tokens agree since. A draft has at most
    `longest` tokens, and 2n + 8 for n that agree.
    """

    name = "suffix-memory"

    def __init__(self, nbytes: int, longest: int, secret: int | None = None) -> None:
        self.store = TextStore(nbytes, secret)
        self.longest = longest
        self.corpus: TextStore | None = None
        """Texts for everybody, if there are any."""
        self._secret = secret
        self._trails: dict[str, tuple[_Trail, _Trail]] = {}
        """By sequence, where it is followed in its owner's past, and in the corpus."""
        self._queries = self._hits = 0

    def propose(self, requests: list[DraftRequest]) -> list[Draft]:
        """Return one Draft for each of `requests`, empty where nothing like the text's end is remembered."""
        drafts = [self._draft(request.sequence, request.limit) for request in requests]
        self._queries += len(drafts)
        self._hits += sum(draft is not NO_DRAFT for draft in drafts)
        return drafts

    def take_use(self) -> PastUse:
        """Return the bytes in use, and the queries and hits since the last call."""
        use = PastUse(self.store.used, self._queries, self._hits)
        self._queries = self._hits = 0
        return use

    def warm(self, texts: Seq[list[int]]) -> None:
        """Draft from these texts, too, for everybody. Raises ConfigError if they take more than half of the bytes."""
        pieces = [text[at : at + _PIECE] for text in texts for at in range(0, len(text), _PIECE)]
        most = self.store.nbytes
        nbytes = CORPUS_TOKEN * sum(len(piece) + 1 for piece in pieces) + CORPUS_TOKEN * 4 * (_PIECE + 1)
        if nbytes > most // 2:
            raise ConfigError(
                f"suffix_corpus takes {nbytes} bytes, but may take half of suffix_memory ({most}): raise suffix_memory "
                "or leave out a part"
            )
        self.store, self.corpus = TextStore(most - nbytes, self._secret), TextStore(nbytes, self._secret)
        for piece in pieces:
            self.corpus.add(b"", piece)

    def release(self, sequence: Sequence) -> None:
        """Keep the text of a sequence that this drafter was allowed to draft for, and forget where it was followed."""
        self._trails.pop(sequence.id, None)
        if self.name in sequence.drafters:
            self.store.add(owner_of(sequence.request), sequence.tokens)

    def _draft(self, sequence: Sequence, limit: int) -> Draft:
        tokens = sequence.tokens
        trails = self._trails.get(sequence.id)
        if trails is None:
            own, shared = _Trail(owner_of(sequence.request), len(tokens)), _Trail(b"", len(tokens))
            trails = self._trails[sequence.id] = own, shared
        drafted, classes = trails[0].best(self.store, tokens, limit)
        if self.corpus is not None:
            others, kinds = trails[1].best(self.corpus, tokens, limit)
            if _first_is_right((others, kinds)) > _first_is_right((drafted, classes)):
                drafted, classes = others, [_CORPUS + kind for kind in kinds]
        return Draft(tuple(drafted), None, self.name, classes=tuple(classes)) if drafted else NO_DRAFT


def make(config: EngineConfig) -> SuffixMemoryDrafter:
    """Raise ConfigError for a `suffix_memory` that holds no text."""
    if not SMALLEST <= config.suffix_memory <= LARGEST:
        raise ConfigError(
            f"suffix_memory is {config.suffix_memory} bytes, but the drafter suffix-memory needs {SMALLEST} to "
            f"{LARGEST}: choose a size in between, or other drafters"
        )
    return SuffixMemoryDrafter(config.suffix_memory, config.suffix_draft_tokens or config.num_draft_tokens)


def owner_of(request: Request) -> bytes:
    """Return the name under which a request's text is kept: its tenant's and its salt's."""
    tenant = request.tenant.encode("utf-8", "surrogatepass")
    return blake2b(b"%d:%b%b" % (len(tenant), tenant, request.salt), digest_size=16).digest()


@dataclass(slots=True)
class _Trail:
    """Where a sequence's text is followed in its owner's past."""

    owner: bytes
    end: int
    """Tokens of the sequence that were followed."""
    space: int = 0
    places: list[int] = field(default_factory=list)
    """Places of the next token behind the longest matches, the latest first."""
    length: int = 0
    """Tokens that agree before them."""
    home: int = 0
    """The place of the next token in the earlier text that was followed for long; 0 if there is none. After a
    disagreement, the place of the first token that was not found again."""
    agreed: int = 0
    """Tokens that agree before `home`, since the last disagreement."""
    missed: int = 0
    """Tokens since the last disagreement; 0 once the text was found again."""

    def best(self, store: TextStore, tokens: list[int], limit: int) -> tuple[list[int], list[int]]:
        """Follow what was added to the text, and return the better of what may follow, with the class of each token."""
        self.follow(store, tokens)
        return max(self.vote(store, limit), self.go_back(store, limit), key=_first_is_right)

    def follow(self, store: TextStore, tokens: list[int]) -> None:
        """Follow what was added to the text."""
        space = store.space_of(self.owner)
        if space != self.space:  # its first text has come, or all of them are gone
            self.space, self.places, self.home, self.end = space, [], 0, len(tokens)
        if not space:
            return
        for at in range(max(self.end, len(tokens) - TAIL), len(tokens)):
            along = self.home in self.places
            self.places = [place + 1 for place in self.places if store.follows(space, place, tokens[at])]
            self.length += 1
            if self.home:
                self._follow_home(store, tokens[at], tokens[at - 1], along)
        self.end = len(tokens)
        if not self.places and (found := store.find(space, tokens[-TAIL:])):
            self.places, self.length = [match.place for match in found], found[0].length
        if self.places and self.length >= STEADY and (not self.home or self._elsewhere()):
            self.home, self.agreed, self.missed = self.places[0], self.length, 0

    def vote(self, store: TextStore, limit: int) -> tuple[list[int], list[int]]:
        """Return what most occurrences go on with, token by token, and the class of evidence of each."""
        count = min(limit, 2 * self.length + SURPLUS)
        level = 8 * sum(self.length >= length for length in LENGTHS)
        left = [following for place in self.places if (following := store.read(self.space, place, count))]
        tokens: list[int] = []
        classes: list[int] = []
        while left:
            at, seen = len(tokens), len(left)
            if all(each == left[0] for each in left):
                rest = left[0][at:]
                return tokens + rest, classes + [level + _share(seen, seen)] * len(rest)
            votes: dict[int, int] = {}
            for each in left:
                votes[each[at]] = votes.get(each[at], 0) + 1
            token = max(votes, key=votes.__getitem__)  # of equals the first, which is the latest
            tokens.append(token)
            classes.append(level + _share(votes[token], seen))
            left = [each for each in left if each[at] == token and len(each) > at + 1]
        return tokens, classes

    def go_back(self, store: TextStore, limit: int) -> tuple[list[int], list[int]]:
        """As `vote`, from a place that was returned to, or where one token may have been replaced."""
        if not self.home or self.missed > 1 or self.home in self.places:
            return [], []
        tokens = store.read(self.space, self.home + self.missed, min(limit, 2 * self.agreed + SURPLUS))
        kind = _BACK + (0 if self.missed else self.agreed.bit_length())
        return tokens, [kind] * len(tokens)

    def _elsewhere(self) -> bool:
        """Return whether the longest matches are so much longer that the text is no longer the one at `home`."""
        return self.home not in self.places and (self.missed > NEAR or self.length >= 2 * (self.agreed + STEADY))

    def _follow_home(self, store: TextStore, token: int, before: int, along: bool) -> None:
        """Follow the text at `home` by one token. `along`: whether its place was among the longest matches."""
        if not self.missed and store.follows(self.space, self.home, token):
            self.home, self.agreed = self.home + 1, self.agreed + 1
            return
        if along and self.places:  # others that agreed as long have the token
            self.home, self.agreed = self.places[0], self.length
            return
        ahead = store.read(self.space, self.home, FAR)
        found = _found(ahead, token, before, self.missed)
        if found:
            self.home, self.agreed, self.missed = self.home + found[0], found[1], 0
            return
        self.agreed, self.missed = 0, self.missed + 1
        if self.missed > LOST:
            self.home = 0


def _found(ahead: list[int], token: int, before: int, missed: int) -> tuple[int, int] | None:
    """Return the place, counted from the beginning of `ahead`, behind a text's last token, and how many of its tokens
    agree there: its last two, or the last alone."""
    if missed == 1 and ahead[1:2] == [token]:
        return 2, 1
    pairs = [at for at in range(1, len(ahead)) if ahead[at] == token and ahead[at - 1] == before]
    if pairs:
        return pairs[0] + 1, 2
    return (ahead.index(token) + 1, 1) if token in ahead[:NEAR] else None


def _first_is_right(draft: tuple[list[int], list[int]]) -> float:
    """Return how often the first token of such a draft is right."""
    _, classes = draft
    if not classes:
        return 0.0
    if classes[0] >= _BACK:
        return RETURNED[min(classes[0] - _BACK, len(RETURNED) - 1)]
    share = classes[0] % 8
    return UNANIMOUS if share < 4 else MAJORITIES[share - 4]


def _share(votes: int, seen: int) -> int:
    """Return the class of a token that `votes` of `seen` occurrences have."""
    if votes == seen:
        return min(seen, 3)
    return 4 + (2 * votes > seen) + (4 * votes > 3 * seen)
