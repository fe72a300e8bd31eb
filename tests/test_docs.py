"""The documentation's tables against the code, so that neither can change alone; and its links."""

from __future__ import annotations

import re
import shlex
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from pydantic import BaseModel

from pilotfish.engine.config import EngineConfig, cache_share
from pilotfish.engine.memory.usage import RankMemory
from pilotfish.engine.models.registry import FAMILIES
from pilotfish.engine.request import EngineInfo
from pilotfish.engine.stats import StepStats
from pilotfish.server.cli.main import main
from pilotfish.server.cli.settings import Setting, settings_of
from pilotfish.server.cli.sources import read
from pilotfish.server.config import ServerConfig
from pilotfish.server.metrics import PHASES, POSITIONS, Metrics, Outcome
from pilotfish.server.protocol.chat import ChatRequest
from pilotfish.server.protocol.completions import CompletionRequest
from pilotfish.server.protocol.messages import MessagesRequest
from pilotfish.server.protocol.tokenization import DetokenizeRequest, TokenizeRequest
from pilotfish.server.protocol.usage import Timings
from pilotfish.text.formats.registry import CALL_FORMATS, HARMONY_NAMES, REASONING_FORMATS
from tests.support.paths import ROOT
from tests.support.scripted_app import ScriptedApp

PAGES = sorted([*ROOT.glob("*.md"), ROOT / "examples" / "README.md", *(ROOT / "docs").glob("*.md")])


def rows(page: str) -> list[list[str]]:
    """The cells of all table rows of a page, but for the lines below the heads."""
    lines = [line for line in (ROOT / "docs" / page).read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("|---")]


def code(cell: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]+)`", cell)


def used_metrics() -> Metrics:
    """Metrics after one of everything, so that all labels show."""
    metrics = Metrics()
    info: dict[str, Any] = dict.fromkeys(("model", "dtype", "device", "kernels"), "")
    info |= dict.fromkeys(("vocab_size", "max_model_len", "num_blocks", "block_size", "max_num_seqs"), 1)
    info |= {"drafters": ("ngram",), "default_drafter": "ngram"}
    memory = (RankMemory(rank=0, resident=1, gpu=1),)
    metrics.ready(EngineInfo(**info, eos_token_ids=(), load_seconds=0.0, memory=memory))
    counts: dict[str, Any] = dict.fromkeys(("running", "waiting", "rows", "prompt_tokens", "generated_tokens"), 1)
    blocks: dict[str, Any] = dict.fromkeys(("blocks_total", "blocks_used", "blocks_cached"), 1)
    drafted: dict[str, Any] = {"drafted": {"ngram": 1}, "accepted": {"ngram": 1}}
    drafted |= {"drafted_at": {"ngram": (1,)}, "accepted_at": {"ngram": (1,)}}
    metrics.step(StepStats(**counts, **blocks, **drafted, passed="captured", drawn_rows={"pass": 1}))
    metrics.responded("/v1/models", 200)
    metrics.tenant_used("alice", 1, 1)
    return metrics


def test_every_metric_is_documented() -> None:
    known = {}
    for family in used_metrics().registry.collect():
        if family.name.startswith("pilotfish_"):
            name = family.name + {"counter": "_total", "info": "_info"}.get(family.type, "")
            labels = {label for sample in family.samples for label in sample.labels} - {"le"}
            assert labels or family.samples, f"{name} has no samples, so its labels are not known"
            known[name] = (family.type, labels)
    documented = {
        names[0]: (cells[1], set(code(cells[2])))
        for cells in rows("metrics.md")
        if (names := code(cells[0])) and len(cells) == 5
    }
    assert documented == known


def test_values_of_labels_are_documented() -> None:
    meanings = {name[0]: set(code(cells[-1])) for cells in rows("metrics.md") if (name := code(cells[0]))}
    assert set(PHASES) == meanings["pilotfish_step_phase_seconds"]
    assert set(get_args(Outcome)) == meanings["pilotfish_requests_total"]
    assert {"1", str(POSITIONS), f"{POSITIONS + 1}+"} == meanings["pilotfish_position_drafted_tokens_total"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_metrics_that_are_named_exist(page: Path) -> None:
    known = {sample.name for family in used_metrics().registry.collect() for sample in family.samples}
    known |= {family.name for family in used_metrics().registry.collect()}
    for name in re.findall(r"\bpilotfish_[a-z_]+[a-z]", page.read_text()):
        assert name in known, name


def test_units_of_metrics_are_in_their_names() -> None:
    units = {"seconds", "bytes", "tokens", "tokens per second", "blocks", "sequences", "rows"}
    for cells in rows("metrics.md"):
        if len(cells) == 5 and code(cells[0]) and cells[3]:
            assert cells[3] in units
            words = code(cells[0])[0].split("_")
            assert set(cells[3].split()) <= set(words), cells[0]


def flags(setting: Setting) -> list[str]:
    both = isinstance(setting.type, msgspec.inspect.BoolType)
    return [setting.flag, f"--no-{setting.flag[2:]}"] if both else [setting.flag]


def default(setting: Setting) -> str:
    if isinstance(setting.type, msgspec.inspect.BoolType):
        return "on" if setting.default else "off"
    value = ", ".join(map(str, setting.default)) if isinstance(setting.default, tuple) else setting.default
    return "" if value in (None, "") else f"`{value}`"


def test_every_setting_is_documented_with_its_default() -> None:
    settings = (*settings_of(EngineConfig), *settings_of(ServerConfig))
    documented = [(code(flag), value) for flag, value, *_ in rows("configuration.md") if flag.startswith("`--")]
    assert documented == [(flags(setting), default(setting)) for setting in settings]


