"""`pilotfish plan`: its report, JSON, plot, exit statuses and errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from matplotlib.image import imread

from pilotfish.engine.config import EngineConfig, with_step_limits
from pilotfish.server.cli import main as cli
from pilotfish.server.cli.plan import PLANNED
from pilotfish.server.cli.settings import settings_of
from pilotfish.tools.planner.devices import find_device
from pilotfish.tools.planner.plan import Plan, make_plan
from pilotfish.tools.planner.setup import make_setup

SEVENTY = ["plan", "--model", "meta-llama/Llama-3.1-70B-Instruct", "--kv-cache-share", "0.9"]
SEVENTY += ["--max-batch-tokens", "512"]
DRAFTS = ["--drafter", "ngram", "--drafter", "1b=meta-llama/Llama-3.2-1B-Instruct"]


def test_a_plan_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--tensor-parallel-size", "4", "--batch", "1,8", "--draft-lengths", "2,5", "--context", "4096"]
    assert cli.main([*SEVENTY, *DRAFTS, *flags, "--acceptance", "0.5", "--acceptance", "1b=0.8"]) == 0
    printed = capsys.readouterr().out
    assert "70.55B parameters, bfloat16 weights, on 4 x h100" in printed
    assert "It fits: the cache holds" in printed
    assert "Predicted for 4,096 tokens" in printed
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("| ")]
    head = next(cells for cells in lines if cells[0] == "batch")
    body = lines[lines.index(head) + 1 :]
    assert head[3:5] == ["k=2", "k=5"]
    assert [cells[:3] for cells in body] == [
        ["1", "vanilla", ""],
        ["1", "ngram", "0.50"],
        ["1", "1b", "0.80"],
        ["8", "vanilla", ""],
        ["8", "ngram", "0.50"],
        ["8", "1b", "0.80"],
    ]
    memory = {cells[0]: float(cells[1]) for cells in lines if len(cells) == 3 and cells[1][-1].isdigit()}
    assert sum(size for part, size in memory.items() if part != "memory") == pytest.approx(memory["memory"], abs=0.05)


def test_a_plan_that_does_not_fit_lists_remedies(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*SEVENTY, "--tensor-parallel-size", "1"]) == 1
    printed = capsys.readouterr().out
    assert "It does NOT fit: " in printed
    assert "GiB are missing on each device" in printed
    assert "- as configured: tensor_parallel_size 2, " in printed
    assert "- fp8 weights: tensor_parallel_size 1, " in printed
    assert "1 *" in printed  # predictions go on, marked


def test_json_has_the_whole_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*SEVENTY, *DRAFTS, "--tensor-parallel-size", "8", "--gpu", "h200", "--json"]) == 0
    plan = msgspec.convert(json.loads(capsys.readouterr().out), Plan)
    assert (plan.device, plan.tensor_parallel_size, plan.fits) == ("h200", 8, True)
    assert plan.memory.kv_bytes_per_token == 2 * 80 * 1 * 128 * 2 + 32_768
    assert len(plan.predictions) == 3 * (1 + 2 * 4)


def test_a_file_of_settings_and_flags_that_win_over_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "some.yaml"
    path.write_text("model: llama-3.1-8b\ntensor-parallel-size: 8\nport: 9000\nkv_cache_memory: 4GiB\nngram_max: 3\n")
    assert cli.main(["plan", "--config", str(path), "--tensor-parallel-size", "2", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["tensor_parallel_size"] == 2
    assert plan["memory"]["kv_cache"] == 4 * 2**30
    path.write_text("model: llama-3.1-8b\ntensor_paralel_size: 8\n")
    assert cli.main(["plan", "--config", str(path)]) == 2
    assert "did you mean 'tensor_parallel_size'?" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_picture(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"plan.{ending}"
    assert cli.main([*SEVENTY, *DRAFTS, "--tensor-parallel-size", "4", "--plot", str(path)]) == 0
    assert path.stat().st_size > 10_000
    if ending == "png":
        assert imread(path).ndim == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpu", "h10"], "gpu is 'h10': did you mean 'h100'? known are b200,"),
        (["--tensor-parallel-size", "3"], "num_heads (64) does not divide by 3"),
        (
            ["--tensor-parallel-size", "4", "--acceptance", "9b=0.5"],
            "acceptance is given for '9b', but the drafters are",
        ),
        (["--tensor-parallel-size", "4", "--context", "1000000"], "context is 1000000, but a request may have 131072"),
        (["--model", "someone/no-such-model"], "the shape of 'someone/no-such-model' is not known here"),
        (["--gpu", "cpu", "--quantization", "fp8"], "quantization is 'fp8', but cpu computes in float32"),
        (
            ["--max-num-seqs", "64", "--max-batch-tokens", "32"],
            "max_batch_tokens (32) is smaller than max_num_seqs (64)",
        ),
        (["--tensor-parallel-size", "4", "--plot", "plan.xyz"], "plot is 'plan.xyz', which cannot be written"),
        (["--tensor-parallel-size", "4", "--batch", "512"], "batch is 512, but max_num_seqs is 256"),
        (["--config", "none.yaml"], "cannot read the settings in none.yaml"),
    ],
)
def test_errors_name_the_setting(
    flags: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main([*SEVENTY, *DRAFTS, *flags]) in (1, 2)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("rate", ["1.5", "-0.1", "many", "=0.5", "1b=x"])
def test_an_invalid_acceptance_is_refused(rate: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*SEVENTY, f"--acceptance={rate}"])
    assert ended.value.code == 2
    assert "is not a rate from 0 to 1, or NAME=RATE" in capsys.readouterr().err


def test_without_matplotlib_a_plot_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main([*SEVENTY, "--plot", "plan.png"]) == 2
    assert "pip install 'pilotfish[bench]'" in capsys.readouterr().err


@pytest.mark.process
def test_planning_imports_no_torch() -> None:
    program = f"import sys; from pilotfish.server.cli.main import main; main({[*SEVENTY, *DRAFTS]})"
    program += "; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


class Recorder:
    """Engine settings that record which of them are read."""

    def __init__(self, config: EngineConfig) -> None:
        self._config, self.names = config, set[str]()

    def __getattr__(self, name: str) -> Any:
        self.names.add(name)
        return getattr(self._config, name)


def test_every_setting_that_a_plan_depends_on_is_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    config = EngineConfig(model="llama-3.1-8b", drafter=("ngram", "1b=llama-3.2-1b"))
    settings: Any = Recorder(with_step_limits(config, None))
    make_plan(make_setup(settings, find_device("h100")), 512, [1], [2], {})
    resolved = {"suffix_draft_tokens"}  # with the limits of a step: no plan depends on it
    assert {*settings.names, "draft_tensor_parallel_size"} - resolved == set(PLANNED)
    with pytest.raises(SystemExit):
        cli.main(["plan", "--help"])
    text = capsys.readouterr().out
    assert {setting.name for setting in settings_of(EngineConfig) if f"{setting.flag} " in text} == set(PLANNED)
