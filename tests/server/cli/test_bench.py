"""`pilotfish bench`: statistics on synthetic rows, runs on a small model, and the files that it writes."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from matplotlib.image import imread

from pilotfish.engine.llm import LLM
from pilotfish.engine.params import SamplingParams
from pilotfish.engine.request import Request
from pilotfish.errors import ConfigError
from pilotfish.server.cli import bench, train_draft
from pilotfish.server.cli import main as cli
from pilotfish.server.cli.bench_plot import plot
from pilotfish.server.cli.prompts import BUILT_IN, read_suites
from pilotfish.server.cli.table import table
from pilotfish.tools.bench.arms import Arm, arms_of
from pilotfish.tools.bench.rows import Row, summarize
from pilotfish.tools.bench.runner import Benchmark, check, run


def row(arm: str, suite: str, number: int, speed: float, speedup: float, **more: object) -> Row:
    values = {"model": "tiny", "concurrency": 1, "mean_accepted_length": 2.0, "acceptance_rate": 0.5}
    values |= {"ttft_ms": 1.0, "itl_p50_ms": 1.0, "itl_p99_ms": 2.0, "identical_text": True}
    own = {"arm": arm, "suite": suite, "round": number, "tokens_per_second": speed, "speedup": speedup}
    return msgspec.convert({**values, **own, **more}, Row)


@pytest.fixture
def rows() -> list[Row]:
    """A machine that gets slower and slower: only ratios within a round say that ngram doubles one suite's speed and
    gains nothing, one round half, on the other."""
    made = []
    for number, machine in enumerate((100.0, 40.0, 10.0)):
        made += [row("vanilla", "code", number, machine, 1.0), row("ngram", "code", number, 2 * machine, 2.0)]
        ratio = (1.0, 0.5, 1.0)[number]
        made += [row("vanilla", "chat", number, 4 * machine, 1.0), row("ngram", "chat", number, 4 * machine, ratio)]
    return made


def test_speedups_are_medians_of_ratios_and_their_geometric_mean(rows: list[Row]) -> None:
    vanilla, ngram = summarize(rows)
    assert (vanilla.arm, vanilla.speedups, vanilla.speedup) == ("vanilla", {"code": 1.0, "chat": 1.0}, 1.0)
    assert ngram.speedups == {"code": 2.0, "chat": 1.0}
    assert ngram.speedup == pytest.approx(2**0.5)
    assert vanilla.tokens_per_second == pytest.approx((40.0 * 160.0) ** 0.5)
    assert ngram.tokens_per_second == pytest.approx((80.0 * 160.0) ** 0.5)


def test_one_wrong_text_is_reported(rows: list[Row]) -> None:
    rows[5] = msgspec.structs.replace(rows[5], identical_text=False)
    assert [each.identical_text for each in summarize(rows)] == [True, False]
    assert [line.endswith("NO |") for line in table(summarize(rows))[2:]] == [False, True]


def test_concurrencies_are_apart(rows: list[Row]) -> None:
    more = [msgspec.structs.replace(each, concurrency=8, speedup=0.5 * each.speedup) for each in rows]
    summaries = summarize([*rows, *more])
    assert [(each.concurrency, each.arm) for each in summaries] == [
        (load, arm) for load in (1, 8) for arm in ("vanilla", "ngram")
    ]
    assert summaries[3].speedup == pytest.approx(2**0.5 / 2)


def test_the_table_lines_up(rows: list[Row]) -> None:
    lines = table(summarize(rows))
    assert len({len(line) for line in lines}) == 1
    assert [cell.strip() for cell in lines[3].split("|")[1:-1]] == [
        *("1", "ngram", "2.00x", "1.00x", "1.41x", "113.1", "2.00", "yes")
    ]


def test_the_picture_has_a_panel_for_each_target_and_concurrency(rows: list[Row], tmp_path: Path) -> None:
    """Two targets side by side, two concurrencies below each other."""
    plot(rows, tmp_path / "one.png")
    other = [msgspec.structs.replace(each, model="other", tokens_per_second=3.0) for each in rows]
    more = [msgspec.structs.replace(each, concurrency=8) for each in (*rows, *other)]
    plot([*rows, *other, *more], tmp_path / "four.png")
    one, four = imread(tmp_path / "one.png"), imread(tmp_path / "four.png")
    assert four.shape[:2] == (2 * one.shape[0], 2 * one.shape[1])
    assert one.min() < 0.5 < one.max()  # something is drawn on it


def flags(quick: list[str], prompts: list[str], out: Path, *more: str) -> list[str]:
    sizes = ("--max-tokens", "12", "--rounds", "2", "--concurrency", "1,3")
    return ["bench", *quick, "--prompts", *prompts, "--out", str(out), *sizes, *more]


def test_bench(
    quick: list[str],
    prompts: list[str],
    tiny: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two targets, a draft that is right for one of them, and all that is written."""
    other, draft = str(tiny("qwen3")), f"draft-model={tiny('llama')}"
    more = ("--model", other, "--drafter", "ngram", "--drafter", draft, "--arm", "draft-model", "--arm", "auto")
    assert cli.main(flags(quick, prompts, tmp_path / "out", *more)) == 0
    content = json.loads((tmp_path / "out" / "bench.json").read_text())
    rows = msgspec.convert(content["rows"], list[Row])
    assert [set(each) for each in content["rows"]] == [set(Row.__struct_fields__)] * len(rows)
    assert [(r.model, r.round, r.suite, r.concurrency, r.arm) for r in rows] == [
        (model, number, suite, load, arm)
        for model in ("llama", "qwen3")
        for number in (0, 1)
        for suite in ("stories", "questions")
        for load in (1, 3)
        for arm in ("vanilla", "draft-model", "auto")
    ]
    base = {(r.model, r.round, r.suite, r.concurrency): r for r in rows if r.arm == "vanilla"}
    for each in rows:
        vanilla = base[each.model, each.round, each.suite, each.concurrency]
        assert each.speedup == each.tokens_per_second / vanilla.tokens_per_second
        assert each.itl_p50_ms is not None
        assert each.itl_p99_ms is not None
        assert 0 < each.itl_p50_ms <= each.itl_p99_ms
        assert each.ttft_ms > 0
        assert each.identical_text
        if each.arm == "vanilla":
            assert (each.acceptance_rate, each.mean_accepted_length) == (None, 1.0)
        elif (each.model, each.arm) == ("llama", "draft-model"):  # its own draft
            assert each.acceptance_rate == 1.0
            # 12 tokens: the prompt's step gives one, the next nine (eight were drafted), then two.
            assert each.mean_accepted_length == 4.0
    assert content["targets"]["qwen3"]["drafters"] == ["ngram", "prediction", "grammar", "draft-model"]
    assert imread(tmp_path / "out" / "bench.png").ndim == 3
    printed = capsys.readouterr()
    assert printed.out.count("| streams | arm") == 2
    assert "qwen3: 100%" in printed.err


