"""Grammar: a description of everything that an answer may be."""

from __future__ import annotations

import msgspec


class Grammar(msgspec.Struct, frozen=True):
    """A grammar of whole answers, in llguidance's form, ready to be compiled for a vocabulary."""

    source: str
    """llguidance's JSON (`{"grammars": [...]}`, the first is the one to start with), or a Lark text."""
