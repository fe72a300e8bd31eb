"""Values: a model's hyperparameters as one of its files names them, config.json's or a GGUF header's.

The file may come from anywhere: what is read with a type has that type, or a ModelError names it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from pilotfish.errors import ModelError

LARGEST = 2**31 - 1
"""The largest size that is plausible of anything: tensors are checked against it before they are read."""


@dataclass(frozen=True, slots=True)
class Values:
    path: Path
    """The file that they come from, for error messages."""
    raw: Mapping[str, Any]
    prefix: str = ""
    """Prefix of every name in `raw`."""

    def get(self, name: str, default: Any = None) -> Any:
        return self.raw.get(self.prefix + name, default)

    def size(self, name: str, default: int | None = None, most: int = LARGEST) -> int:
        """A positive integer; `default` if it is missing or null. Raises ModelError for anything else."""
        value = default if self.get(name) is None else self.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            upper = f" of at most {most}" if isinstance(value, int) and value > most else ""
            raise self.error(f"{self.prefix}{name} is {value!r:.200}, but must be a positive number{upper}")
        return value

    def optional_size(self, name: str) -> int | None:
        """A positive integer; None if it is missing, null or 0. Raises ModelError for anything else."""
        return None if self.get(name) in (None, 0) else self.size(name)

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number; `default` if it is missing or null. Raises ModelError for anything else."""
        value = default if self.get(name) is None else self.get(name)
        if value is None or not _is_number(value):
            raise self.error(f"{self.prefix}{name} is {value!r:.200}, but must be a number")
        return float(value)

    def positive(self, name: str, default: float | None = None) -> float:
        """As `number`, of more than 0."""
        value = self.number(name, default)
        if value <= 0:
            raise self.error(f"{self.prefix}{name} is {value!r}, but must be a positive number")
        return value

    def optional_number(self, name: str) -> float | None:
        """A finite number; None if it is missing or null. Raises ModelError for anything else."""
        return None if self.get(name) is None else self.number(name)

    def numbers(self, name: str, default: Sequence[float] | None = None) -> tuple[float, ...]:
        """A list of finite numbers; `default` if it is missing or null. Raises ModelError for anything else."""
        value = self.get(name)
        if value is None and default is not None:
            return tuple(default)
        if not isinstance(value, list) or not all(map(_is_number, value)):
            raise self.error(f"{self.prefix}{name} is {value!r:.200}, but must be a list of numbers")
        return tuple(map(float, value))

    def texts(self, name: str) -> list[str]:
        """A list of strings; empty if it is missing or null. Raises ModelError for anything else."""
        value = [] if self.get(name) is None else self.get(name)
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise self.error(f"{self.prefix}{name} is {value!r:.200}, but must be a list of strings")
        return value

    def id(self, name: str) -> int | None:
        """A token's id; None if it is missing or null. Raises ModelError for anything else."""
        value: int | None = self.get(name)
        if value is not None and not is_id(value):
            raise self.error(f"{self.prefix}{name} is {value!r:.200}, but must be a token's id")
        return value

    def within(self, name: str) -> Values:
        """The values of an object in this one; none if it is missing or null. Raises ModelError for anything else."""
        value = {} if self.get(name) is None else self.get(name)
        if not isinstance(value, dict):
            raise self.error(f"{self.prefix}{name} is {value!r:.200}, but must be an object")
        return Values(self.path, value)

    def error(self, text: str) -> ModelError:
        """A ModelError about the file."""
        return ModelError(f"{self.path}: {text}")


def is_id(value: Any) -> bool:
    """Whether a value is a token's id."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isfinite(value) if isinstance(value, float) else abs(value) <= 2**63
