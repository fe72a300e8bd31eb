"""The package as a user meets it: one import name, a lazy front page, and a wheel that holds every room."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import pilotfish
from tests.support.paths import ROOT

pytestmark = pytest.mark.process

ROOMS = sorted(path.name for path in (ROOT / "pilotfish").iterdir() if path.is_symlink())


def python(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)


def test_the_rooms_are_folders_at_the_top_of_the_repository() -> None:
    assert {"engine", "server"} <= set(ROOMS)
    for room in ROOMS:
        assert (ROOT / "pilotfish" / room).resolve() == ROOT / room


@pytest.mark.parametrize("room", ROOMS)
def test_from_the_repositorys_root_nothing_has_a_second_name(room: str) -> None:
    done = python(f"import {room}", ROOT)
    assert done.returncode == 1
    assert f"pilotfish.{room}" in done.stderr.splitlines()[-1]
    module = next(path.stem for path in (ROOT / room).glob("*.py") if path.stem != "__init__" or room == "tools")
    assert python(f"import {room}.{module}", ROOT).returncode == 1


@pytest.mark.parametrize("room", ROOMS)
def test_elsewhere_the_rooms_names_are_free(room: str, tmp_path: Path) -> None:
    program = f"import sys; sys.path = [path for path in sys.path if path != {str(ROOT)!r}]; import {room}"
    assert "ModuleNotFoundError" in python(program, tmp_path).stderr  # also where PYTHONPATH names the repository


def test_what_a_library_user_needs_is_there_and_costs_nothing_until_then(tmp_path: Path) -> None:
    program = (
        "import sys, pilotfish\n"
        "assert 'torch' not in sys.modules and 'msgspec' not in sys.modules\n"
        "from pilotfish import AsyncLLM, SamplingParams, __version__\n"
        "assert 'torch' not in sys.modules\n"
        "from pilotfish import LLM\n"
        "print(LLM.__module__, SamplingParams.__module__, __version__)"
    )
    done = python(program, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["pilotfish.library.llm", "pilotfish.engine.params", pilotfish.__version__], (
        done.stderr
    )


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'LLMs'"):
        _ = pilotfish.LLMs
    assert {"LLM", "AsyncLLM", "SamplingParams", "__version__"} <= set(dir(pilotfish))


@pytest.mark.slow
def test_a_wheel_holds_every_module_once_and_under_one_name(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        path = ROOT / name
        copy = source / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            copy.symlink_to(path.readlink())
        elif path.exists():
            copy.write_bytes(path.read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if not name.split("/")[0].endswith(".dist-info")}
    assert {name.split("/")[0] for name in held} == {"pilotfish"}
    rooms = {f"pilotfish/{name}" for name in tracked.split("\0") if name.split("/")[0] in ROOMS}
    assert rooms - held == set()
    assert any("_native" in name for name in held)
