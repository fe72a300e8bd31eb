"""Prompts for measurements: JSON lines from files or from the package, and their token ids."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pilotfish.errors import ConfigError

if TYPE_CHECKING:
    from pilotfish.text.tokenizer import Tokenizer

BUILT_IN = "built-in"


def read_suites(paths: list[str], questions: int) -> dict[str, list[str]]:
    """Read up to `questions` prompts of each file, spread evenly over it, by the file's stem. Without files, read the
    package's own prompts.

    Each line is an object with "prompt", a string, or "turns", a list whose first item is taken. Raises ConfigError.
    """
    if not paths:
        text = resources.files("pilotfish.server.cli").joinpath("prompts.jsonl").read_text(encoding="utf-8")
        return {BUILT_IN: _spread(_prompts(text, BUILT_IN), questions)}
    suites: dict[str, list[str]] = {}
    for path in map(Path, paths):
        if path.stem in suites:
            raise ConfigError(f"prompts has two files of the name {path.stem!r}: rename one, names tell suites apart")
        suites[path.stem] = _spread(read_prompts(path), questions)
    return suites


def read_prompts(path: str | Path) -> list[str]:
    """Read all prompts of a file in `read_suites`' format. Raises ConfigError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the prompts in {path}: {error}") from error
    return _prompts(text, str(path))


def encode(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return a prompt's token ids; if the model has a chat template, as a user's message."""
    if tokenizer.chat_template is None:
        return tokenizer.encode(prompt)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
    return tokenizer.encode(chat, add_special_tokens=False)


def _prompts(text: str, name: str) -> list[str]:
    prompts = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            prompts.append(_prompt(json.loads(line)))
        except ValueError as error:
            raise ConfigError(
                f'line {number} of {name} is not a prompt: it must be a JSON object with "prompt", a string, or '
                f'"turns", a list of strings ({error})'
            ) from error
    if not prompts:
        raise ConfigError(f"there are no prompts in {name}")
    return prompts


def _prompt(row: Any) -> str:
    if not isinstance(row, dict):
        raise ValueError(f"it is a {type(row).__name__}")
    turns = row.get("turns")
    prompt = row.get("prompt", turns[0] if isinstance(turns, list) and turns else None)
    if not isinstance(prompt, str) or not prompt:
        raise ValueError(f"it has {', '.join(map(repr, row)) or 'nothing'}")
    return prompt


def _spread(prompts: list[str], count: int) -> list[str]:
    """Take `count` prompts evenly: files are often sorted by subject, so the first ones may be all alike."""
    count = min(count, len(prompts))
    return [prompts[i * len(prompts) // count] for i in range(count)]