def test_every_choice_of_a_setting_is_documented() -> None:
    meanings = {code(flag)[0]: code(rest[-1]) for flag, *rest in rows("configuration.md") if flag.startswith("`--")}
    for setting in (*settings_of(EngineConfig), *settings_of(ServerConfig)):
        if isinstance(setting.type, msgspec.inspect.LiteralType):
            assert set(setting.type.values) <= set(meanings[setting.flag]), setting.flag


def test_every_format_of_messages_is_documented() -> None:
    documented: dict[str, set[str]] = {"--tool-call-parser": set(), "--reasoning-parser": set()}
    flag = ""
    for cells in rows("tools.md"):
        named = code(cells[0].partition(" (also")[0])
        if cells[0].startswith("`--"):
            (flag,) = named
        elif flag and cells[0] != "field":
            documented[flag].update(named)
        else:
            flag = ""
    own = {HARMONY_NAMES[0]}
    assert documented == {
        "--tool-call-parser": own | CALL_FORMATS.keys(),
        "--reasoning-parser": own | REASONING_FORMATS.keys(),
    }


def test_readmes_options_exist_with_these_defaults() -> None:
    known = {setting.flag: default(setting) for setting in (*settings_of(EngineConfig), *settings_of(ServerConfig))} | {
        "--kv-cache-memory": "5 % of what is free (GPU: 90 %)",
        "--api-key": "none",
    }
    lines = [line.split("|") for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `--")]
    assert lines
    for _, names, values, *_ in lines:
        assert values.strip() == ", ".join(known[flag] for flag in code(names))
    assert cache_share(EngineConfig().kv_cache_share, on_gpu=False) == 0.05


def test_the_table_of_models_is_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    """It is made from the registry of families."""
    assert main(["models"]) == 0
    printed = capsys.readouterr().out.strip().splitlines()
    page = (ROOT / "docs" / "models.md").read_text().splitlines()
    assert [line for line in page if line.startswith("|")] == printed
    assert len(printed) == len(FAMILIES) + 3


def test_every_endpoint_is_documented() -> None:
    paths = ScriptedApp(lambda request: []).app.openapi()["paths"]
    known = {(method.upper(), re.sub(r"\{.*\}", "{id}", path)) for path, methods in paths.items() for method in methods}
    documented = {
        (cells[0], code(cells[1])[0]) for cells in rows("http-api.md") if cells[0] in ("GET", "POST", "DELETE")
    }
    assert documented == known


@pytest.mark.parametrize("model", [ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest, MessagesRequest])
def test_every_field_of_a_request_is_documented(model: type[BaseModel]) -> None:
    page = (ROOT / "docs" / ("messages-api.md" if model is MessagesRequest else "http-api.md")).read_text()
    assert [field for field in model.model_fields if f"`{field}`" not in page] == []


def test_timings_are_documented() -> None:
    page = [code(cells[0]) for cells in rows("http-api.md")]
    assert [field for field in Timings.__struct_fields__ if [field] not in page] == []


def test_every_error_code_is_documented() -> None:
    documented = {name for cells in rows("http-api.md") for cell in cells[:2] for name in code(cell)}
    for path in (ROOT / "server").rglob("*.py"):
        for name in re.findall(r'code="([a-z_]+)"', path.read_text()):
            assert name in documented, f"{path.name}: {name}"


def commands(page: Path) -> list[list[str]]:
    """The words of the commands of pilotfish's in a page's blocks."""
    blocks = re.findall(r"^```(?:bash)?\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines = [line[line.index("pilotfish ") :] for line in lines if re.search(r"(^|\| )pilotfish ", line)]
    return [shlex.split(line, comments=True) for line in lines]


@cache
def help_of(command: str) -> str:
    with pytest.raises(SystemExit), redirect_stdout(StringIO()) as printed:
        main([command, "--help"])
    return printed.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_have_the_options_that_are_shown(page: Path) -> None:
    for _, name, *words in commands(page):
        if name not in ("COMMAND", "|"):
            known = set(re.findall(r"--[a-z][\w-]*", help_of(name)))
            used = {word.partition("=")[0] for word in words if word.startswith("--")}
            assert used <= known, f"pilotfish {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    named = re.findall(
        r"`((?:engine|server|text|tools|checkpoints|tests|benchmarks|docs|configs)/[\w./-]+)`", page.read_text()
    )
    for path in named:
        assert (ROOT / path).exists(), path


def test_layout_in_design_is_the_repositorys() -> None:
    """Every file and folder of the tree exists, and every folder of code is in it."""
    tree = re.findall(r"^    ( *)([\w./, ]+?)(?:   .*)?$", layout_section(), re.MULTILINE)
    listed: set[str] = set()
    parents: list[str] = []
    for indent, names in tree:
        depth = len(indent) // 2
        for name in names.split(", "):
            path = "".join(parents[:depth]) + name
            assert (ROOT / path).exists(), path
            assert path not in listed, path
            listed.add(path)
            parents[depth:] = [name]
    assert len(listed) > 30
    rooms = [ROOT / room for room in ("server", "tools", "engine", "text", "checkpoints")]
    folders = {folder for room in rooms for folder in (room, *room.iterdir()) if (folder / "__init__.py").exists()}
    assert {f"{folder.relative_to(ROOT)}/" for folder in folders} <= listed


def layout_section() -> str:
    page = (ROOT / "docs" / "design.md").read_text()
    return page[page.index("## Layout") : page.index("## Processes")]


@pytest.mark.parametrize("name", ["smollm2-135m"])  # all of them: tests/tools/planner/test_configs.py
def test_configs_can_be_read(name: str) -> None:
    assert read({"config": str(ROOT / "configs" / f"{name}.yaml")}).engine.model == name
