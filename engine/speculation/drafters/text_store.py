"""TextStore: past texts of many owners in one ring of a fixed size, and where a context occurred in an owner's texts.

A cell holds a token together with the number of its owner's space, so that a comparison of cells is also one of owners:
what one owner looks up cannot match, and what it reads cannot be, another's text. No drafting here.

The index is that of LZ77 compressors: hash chains over the last few tokens (RFC 1951, section 4), whose candidates are
compared with the text itself.
"""

from __future__ import annotations

import secrets
from array import array
from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np

GRAM = 4
"""Tokens of the shortest match."""
LENGTHS = (GRAM, 8, 16, 32, 64)
"""Lengths by which matches are told apart."""
TRIED = 32
"""Candidates of a chain that are compared, the latest first."""
FOUND = 8
"""Maximum matches that are returned."""
TOKEN_BITS = 19
MOST_TOKENS = 1 << TOKEN_BITS
"""Token ids must be below this."""
MOST_SPACES = (1 << 32 - TOKEN_BITS) - 1
"""Maximum owners that have texts in a store. Space 0 is nobody's."""
SPACE_BYTES = 512
"""Maximum bytes of an owner's name and number, beside the ring."""
SMALLEST, LARGEST = 1 << 16, 1 << 34
"""Bytes of a store: less would hold no text worth the name, more could not be addressed by 32 bits."""

_CELL = 4
"""Bytes of a cell, and of an entry of the index."""
_WORD, _GOLDEN = (1 << 64) - 1, 0x9E3779B97F4A7C15


class Match(NamedTuple):
    """A place behind an occurrence of a context."""

    place: int
    length: int
    """Tokens that agree, rounded down to one of LENGTHS."""


