"""run, chat, pull, list, rm and doctor: against a real model in this process and a scripted server."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console as Terminal

from pilotfish.checkpoints import cache
from pilotfish.checkpoints.catalog import CATALOG, CatalogEntry
from pilotfish.engine.request import Request
from pilotfish.errors import ConfigError
from pilotfish.server.cli import talk
from pilotfish.server.cli.chat import Conversation
from pilotfish.server.cli.main import main
from pilotfish.server.cli.talk import Bit, Message, Settings, show
from pilotfish.server.config import ServerConfig
from pilotfish.tools import doctor
from tests.support.http_server import listening
from tests.support.scripted_app import ScriptedApp
from tests.support.scripted_engine import say


class Echo:
    name = "echo"

    def __init__(self) -> None:
        self.asked: list[list[Message]] = []

    def answer(self, messages: Sequence[Message], settings: Settings) -> Iterator[Bit]:
        self.asked.append(list(messages))
        if messages[-1]["content"] == "fail":
            raise ConfigError("it failed")
        yield Bit("a", None)
        if messages[-1]["content"] == "stop":
            raise KeyboardInterrupt
        yield Bit("b", "ngram")


@pytest.fixture
def url() -> Iterator[str]:
    def script(request: Request) -> Any:
        return say(request, [5], [6, 7], drafted=3, accepted=1)

    with listening(ScriptedApp(script, ServerConfig(api_key=("secret",)))) as found:
        yield found


def conversation(out: Terminal | None = None) -> Conversation:
    return Conversation(Echo(), Settings(), out or Terminal(file=io.StringIO()))


def said(made: Conversation) -> str:
    assert isinstance(made.out.file, io.StringIO)
    return made.out.file.getvalue()


def test_run_answers_with_a_model_of_this_process(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for drafter in ("off", "ngram"):
        flags = ["--model", str(tiny_llama), "--max-tokens", "8", "--seed", "1", "--speculation", drafter]
        assert main(["run", "Hello", *flags]) == 0
        texts.append(capsys.readouterr().out)
    assert len(texts[0]) > 1
    assert texts[0] == texts[1]


def test_run_and_chat_ask_a_server(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["run", "Hello", "--url", f"{url}/v1", "--api-key", "secret", "--max-tokens", "3"]) == 0
    assert capsys.readouterr().out == " word5 word6 word7\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello"))
    assert main(["chat", "--url", url, "--api-key", "secret", "--max-tokens", "3"]) == 0
    assert capsys.readouterr().out == " word5 word6 word7\n"


@pytest.mark.parametrize(
    ("flags", "status", "reason"),
    [
        (["--api-key", "wrong"], 1, "Incorrect API key"),
        (["--api-key", "secret", "--temperature", "9"], 1, "temperature"),
        (["--api-key", "secret", "--url", "http://127.0.0.1:9"], 1, "pilotfish serve"),
        (["--url", "ftp://a"], 2, "http://"),
    ],
)
def test_errors_have_a_reason_and_a_status(
    url: str, flags: list[str], status: int, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "Hello", "--url", url, *flags]) == status
    assert reason in capsys.readouterr().err


def test_without_a_prompt_nothing_is_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("  \n"))
    assert main(["run"]) == 2
    assert "there is no prompt" in capsys.readouterr().err


def test_bits_are_cut_at_tokens() -> None:
    origins = [
        {"token": " a", "drafter": None},
        {"token": "\ufffd", "drafter": "x"},
        {"token": "b", "drafter": "ngram"},
    ]
    chunk = {"choices": [{"delta": {"content": " aéb"}, "provenance": origins}]}
    assert list(talk._bits(chunk)) == [Bit(" a", None), Bit("é", None), Bit("b", "ngram")]


def test_control_characters_reach_no_terminal_and_colours_only_one() -> None:
    for forced in (True, False):
        out = Terminal(file=io.StringIO(), force_terminal=forced, color_system="standard", width=80)
        assert show(out, iter([Bit("a\x1b[2J", "ngram"), Bit("\n", None)]), colours=True) == "a\x1b[2J\n"
        assert isinstance(out.file, io.StringIO)
        text = out.file.getvalue()
        assert ("\x1b[2J" in text) != forced
        assert ("\x1b[36m" in text) == forced


def test_a_conversation_goes_on_and_failed_messages_leave_it() -> None:
    made = conversation()
    assert made.take("/system Be brief.")
    assert all(map(made.take, ["one", "fail", "stop", "/again"]))
    roles = [[message["content"] for message in asked] for asked in made.partner.asked]  # type: ignore[attr-defined]
    assert roles[0] == ["Be brief.", "one"]
    assert roles[1] == ["Be brief.", "one", "ab", "fail"]
    assert roles[2] == ["Be brief.", "one", "ab", "stop"]
    assert roles[3] == roles[2]
    assert "it failed" in said(made)
    assert made.take("/clear")
    assert made.messages == []
    assert not made.take("/exit")


def test_settings_are_set_shown_and_refused() -> None:
    made = conversation()
    for line in ("/set temperature 0.2", "/set seed 5", "/set max_tokens none", "/set nothing 1", "/settings", "/what"):
        assert made.take(line)
    assert (made.settings.temperature, made.settings.seed, made.settings.max_tokens) == (0.2, 5, 512)
    text = said(made)
    for part in ("temperature: 0.2", "must be a number", "there is no setting 'nothing'", "/set NAME VALUE"):
        assert part in text
    assert made.take("/set seed")
    assert made.settings.seed is None


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CatalogEntry:
    """The catalogue's first model, in a cache of its own."""
    monkeypatch.setenv("PILOTFISH_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "_hub", list)
    folder = tmp_path / "models" / CATALOG[0].name
    folder.mkdir(parents=True)
    (folder / "a.gguf").write_bytes(b"0" * 2_000_000)
    return CATALOG[0]


def test_models_are_listed_and_deleted(kept: CatalogEntry, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    (line,) = capsys.readouterr().out.splitlines()[2:]
    assert [cell.strip() for cell in line.split("|")][1:3] == [kept.name, "2"]
    assert main(["list", "--all"]) == 0
    assert capsys.readouterr().out.count("not downloaded") == len(CATALOG) - 1
    assert main(["rm", kept.name]) == 0
    assert capsys.readouterr().out == f"{kept.name}: 2 MB deleted\n"
    assert main(["rm", kept.name]) == 1
    assert "is kept here" in capsys.readouterr().err
    assert main(["list"]) == 0
    assert "No model" in capsys.readouterr().out


def test_pull_finds_what_is_here(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pull", str(tiny_llama)]) == 0
    assert str(tiny_llama.resolve()) in capsys.readouterr().err
    assert main(["pull", "smollm2"]) == 1
    assert "did you mean" in capsys.readouterr().err


def test_doctor_says_what_is_here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "memory_bandwidth", lambda: 10e9)
    assert main(["doctor", "--json"]) == 0
    found = {each["what"]: each for each in json.loads(capsys.readouterr().out)}
    assert {"processor", "cores", "memory", "memory bandwidth", "CPU kernels", "torch", "GPU"} <= set(found)
    assert "10 tokens/s" in found["memory bandwidth"]["value"]
    monkeypatch.setattr(doctor, "unusable_gpu", lambda: "a GPU that does not work")
    assert main(["doctor"]) == 1
    report = capsys.readouterr().out
    assert "X GPU" in report
    assert "- GPU: install a torch" in report


def test_the_bandwidth_is_plausible() -> None:
    assert 1e8 < doctor.memory_bandwidth(2**22, 2) < 1e13


@pytest.mark.parametrize("command", ["run", "chat", "pull", "list", "rm", "doctor"])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert f"pilotfish {command}" in capsys.readouterr().out.partition("example:")[2]