def test_a_drafter_that_changes_the_text_is_found(
    broken: None, quick: list[str], prompts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(flags(quick, prompts, tmp_path, "--no-plot", "--arm", "ngram", "--max-tokens", "32")) == 0
    rows = msgspec.convert(json.loads((tmp_path / "bench.json").read_text())["rows"], list[Row])
    assert all(each.identical_text for each in rows if each.arm == "vanilla")
    assert not all(each.identical_text for each in rows if each.arm == "ngram")
    assert "NO |" in capsys.readouterr().out
    assert not (tmp_path / "bench.png").exists()


@pytest.mark.parametrize(
    ("load", "order"),
    [
        (2, ["off"] * 5 + ["ngram"] * 10 + ["off"] * 5),
        (
            1,
            ["off", "ngram", "ngram", "off"] * 2
            + ["off", "ngram"]
            + ["ngram", "off", "off", "ngram"] * 2
            + ["ngram", "off"],
        ),
    ],
)
def test_arms_begin_in_turn_and_never_more_are_in_flight(
    make_llm: Callable[..., LLM], load: int, order: list[str]
) -> None:
    """One request at a time, they take turns at each; else at each visit."""
    asked: list[str | None] = []
    with make_llm() as llm:
        core, add = llm.core, llm.core.add
        most = 0

        def watched(request: Request) -> None:
            nonlocal most
            asked.append(request.speculation)
            add(request)
            most = max(most, len(core._sequences))

        core.add = watched  # type: ignore[method-assign]
        plan = Benchmark(
            model="tiny",
            arms=arms_of(("ngram",), llm.info),
            suites={"one": [[5, 6, 7 + i] for i in range(5)]},
            concurrency=(load,),
            rounds=2,
            params=SamplingParams(temperature=1.0, max_tokens=4),
        )
        ended: list[None] = []
        rows = [each for more in run(plan, llm, lambda: ended.append(None)) for each in more]
    assert asked == order
    assert most == load
    assert len(ended) == plan.total == 20
    assert all(each.identical_text for each in rows)  # sampled, too: the seeds are the same


def test_a_plan_that_would_not_be_fair_or_not_end_is_refused(make_llm: Callable[..., LLM]) -> None:
    plan = Benchmark(
        model="tiny", arms=[Arm("vanilla", "off")], suites={}, concurrency=(64,), rounds=1, params=SamplingParams()
    )
    with make_llm(prefix_caching=True) as llm, pytest.raises(ConfigError, match="prefix_caching is on"):
        check(plan, llm)
    with make_llm() as llm, pytest.raises(ConfigError, match="raise max_num_seqs"):
        check(plan, llm)


@pytest.mark.parametrize("command", ["bench", "verify"])
def test_an_unknown_arm_is_refused(
    command: str,
    quick: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main([command, *quick, "--arm", "magic"]) == 2
    error = capsys.readouterr().err
    assert "arm is 'magic', but llama with these settings knows 'vanilla', " in error
    assert "'ngram'" in error


def test_targets_of_one_name_are_refused(
    quick: list[str], tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / tiny_llama.name).symlink_to(tiny_llama)
    more = ("--model", str(tmp_path / tiny_llama.name), "--out", str(tmp_path / "out"))
    assert cli.main(["bench", *quick, *more]) == 2
    assert "are both called 'llama'" in capsys.readouterr().err
    assert not (tmp_path / "out" / "bench.json").exists()


def test_without_matplotlib_nothing_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["bench", "--model", "no-such-model", "--out", str(tmp_path / "out")]) == 2
    assert "pip install 'pilotfish[bench]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.process
def test_the_parser_imports_neither_torch_nor_matplotlib() -> None:
    program = "import sys; from pilotfish.server.cli import main; main._parser()"
    program += "; print({'torch', 'matplotlib', 'transformers'} & {*sys.modules})"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_built_in_prompts() -> None:
    (prompts,) = read_suites([], 1000).values()
    assert len(prompts) == len(set(prompts)) >= 20
    assert read_suites([], 4) == {BUILT_IN: [prompts[i * len(prompts) // 4] for i in range(4)]}


@pytest.mark.parametrize("line", ["[]", "{}", '{"turns": []}', '{"prompt": 3}', "not json"])
def test_an_invalid_prompt_is_refused(line: str, tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text('{"prompt": "fine"}\n\n' + line)
    with pytest.raises(ConfigError, match=r"line 3 of .* is not a prompt"):
        read_suites([str(path)], 5)


def test_files_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the prompts in"):
        read_suites([str(tmp_path / "none.jsonl")], 5)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match="there are no prompts in"):
        read_suites([str(tmp_path / "empty.jsonl")], 5)


@pytest.mark.parametrize("flag", ["--prompts", "--data"])
def test_files_of_a_repeated_flag_add_up(flag: str) -> None:
    command = bench if flag == "--prompts" else train_draft
    parser = command.COMMAND.add_to(argparse.ArgumentParser().add_subparsers())
    needed = ["--out", "out"] + (["--target", "m"] if flag == "--data" else [])
    for _ in range(2):  # the default is not shared
        options = vars(parser.parse_args([*needed, flag, "a", flag, "b", "c"]))
        assert options[flag.strip("-")] == ["a", "b", "c"]
