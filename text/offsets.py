"""Where the tokens of a text begin in it."""

from __future__ import annotations

from collections.abc import Sequence

from pilotfish.text.detokenizer import Detokenizer, Vocabulary


def token_offsets(text: str, ids: Sequence[int], vocabulary: Vocabulary) -> list[int]:
    """Return the number of characters of `text` before each of its tokens.

    Special tokens that the text spells are as long as their spelling there; those that the tokenizer has added, and the
    space that some tokenizers put before a text, are not part of it. A token within a character begins where that does.
    """
    detokenizer = Detokenizer(vocabulary, skip_special_tokens=False)
    at, offsets = 0, []
    for id_ in ids:
        offsets.append(at)
        part = detokenizer.feed((id_,))
        if text.startswith(part, at):
            at += len(part)
        elif vocabulary.is_special(id_):
            continue
        elif part[:1] == " " and text.startswith(part[1:], at):
            at += len(part) - 1
        else:  # the tokenizer normalizes texts
            at = min(at + len(part), len(text))
    return offsets
