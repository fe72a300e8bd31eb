"""Converts a GGUF file's vocabulary, or a slow tokenizer's files, to a tokenizer.json in the cache.

transformers does the conversion, but takes seconds and needs torch. So it runs once, in a child process
(`python -m pilotfish.text.conversion SOURCE FOLDER`), and the API process imports no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pilotfish.checkpoints.catalog import ModelFiles, cache_folder
from pilotfish.errors import ModelError

REVISION = 2
"""Incremented when the conversion changes, so that older results are not used."""
SUMS = "sha256.json"
"""File with the digests of the others in a folder of the cache."""
SUFFIXES = frozenset({".jinja", ".json", ".model", ".txt"})
"""Suffixes of the files in a folder that a tokenizer is converted from."""


def tokenizer_folder(files: ModelFiles) -> Path:
    """Return the folder with the tokenizer.json of a model, converting it where it has none. Raises ModelError."""
    if files.format == "gguf" or not (files.path / "tokenizer.json").is_file():
        return converted_folder(files)
    return files.path


def converted_folder(files: ModelFiles) -> Path:
    """Return a folder with a tokenizer.json for `files`, converting it if it is not whole in the cache. Raises
    ModelError."""
    target = cache_folder() / "tokenizers" / f"{files.path.stem}-{_fingerprint(files)}"
    if _whole(target):
        return target
    try:
        return _converted(files, target)
    except OSError as error:
        raise ModelError(
            f"cannot keep the tokenizer of {files.name!r} in {target.parent}: {error}; set PILOTFISH_CACHE to another "
            "folder"
        ) from error


def _converted(files: ModelFiles, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".converting-") as temporary:
        folder = Path(temporary) / "tokenizer"
        command = [sys.executable, "-m", "pilotfish.text.conversion", str(files.path), str(folder)]
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, env=_environment()
        )
        if result.returncode != 0:
            lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
            raise ModelError(f"cannot convert the tokenizer of {files.path}: {lines[-1]}")
        (folder / SUMS).write_text(json.dumps(_sums(folder)))
        if target.exists() and not _whole(target):
            os.rename(target, Path(temporary) / "damaged")
        # Another process may have been faster: its folder is equivalent.
        with contextlib.suppress(OSError):
            os.rename(folder, target)
    if not _whole(target):
        raise OSError(f"{target} was not written")
    return target


def _sums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file in the folder by its name, but for that of these sums."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.name != SUMS}


def _whole(folder: Path) -> bool:
    """Return whether a folder in the cache is as it was written."""
    try:
        wanted = json.loads((folder / SUMS).read_bytes())
        return "tokenizer.json" in wanted and wanted == _sums(folder)
    except (OSError, ValueError, TypeError):
        return False


def _environment() -> dict[str, str]:
    """Return the child's environment, in which it finds the same packages as this process."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "HF_HUB_OFFLINE": "1"}


def _fingerprint(files: ModelFiles) -> str:
    """Return a digest of the files that a tokenizer is converted from, and of the versions that convert it."""
    sources = [files.path]
    if files.format != "gguf":
        sources = sorted(path for path in files.path.iterdir() if path.suffix in SUFFIXES)
    digest = hashlib.sha256(f"{REVISION} {version('transformers')}".encode())
    for path in sources:
        status = path.stat()
        digest.update(f" {path.resolve()} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def convert(source: Path, folder: Path) -> None:
    """Write tokenizer.json, its configuration and chat template, and generation_config.json into `folder`."""
    from transformers import AutoTokenizer

    if source.is_dir():
        found = AutoTokenizer.from_pretrained(str(source), local_files_only=True, trust_remote_code=False)
        found.save_pretrained(str(folder))
        for name in ("config.json", "generation_config.json"):
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        return
    from pilotfish.checkpoints.gguf_header import eos_token_ids, read_header

    tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name, local_files_only=True)
    header = read_header(source)
    _add_special_tokens(tokenizer, header.metadata)
    tokenizer.save_pretrained(str(folder))
    ending = {"eos_token_id": list(eos_token_ids(header))}
    (folder / "generation_config.json").write_text(json.dumps(ending))


def _add_special_tokens(tokenizer: Any, metadata: dict[str, Any]) -> None:
    """Add begin- and end-of-text tokens to encoded text if the GGUF file asks for them, which transformers ignores.

    Without a setting in the file, llama.cpp's defaults apply: a begin-of-text token for SentencePiece and Llama 3.
    """
    from tokenizers.processors import TemplateProcessing

    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    bos = metadata.get("tokenizer.ggml.add_bos_token", kind == "llama" or pre in ("llama3", "llama-v3", "llama-bpe"))
    eos = metadata.get("tokenizer.ggml.add_eos_token", False)
    before = [(tokenizer.bos_token, tokenizer.bos_token_id)] if bos and tokenizer.bos_token_id is not None else []
    after = [(tokenizer.eos_token, tokenizer.eos_token_id)] if eos and tokenizer.eos_token_id is not None else []
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*(token for token, _ in before), "$A", *(token for token, _ in after)], special_tokens=[*before, *after]
    )


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
