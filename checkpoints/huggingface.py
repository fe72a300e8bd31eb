"""A Hugging Face folder's JSON files, read without torch or transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pilotfish.checkpoints.values import is_id
from pilotfish.errors import ModelError

LARGEST = 2**22
"""Bytes of a file. Configurations have a few thousand; decoded, a file can take thirty times its size."""


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file whose top level is an object. Raises ModelError for any other file."""
    try:
        if (size := path.stat().st_size) > LARGEST:
            raise ModelError(f"{path} has {size} bytes, but may have {LARGEST}")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    except RecursionError as error:
        raise ModelError(f"{path} has lists or objects that are nested too deep") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} has {type(value).__name__} at its top, but must have an object")
    return value


def eos_token_ids(folder: Path) -> tuple[int, ...]:
    """Returns the ids of the tokens that end a text: generation_config.json's if it has any, else config.json's. Raises
    ModelError for what are no ids."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if path.is_file():
            ids = read_json(path).get("eos_token_id")
            if ids is not None:
                return checked_ids(path, ids)
    return ()


def checked_ids(path: Path, found: Any) -> tuple[int, ...]:
    """The ids that `eos_token_id` gives, one or several. Raises ModelError for anything else."""
    ids = found if isinstance(found, list) else [found]
    if not all(map(is_id, ids)):
        raise ModelError(f"{path}: eos_token_id is {found!r:.200}, but must be a token's id or a list of them")
    return tuple(ids)


EAGLE3_ARCHITECTURES = ("LlamaForCausalLMEagle3", "Eagle3Speculator", "Eagle3DraftModel")


def is_eagle3(folder: Path) -> bool:
    """Returns whether a folder's config.json is an EAGLE-3 head's. Raises ModelError if there is none to be read."""
    raw, named = _architectures(folder)
    return any(name in EAGLE3_ARCHITECTURES for name in named) or raw.get("speculators_model_type") == "eagle3"


DFLASH_ARCHITECTURES = ("DFlashDraftModel", "DFlashSpeculator", "Qwen3DSparkModel", "DSparkSpeculator")
"""Qwen3DSparkModel is DeepSpec's name of both kinds: a DFlash drafter is one without a sequential head."""


def is_dflash(folder: Path) -> bool:
    """Returns whether a folder's config.json is a DFlash drafter's. Raises ModelError if there is none to be read."""
    return _block_drafter(folder) == "dflash"


def is_dspark(folder: Path) -> bool:
    """Returns whether a folder's config.json is a DSpark drafter's. Raises ModelError if there is none to be read."""
    return _block_drafter(folder) == "dspark"


def _block_drafter(folder: Path) -> str:
    raw, named = _architectures(folder)
    if kind := raw.get("speculators_model_type"):
        return str(kind)
    if "dflash_config" not in raw and not any(name in DFLASH_ARCHITECTURES for name in named):
        return ""
    return "dspark" if raw.get("markov_rank") else "dflash"


def head_kind(folder: Path) -> str:
    """Returns what kind of head a folder's config.json is of, in words: one that drafts for a model and is not one by
    itself; "" for anything else. Raises ModelError if there is none to be read."""
    kinds = ((is_eagle3, "an EAGLE-3 head"), (is_dflash, "a DFlash drafter"), (is_dspark, "a DSpark drafter"))
    return next((name for is_one, name in kinds if is_one(folder)), "")


def _architectures(folder: Path) -> tuple[dict[str, Any], list[Any]]:
    """Returns config.json and the architectures that it names. Raises ModelError."""
    path = folder / "config.json"
    raw = read_json(path)
    named = raw.get("architectures")
    if not isinstance(named, list | None):
        raise ModelError(f"{path}: architectures is {named!r:.200}, but must be a list of names")
    return raw, named or []
