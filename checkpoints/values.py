"""Values: a model's hyperparameters as one of its files names them, config.json's or a GGUF header's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pilotfish.errors import ModelError


@dataclass(frozen=True, slots=True)
class Values:
    path: Path
    """The file that they come from, for error messages."""
    raw: Mapping[str, Any]
    prefix: str = ""
    """Prefix of every name in `raw`."""

    def get(self, name: str, default: Any = None) -> Any:
        return self.raw.get(self.prefix + name, default)

    def size(self, name: str, default: int | None = None) -> int:
        """A positive integer; `default` if it is missing or null. Raises ModelError for anything else."""
        value = default if self.get(name) is None else self.get(name)
        if not isinstance(value, int) or value < 1:
            raise self.error(f"{self.prefix}{name} is {value!r}, but must be a positive number")
        return value

    def error(self, text: str) -> ModelError:
        """A ModelError about the file."""
        return ModelError(f"{self.path}: {text}")