class TextStore:
    """Keeps texts within `nbytes` bytes; a new one takes the place of the oldest.

    An answer that repeats an old text is a new text itself. So what is of use stays, and what was not repeated for the
    longest time goes first. Adding a token takes some 0.1 us, a lookup some 5 us, whatever the size.

    `secret`: by default one of the process, so that no client can aim at collisions of the index. Raises ValueError for
    a size outside [SMALLEST, LARGEST].
    """

    def __init__(self, nbytes: int, secret: int | None = None) -> None:
        if not SMALLEST <= nbytes <= LARGEST:
            raise ValueError(f"nbytes is {nbytes}, but must be between {SMALLEST} and {LARGEST}")
        bits = (nbytes // (3 * _CELL)).bit_length() - 1
        self._most_spaces = min(MOST_SPACES, nbytes // 16 // SPACE_BYTES)
        self._size = (nbytes - self._most_spaces * SPACE_BYTES - (_CELL << bits)) // (2 * _CELL)
        self._bytes = bytearray(_CELL * self._size)
        self._cells = np.frombuffer(self._bytes, np.uint32)
        """0 where nothing is; a text is a cell with its number of tokens, then `space << TOKEN_BITS | token` each."""
        self._heads = np.zeros(1 << bits, np.uint32)
        """By hash, the place behind the latest occurrence; 0: none."""
        self._earlier = np.zeros(self._size, np.uint32)
        """By place, that of the occurrence before."""
        self._cell, self._head, self._link = self._cells.data, self._heads.data, self._earlier.data
        self._shift = 64 - bits
        self._multiplier = (_GOLDEN ^ (secrets.randbits(64) if secret is None else secret)) & _WORD | 1
        # Cells ever written, and those of them that are gone. The place of a cell is its number modulo the size.
        self._written = self._gone = 0
        self._spaces: dict[bytes, int] = {}
        self._owners: dict[int, bytes] = {}
        self._unused = list(range(self._most_spaces, 0, -1))
        self._texts: dict[int, int] = {}  # by space, how many it has

    @property
    def nbytes(self) -> int:
        """Bytes that the store may take. Memory of a ring that was never full is not touched."""
        return len(self._bytes) + self._heads.nbytes + self._earlier.nbytes + self._most_spaces * SPACE_BYTES

    @property
    def tokens(self) -> int:
        """Cells that are in use: a token each, and one for each text."""
        return self._written - self._gone

    @property
    def used(self) -> int:
        """Bytes in use: those of `tokens` cells with their share of the index."""
        return self.tokens * self.nbytes // self._size

    @property
    def capacity(self) -> int:
        """Cells that there are."""
        return self._size

    def space_of(self, owner: bytes) -> int:
        """Return the number of the owner's space, or 0 if it has no text. It changes once all its texts are gone, and
        must not be kept."""
        return self._spaces.get(owner, 0)

    def add(self, owner: bytes, tokens: Seq[int]) -> None:
        """Add a text; of one longer than a quarter of the store, its end. Ignored if it is too short ever to match, or
        has token ids from MOST_TOKENS on."""
        tokens = tokens[max(0, len(tokens) - self._size // 4) :]
        if len(tokens) <= GRAM or max(tokens) >= MOST_TOKENS:
            return
        first = self._reserve(len(tokens) + 1)
        space = self._take_space(owner)
        cells = np.array(tokens, np.uint32) | np.uint32(space << TOKEN_BITS)
        self._cells[first] = len(tokens)
        self._cells[first + 1 : first + 1 + len(tokens)] = cells
        self._written += len(tokens) + 1
        self._texts[space] = self._texts.get(space, 0) + 1
        self._enter(cells, first + 1)

    def find(self, space: int, context: Seq[int]) -> list[Match]:
        """Return the places in a space's texts where its longest match with the end of `context` ends, as far as
        LENGTHS tell them apart: at most FOUND, the latest first."""
        recent = context[-LENGTHS[-1] :]
        if not space or len(recent) < GRAM or max(recent) >= MOST_TOKENS:
            return []
        base = space << TOKEN_BITS
        cells = [base | token for token in recent]
        wanted = array("I", cells).tobytes()
        texts, link = self._bytes, self._link
        place, age, found = self._head[self._slot(cells[-GRAM:])], -1, list[Match]()
        ends = [(length * _CELL, wanted[-length * _CELL :]) for length in LENGTHS if length * _CELL <= len(wanted)]
        most, level, written = len(ends) - 1, 0, self._written
        size, end = ends[0]
        for _ in range(TRIED):
            # Of what was overwritten, the chain may lead anywhere: earlier occurrences are older, or it ends.
            before, age = age, (written - place) % self._size
            if not place or age <= before:
                break
            stop = place * _CELL
            if texts[stop - size : stop] == end:
                while level < most and texts[stop - ends[level + 1][0] : stop] == ends[level + 1][1]:
                    level, found = level + 1, []
                    size, end = ends[level]
                if len(found) < FOUND:
                    found.append(Match(place, LENGTHS[level]))
                elif level == most:
                    break
            place = link[place]
        return found

    def follows(self, space: int, place: int, token: int) -> bool:
        """Return whether the space has this token at a place."""
        return place < self._size and self._cell[place] == space << TOKEN_BITS | token

    def read(self, space: int, place: int, count: int) -> list[int]:
        """Return at most `count` tokens from a place on, up to the end of what is the space's own text there."""
        found = []
        for cell in self._cell[place : place + count].tolist():
            if cell >> TOKEN_BITS != space:
                break
            found.append(cell & MOST_TOKENS - 1)
        return found

    def _take_space(self, owner: bytes) -> int:
        if (space := self._spaces.get(owner)) is not None:
            return space
        while not self._unused:
            self._drop_oldest()
        space = self._unused.pop()
        self._spaces[owner], self._owners[space] = space, owner
        return space

    def _reserve(self, count: int) -> int:
        """Return the place of `count` cells in a row that are free now."""
        if (left := self._size - self._written % self._size) < count:
            self._free(left)  # texts do not go on at the beginning
            self._written += left
        self._free(count)
        return self._written % self._size

    def _free(self, count: int) -> None:
        while self._size - self.tokens < count:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        first = self._gone % self._size
        if not (count := self._cell[first]):  # the rest of a lap
            self._gone += self._size - first
            return
        space = self._cell[first + 1] >> TOKEN_BITS
        # A number may be given to another owner once all texts are gone, so they must really be.
        self._cells[first : first + 1 + count] = 0
        self._gone += count + 1
        self._texts[space] -= 1
        if not self._texts[space]:
            del self._texts[space]
            del self._spaces[self._owners.pop(space)]
            self._unused.append(space)

    def _enter(self, cells: np.ndarray, first: int) -> None:
        """Index the cells of a text, which begin at place `first`."""
        parts = cells.astype(np.uint64)
        hashed = parts[: len(parts) - GRAM]
        for i in range(1, GRAM):
            hashed = hashed * np.uint64(self._multiplier) + parts[i : len(parts) - GRAM + i]
        slots = (hashed * np.uint64(self._multiplier)) >> np.uint64(self._shift)
        places = np.arange(first + GRAM, first + len(cells), dtype=np.uint32)
        # Of equal slots each leads to the one before it, and the first to what was there.
        order = np.argsort(slots, kind="stable")
        sorted_slots, sorted_places = slots[order], places[order]
        earlier = self._heads[sorted_slots]
        again = np.flatnonzero(sorted_slots[1:] == sorted_slots[:-1])
        earlier[again + 1] = sorted_places[again]
        self._earlier[sorted_places] = earlier
        last = np.append(sorted_slots[1:] != sorted_slots[:-1], True)
        self._heads[sorted_slots[last]] = sorted_places[last]

    def _slot(self, gram: Seq[int]) -> int:
        hashed = 0
        for cell in gram:
            hashed = hashed * self._multiplier + cell & _WORD
        return (hashed * self._multiplier & _WORD) >> self._shift
