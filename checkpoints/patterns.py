"""Regular expressions that come with a model's files, matched with the names of its modules.

Python's `re` takes exponential time for some patterns, such as (a+)+$. Only such are taken as need time that is
polynomial in a name's length, of a low degree.
"""

from __future__ import annotations

import re
from functools import lru_cache

LONGEST = 1000
MOST_REPEATS = 2
"""Unbounded repetitions in a pattern."""

_REPEATED_GROUP = re.compile(r"\)[*+?{]")
_SPECIAL_GROUP = re.compile(r"\(\?(?!:)|\\[1-9]")
_REPEAT = re.compile(r"(?<!\\)[*+{]")


@lru_cache(maxsize=1024)
def module_pattern(text: str) -> re.Pattern[str]:
    """The compiled pattern. Raises ValueError for one that is none, or that could take long."""
    if len(text) > LONGEST:
        raise ValueError(f"the pattern {text[:80]!r}... has {len(text)} characters, but may have {LONGEST}")
    if _REPEATED_GROUP.search(text) or _SPECIAL_GROUP.search(text):
        raise ValueError(f"the pattern {text!r:.200} repeats a group, looks around or refers back, which can take long")
    if len(_REPEAT.findall(text)) > MOST_REPEATS:
        raise ValueError(f"the pattern {text!r:.200} has more than {MOST_REPEATS} repetitions, which can take long")
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"the pattern {text!r:.200} is not valid: {error}") from error
