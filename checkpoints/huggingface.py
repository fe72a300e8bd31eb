"""A Hugging Face folder's JSON files, read without torch or transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pilotfish.errors import ModelError


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file whose top level is an object. Raises ModelError for any other file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} has {type(value).__name__} at its top, but must have an object")
    return value


def eos_token_ids(folder: Path) -> tuple[int, ...]:
    """Returns the ids of the tokens that end a text: generation_config.json's if it has any, else config.json's."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            ids = read_json(folder / name).get("eos_token_id")
            if ids is not None:
                return tuple(ids) if isinstance(ids, list) else (ids,)
    return ()


EAGLE3_ARCHITECTURES = ("LlamaForCausalLMEagle3", "Eagle3Speculator", "Eagle3DraftModel")


def is_eagle3(folder: Path) -> bool:
    """Returns whether a folder's config.json is an EAGLE-3 head's. Raises ModelError if there is none to be read."""
    raw = read_json(folder / "config.json")
    named = any(name in EAGLE3_ARCHITECTURES for name in raw.get("architectures") or ())
    return named or raw.get("speculators_model_type") == "eagle3"
