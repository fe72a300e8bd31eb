"""The models that are kept on this machine: those of the catalogue, and those of the hub in huggingface_hub's cache."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pilotfish.checkpoints.catalog import CATALOG, cache_folder
from pilotfish.errors import ModelError


@dataclass(frozen=True, slots=True)
class Kept:
    name: str
    size: int
    """Bytes on the disk."""
    path: Path


def kept_models() -> list[Kept]:
    """Return the models that are kept, by name."""
    found = []
    for entry in CATALOG:
        folder = cache_folder() / "models" / entry.name
        if any(folder.glob("*.gguf")):
            found.append(Kept(entry.name, _size(folder), folder))
    for repo in _hub():
        found.append(Kept(repo.repo_id, repo.size_on_disk, Path(repo.repo_path)))
    return sorted(found, key=lambda kept: kept.name)


def remove(name: str) -> int:
    """Delete a model's files; return their bytes. Raises ModelError for one that is not kept."""
    found = next((kept for kept in kept_models() if kept.name == name), None)
    if found is None:
        known = ", ".join(kept.name for kept in kept_models()) or "none"
        raise ModelError(f"no model {name!r} is kept here: there are {known}")
    try:
        shutil.rmtree(found.path)
    except OSError as error:
        raise ModelError(f"cannot delete {found.path}: {error}") from error
    return found.size


def _hub() -> list[Any]:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        return [repo for repo in scan_cache_dir().repos if repo.repo_type == "model" and repo.size_on_disk]
    except CacheNotFound:
        return []


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
