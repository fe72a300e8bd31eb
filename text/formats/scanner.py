"""ObjectScanner: the keys and values of a JSON object that arrives in parts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Value:
    """A piece of the raw text of a value."""

    key: str
    text: str
    done: bool
    """Whether the value ends with this piece."""


class ObjectScanner:
    """Reads one JSON object, character by character, and returns pieces of its values as they arrive.

    It does not check the JSON: of malformed text it returns something, and all of `raw` is kept for the caller.
    """

    def __init__(self) -> None:
        self.over = False
        self._depth = 0
        self._in_string = self._escaped = False
        self._key: str | None = None
        """The key whose value is being read."""
        self._word = ""
        """The raw text of a key."""
        self._value = ""
        self._begun = False

    def feed(self, text: str) -> tuple[list[Value], str]:
        """Add text, which begins with "{" at first. Returns pieces of values, and the text after the object's end."""
        found: list[Value] = []
        for i, char in enumerate(text):
            self._step(char, found)
            if self.over:
                return found, text[i + 1 :]
        if self._key is not None and self._value:
            found.append(Value(self._key, self._value, False))
            self._value = ""
        return found, ""

    def _step(self, char: str, found: list[Value]) -> None:
        if self._in_string:
            self._add(char)
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._in_string = False
            return
        if char == '"':
            self._in_string = True
            self._add(char)
        elif char in "{[":
            self._depth += 1
            if self._depth > 1:
                self._add(char)
        elif char in "}]":
            self._depth -= 1
            if self._depth == 0:
                self._end_value(found)
                self.over = True
            else:
                self._add(char)
        elif self._depth == 1 and self._key is None and char == ":":
            self._key, self._word, self._begun = self._word.strip().strip('"'), "", False
        elif self._depth == 1 and char == ",":
            self._end_value(found)
        else:
            self._add(char)

    def _add(self, char: str) -> None:
        if self._key is None:
            self._word += char
        elif self._begun or not char.isspace():
            self._begun = True
            self._value += char

    def _end_value(self, found: list[Value]) -> None:
        if self._key is not None:
            found.append(Value(self._key, self._value, True))
        self._key, self._value, self._word = None, "", ""
