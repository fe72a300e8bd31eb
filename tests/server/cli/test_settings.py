"""Flags and YAML files: one schema, and errors that name the setting."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pilotfish.engine.config import EngineConfig
from pilotfish.errors import ConfigError
from pilotfish.server.cli import main as cli
from pilotfish.server.cli import sources
from pilotfish.server.cli.settings import parse_size, settings_of
from pilotfish.server.cli.sources import API_KEY_VARIABLE
from pilotfish.server.config import ServerConfig


def read(*flags: str) -> tuple[EngineConfig, ServerConfig]:
    found = sources.read(vars(cli._parser().parse_args(["serve", *flags])))
    return found.engine, found.server


@pytest.fixture
def yaml_file(tmp_path: Path) -> Path:
    path = tmp_path / "settings.yaml"
    path.write_text(
        "model: llama\nspeculation: none\nkv-cache-memory: 512MiB\nport: 9000\napi_key: secret\nprefix_caching: false\n"
        "drain_timeout: 5\n"
    )
    return path


def test_nothing_given_is_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    assert read() == (EngineConfig(), ServerConfig())


def test_every_field_has_a_flag_and_its_default_is_the_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    help_text = subprocess.run(
        [sys.executable, "-m", "pilotfish.server.cli.main", "serve", "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for config in (EngineConfig, ServerConfig):
        assert [setting.name for setting in settings_of(config)] == list(config.__struct_fields__)
        for setting in settings_of(config):
            assert setting.flag in help_text
            assert setting.help
            assert "".join(setting.help.split()) in "".join(help_text.split())  # the field's docstring


def test_flags_win_over_the_file_and_the_file_over_the_defaults(yaml_file: Path) -> None:
    engine, server = read("--config", str(yaml_file), "--port", "9001", "--no-prefix-caching", "--speculation", "ngram")
    assert (engine.model, engine.speculation, engine.prefix_caching) == ("llama", "ngram", False)
    assert engine.kv_cache_memory == 512 * 2**20
    assert engine.block_size == EngineConfig().block_size
    assert (server.port, server.drain_timeout) == (9001, 5.0)


def test_keys_come_from_flags_and_the_environment(yaml_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_KEY_VARIABLE, "third")
    assert read("--api-key", "first", "--api-key", "second")[1].api_key == ("first", "second", "third")
    assert read("--config", str(yaml_file))[1].api_key == ("secret", "third")


@pytest.mark.parametrize(
    ("text", "size"), [("4096", 4096), ("512MiB", 2**29), ("2GB", 2 * 10**9), ("1.5g", 1_500_000_000), ("1 KiB", 1024)]
)
def test_sizes_have_units(text: str, size: int) -> None:
    assert parse_size(text) == size
    assert read("--kv-cache-memory", text)[0].kv_cache_memory == size


@pytest.mark.parametrize("text", ["", "lots", "-1", "5XB", "1e9", "0x10"])
def test_an_invalid_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "70000"], "port is 70000: expected `int` <= 65535"),
        (["--max-num-seqs", "-1"], "max_num_seqs is -1: expected `int` >= 0"),
        (["--kv-cache-share", "1.5"], "kv_cache_share is 1.5"),
        (["--drafter", "auto=some/model"], "a draft model cannot be called 'auto'"),
        (["--drafter", "ngram", "--drafter", "ngram"], "drafter has 'ngram' twice"),
        (["--drafter", ""], "drafter is empty"),
        (["--ngram-min", "5", "--ngram-max", "2"], "ngram_min"),
        (["--api-key", " "], "api_key is empty"),
        (["--config", "/nowhere.yaml"], "cannot read the settings in /nowhere.yaml"),
    ],
)
def test_a_setting_that_cannot_work_is_named(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["serve", *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("max_num_sequences: 4", "'max_num_sequences', which is not a setting: did you mean 'max_num_seqs'?"),
        ("prot: 80", "did you mean 'port'?"),
        ("block_size: large", "block_size is 'large': expected `int`"),
        ("speculation: 3", "speculation is 3: expected `str`"),
        ("drafter: [ngram, 3]", "drafter is ['ngram', 3]: expected `str`"),
        ("- a\n- b", "must be a mapping"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_errors_in_a_file_are_explained(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as error:
        read("--config", str(path))
    assert message in str(error.value)


def test_drafters_from_flags_and_a_file(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("drafter: [suffix, small=org/small-model]\nspeculation: small")
    engine, _ = read("--config", str(path))
    assert (engine.drafter, engine.speculation) == (("suffix", "small=org/small-model"), "small")
    assert read("--drafter", "ngram", "--drafter", "a=b.gguf")[0].drafter == ("ngram", "a=b.gguf")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--speculation", "magic"),
            "speculation is 'magic', but with these drafters it can be one of 'auto', 'none', ",
        ),
        (("--drafter", "suffix", "--speculation", "ngram"), "'auto', 'none', 'suffix', 'prediction'"),
        (("--drafter", "LLAMA", "--drafter", "LLAMA"), "two drafters are called 'llama'"),
    ],
)
def test_drafters_are_checked_before_anything_is_loaded(
    flags: tuple[str, ...], message: str, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = [str(tiny_llama) if flag == "LLAMA" else flag for flag in flags]
    assert cli.main(["serve", "--model", str(tiny_llama), "--port", "0", *named]) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_draft_model_is_status_1(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--model", str(tiny_llama), "--port", "0", "--drafter", "smollm-135m"]) == 1
    assert "did you mean 'smollm2-135m'?" in capsys.readouterr().err


def test_a_port_that_is_taken_is_found_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert cli.main(["serve", "--model", "no-such-model", "--port", port]) == 2
    assert f"cannot listen on 127.0.0.1, port {port}" in capsys.readouterr().err


def test_an_unknown_model_is_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--model", "smollm-135m", "--port", "0"]) == 1
    assert "did you mean 'smollm2-135m'?" in capsys.readouterr().err


@pytest.mark.process
def test_version_is_printed() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pilotfish.server.cli.main", "--version"], capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith("pilotfish ")


@pytest.mark.process
def test_the_server_imports_no_torch() -> None:
    program = "import sys; from pilotfish.server import app, serve; from pilotfish.server.cli import main"
    program += "; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
