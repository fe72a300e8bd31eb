"""The cache of converted tokenizers: whole, or made anew; and what is said where it cannot be kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from pilotfish.checkpoints.catalog import ModelFiles
from pilotfish.errors import ModelError
from pilotfish.text import conversion
from pilotfish.text.conversion import converted_folder
from pilotfish.text.tokenizer import load_tokenizer
from tests.support.tiny import build_model, train_tokenizer
from tests.support.tiny_gguf import write_gguf

pytestmark = pytest.mark.process


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelFiles:
    monkeypatch.setenv("PILOTFISH_CACHE", str(tmp_path / "cache"))
    path = write_gguf(build_model("llama2"), tmp_path / "model.gguf", tokenizer=train_tokenizer())
    return ModelFiles("model", "gguf", path)


def test_a_folder_that_was_changed_is_made_anew(files: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = converted_folder(files)
    wanted = load_tokenizer(files).encode("the sea")
    content = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_bytes(content.replace(b"a", b"b", 1))
    assert load_tokenizer(files).encode("the sea") == wanted
    assert (folder / "tokenizer.json").read_bytes() == content
    monkeypatch.setattr(conversion, "_converted", lambda files, target: pytest.fail("it is there"))
    assert converted_folder(files) == folder


def test_a_cache_that_cannot_be_written_is_named(files: ModelFiles, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(ModelError, match=r"cannot keep the tokenizer of 'model' in .*; set PILOTFISH_CACHE"):
        converted_folder(files)
