"""The corpus: text files that are drafted from, as token ids."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from pilotfish.errors import ConfigError


def read_corpus(paths: Iterable[str], encode: Callable[[str], list[int]]) -> list[list[int]]:
    """Return the token ids of each file. Raises ConfigError for a file that cannot be read, or is no text in UTF-8."""
    texts = []
    for path in paths:
        try:
            texts.append(encode(Path(path).read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"suffix_corpus is {path!r}, which cannot be read as UTF-8 text: {error}") from error
    return texts
