"""Every function of a library that a GPU's path calls has the parameters that it is called with: read from the wheels
that pyproject.toml pins, which can be unpacked and read without a GPU."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from pilotfish.engine.layers.attention.flash import FLASH4_NEEDS
from tests.support.flash_attn_standin import REQUIRED, SIGNATURES
from tests.support.paths import ROOT

CUTE = "flash_attn/cute"


@pytest.fixture(scope="module")
def flash4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel of the flash-attn-4 that `pilotfish[cuda]` installs: half a megabyte."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pinned = extras["cuda"][0].partition(";")[0].strip().replace("[cu13]", "")
    folder = tmp_path_factory.mktemp("flash4")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--only-binary",
        ":all:",
        "-d",
        folder,
        pinned,
    ]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{pinned} cannot be downloaded here: {done.stderr[-200:]}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def signature(source: str, function: str) -> list[tuple[str, Any]]:
    """A function's parameters and their defaults, from its source: it is not imported."""
    (found,) = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == function]
    names = [argument.arg for argument in found.args.args]
    defaults = [ast.literal_eval(default) for default in found.args.defaults]
    return list(zip(names, [REQUIRED] * (len(names) - len(defaults)) + defaults, strict=True))


@pytest.mark.process
@pytest.mark.slow
def test_flash_attn_4(flash4: Path) -> None:
    (needed,) = FLASH4_NEEDS
    found = signature((flash4 / CUTE / "interface.py").read_text(), needed)
    assert found == SIGNATURES[f"flash_attn.cute.{needed}"]
    assert set(FLASH4_NEEDS[needed]) <= {name for name, _ in found}
    assert f"{needed}," in (flash4 / CUTE / "__init__.py").read_text()


@pytest.mark.process
@pytest.mark.slow
def test_what_the_rules_of_flash4_quote_is_there(flash4: Path) -> None:
    """Its own words for what it refuses, and the variables of its cache."""
    for file, words in {
        "interface.py": ("SplitKV not supported on SM 9.0", "page_size == tile_n", "Paged KV not supported on SM 12.0"),
        "flash_fwd_sm90.py": ("Paged KV does not support irregular head dim",),
        "flash_fwd_sm100.py": ("Paged KV does not support irregular head dim",),
        "cache_utils.py": ("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"),
    }.items():
        text = re.sub(r"\s+", " ", (flash4 / CUTE / file).read_text())
        for each in words:
            assert each in text, (file, each)


def test_torchs_product_in_fp8() -> None:
    """`torch._scaled_mm`, which is private: its operator's own schema, of any build of torch."""
    source = (ROOT / "engine" / "kernels" / "fp8.py").read_text()
    calls = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch._scaled_mm"
    ]
    assert calls
    parameters = [argument.name for argument in torch.ops.aten._scaled_mm.default._schema.arguments]
    for call in calls:
        assert {keyword.arg for keyword in call.keywords} <= set(parameters[len(call.args) :])
