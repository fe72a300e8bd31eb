"""SuffixDrafter: drafts what most often followed the longest suffix of the text that occurred before, of any length.

The text is kept as a suffix automaton (Blumer, Blumer, Haussler, Ehrenfeucht, Chen, Seiferas, 1985), which grows with
each token. That a text's own repeated suffixes make good drafts is SuffixDecoding's observation (arXiv 2411.04975).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pilotfish.engine.config import EngineConfig
from pilotfish.engine.draft import NO_DRAFT, Draft
from pilotfish.engine.sequence import Sequence
from pilotfish.engine.speculation.drafters.drafter import DraftRequest

COUNTED = 32
"""Classes of suffixes whose counts a new token updates, longest first. A text that repeats one token has as many as it
has tokens, which would take quadratic time; there the counts of its shortest suffixes lag behind."""
MOST_TOKENS = 2**20
"""Tokens of all texts that are indexed, which take some 600 bytes each. A text that would be one too many gets no
drafts from this drafter until others have ended."""
STRONGEST = 8
"""Matches of up to this many tokens are a class of evidence each; longer ones are, by powers of two, up to LONGEST."""
LONGEST = 64


class SuffixDrafter:
    """Drafts what followed the longest suffix of the text that occurs earlier in it, in prompt or answer.

    Where it was followed by different tokens, the most frequent is taken, and of equally frequent ones the most recent;
    so it goes on token by token, as each lengthens the context. A copy that reaches the text's end goes on with what
    follows the longest suffix there, so a text of period p is continued with period p.

    A match of n tokens that was followed c times by its likeliest token gets a draft of 2n + c tokens; its evidence is
    n up to 8, then 9 from 16 on, 10 from 32 on, 11 from 64 on. `longest`: maximum tokens of a draft.

    Time is amortized O(1) for a token of text, memory proportional to the tokens: at most two states each, of
    at most MOST_TOKENS tokens.
    """

    name = "suffix"

    def __init__(self, longest: int = 8) -> None:
        self.longest = longest
        self._automata: dict[str, _Automaton] = {}

    def propose(self, requests: list[DraftRequest]) -> list[Draft]:
        """Return one Draft for each of `requests`, empty if the last token is new to the text."""
        return [self._draft(request.sequence, request.limit) for request in requests]

    def release(self, sequence: Sequence) -> None:
        """Forget the sequence's automaton."""
        self._automata.pop(sequence.id, None)

    def _draft(self, sequence: Sequence, limit: int) -> Draft:
        automaton = self._automata.get(sequence.id)
        if automaton is None:
            if sum(each.end for each in self._automata.values()) + len(sequence.tokens) > MOST_TOKENS:
                return NO_DRAFT
            automaton = self._automata[sequence.id] = _Automaton()
        automaton.extend(sequence.tokens[automaton.end :])
        context = automaton.repeated
        if not context:
            return NO_DRAFT
        matched = automaton.lengths[context]
        length = min(limit, 2 * matched + automaton.followed(context))
        return Draft(automaton.walk(context, length), None, self.name, _evidence(matched))


def make(config: EngineConfig) -> SuffixDrafter:
    return SuffixDrafter(config.suffix_draft_tokens or config.num_draft_tokens)


def _evidence(matched: int) -> int:
    if matched <= STRONGEST:
        return matched
    return STRONGEST + min(matched, LONGEST).bit_length() - STRONGEST.bit_length()


@dataclass(slots=True)
class _Automaton:
    """The suffix automaton of the tokens so far. State 0 is the root, and a state stands for the substrings that end at
    the same positions; the lists have an entry for each state."""

    following: list[dict[int, int]] = field(default_factory=lambda: [{}])
    """The state after each token that has followed."""
    links: list[int] = field(default_factory=lambda: [-1])
    """The state of the longest suffix that ends at more positions; -1 of the root."""
    lengths: list[int] = field(default_factory=lambda: [0])
    """Tokens of the state's longest string."""
    counts: list[int] = field(default_factory=lambda: [0])
    """Number of positions at which the state's strings end."""
    best: list[int] = field(default_factory=lambda: [-1])
    """The token that followed most often, the most recent of equals; -1 if none has."""
    last: int = 0
    """The state of the whole text."""
    end: int = 0
    """Number of tokens of the text."""

    @property
    def repeated(self) -> int:
        """The state of the longest suffix that also occurs earlier; 0 if none does."""
        return max(0, self.links[self.last])

    def followed(self, state: int) -> int:
        """Return how often the state's best token has followed it."""
        return self.counts[self.following[state][self.best[state]]]

    def walk(self, state: int, count: int) -> tuple[int, ...]:
        """Return `count` tokens from a state that has followers, each the best after those before it."""
        tokens = []
        for _ in range(count):
            token = self.best[state]
            if token < 0:  # the text's end
                state = self.links[state]
                token = self.best[state]
            tokens.append(token)
            state = self.following[state][token]
        return tuple(tokens)

    def extend(self, tokens: list[int]) -> None:
        following, links, lengths, counts, best = self.following, self.links, self.lengths, self.counts, self.best
        for token in tokens:
            self.end += 1
            state, before = len(links), self.last
            self._add(self.end, 0, {}, 0, -1)
            node = before
            while node >= 0 and token not in following[node]:
                following[node][token] = state
                if best[node] < 0:
                    best[node] = token
                node = links[node]
            if node >= 0:
                shared = following[node][token]
                fits = lengths[shared] == lengths[node] + 1
                links[state] = shared if fits else self._split(shared, node, token)
            self.last = state
            # First count the suffixes that end here, then update the best followers of those that the token followed.
            for _ in range(COUNTED):
                if state <= 0:
                    break
                counts[state] += 1
                state = links[state]
            for _ in range(COUNTED):
                if before <= 0:
                    break
                after = following[before]
                if counts[after[token]] >= counts[after[best[before]]]:
                    best[before] = token
                before = links[before]

    def _split(self, shared: int, node: int, token: int) -> int:
        """Give the strings of `shared` that are no longer than that of `node` with `token` a state of their own."""
        following, links = self.following, self.links
        own = len(links)
        self._add(
            self.lengths[node] + 1, links[shared], following[shared].copy(), self.counts[shared], self.best[shared]
        )
        links[shared] = own
        while node >= 0 and following[node].get(token) == shared:
            following[node][token] = own
            node = links[node]
        return own

    def _add(self, length: int, link: int, following: dict[int, int], count: int, best: int) -> None:
        self.lengths.append(length)
        self.links.append(link)
        self.following.append(following)
        self.counts.append(count)
        self.best.append(best)
