"""`pilotfish bench`: measure drafters against plain decoding. See docs/benchmarking.md."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from pilotfish import __version__
from pilotfish.engine.config import EngineConfig
from pilotfish.engine.params import SamplingParams
from pilotfish.engine.request import EngineInfo
from pilotfish.errors import ConfigError
from pilotfish.server.cli.command import Command, add_number, make_folder, positives
from pilotfish.server.cli.measuring import add_measuring_flags, engine_config, title
from pilotfish.server.cli.prompts import encode, read_suites
from pilotfish.server.cli.settings import not_default
from pilotfish.server.console import Console

if TYPE_CHECKING:
    from pilotfish.checkpoints.catalog import ModelFiles
    from pilotfish.tools.bench.rows import Row

MODEL = EngineConfig().model
INFO_FIELDS = ("dtype", "device", "kernels", "drafters", "default_drafter")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        dest="models",
        action="append",
        metavar="MODEL",
        help=f"a target, named as for serve; repeatable (default: {MODEL})",
    )
    parser.add_argument(
        "--out", default="bench", metavar="DIR", help="folder for bench.json and bench.png (default: bench)"
    )
    parser.add_argument("--no-plot", action="store_true", help="do not draw bench.png")
    parser.add_argument(
        "--concurrency",
        type=positives,
        default=[1],
        metavar="N,N,...",
        help="requests in flight, one load after the other (default: 1)",
    )
    add_number(parser, "--rounds", 3, "times that each arm is measured")
    add_number(parser, "--temperature", 0.0, "sampling temperature; 0: greedy", float)
    add_measuring_flags(parser, questions=20, max_tokens=128)


def _run(options: dict[str, Any]) -> int:
    if not options["no_plot"] and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "bench.png needs matplotlib: install it with pip install 'pilotfish[bench]', or leave it out with --no-plot"
        )
    suites = read_suites(options["prompts"], options["questions"])
    out = make_folder(options["out"])
    config = engine_config(options)
    params = SamplingParams(
        temperature=options["temperature"],
        max_tokens=options["max_tokens"],
        ignore_eos=options["ignore_eos"],
        seed=config.seed or 0,
    ).check()
    console = Console(sys.stderr)
    settings = {name: options[name] for name in ("concurrency", "rounds", "questions", "max_tokens", "temperature")}
    settings["ignore_eos"] = params.ignore_eos
    settings |= {"seed": params.seed, "engine": not_default(config)}
    targets: dict[str, dict[str, Any]] = {}
    rows: list[Row] = []
    for model, files in _resolve(options["models"] or [MODEL], console).items():
        info, more = _measure(model, files, config, params, suites, options, console)
        rows += more
        targets[files.name] = {name: getattr(info, name) for name in INFO_FIELDS}
        # Written after each target: its rows are kept if the next one fails.
        _write(out / "bench.json", {"version": __version__, "settings": settings, "targets": targets, "rows": rows})
    written = [out / "bench.json"]
    if not options["no_plot"]:
        from pilotfish.server.cli.bench_plot import plot

        plot(rows, out / "bench.png")
        written.append(out / "bench.png")
    print(f"\nWritten: {', '.join(map(str, written))}")
    return 0


def _resolve(models: list[str], console: Console) -> dict[str, ModelFiles]:
    """Find the files of all targets before the first is measured. Raises ConfigError for two with the same name."""
    from pilotfish.checkpoints.catalog import resolve

    found = {model: resolve(model, console.progress) for model in models}
    by_name: dict[str, str] = {}
    for model, files in found.items():
        if files.name in by_name:
            raise ConfigError(
                f"model {model!r} and model {by_name[files.name]!r} are both called {files.name!r}, so their rows "
                "could not be told apart: rename one"
            )
        by_name[files.name] = model
    return found


def _measure(
    model: str,
    files: ModelFiles,
    config: EngineConfig,
    params: SamplingParams,
    suites: dict[str, list[str]],
    options: dict[str, Any],
    console: Console,
) -> tuple[EngineInfo, list[Row]]:
    from tqdm import tqdm

    from pilotfish.engine.llm import LLM
    from pilotfish.server.cli.table import table
    from pilotfish.text.tokenizer import load_tokenizer
    from pilotfish.tools.bench.arms import arms_of
    from pilotfish.tools.bench.rows import summarize
    from pilotfish.tools.bench.runner import Benchmark, check, run, warm_up

    tokenizer = load_tokenizer(files)
    prompts = {suite: [encode(tokenizer, prompt) for prompt in texts] for suite, texts in suites.items()}
    with LLM(config=config, on_loading=console.progress, model=model) as llm:
        benchmark = Benchmark(
            model=files.name,
            arms=arms_of(options["arm"], llm.info),
            suites=prompts,
            concurrency=options["concurrency"],
            rounds=options["rounds"],
            params=params,
        )
        check(benchmark, llm)
        info = llm.info
        head = f"{title(files.name, info)}, {benchmark.rounds} rounds"
        console.line(f"{head}: {', '.join(arm.name for arm in benchmark.arms)}")
        warm_up(benchmark, llm)
        rows: list[Row] = []
        with tqdm(total=benchmark.total, desc=benchmark.model, unit="req") as bar:
            for more in run(benchmark, llm, bar.update):
                rows += more
    print(f"\n{head}\n", *table(summarize(rows)), sep="\n", flush=True)
    return info, rows


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(msgspec.to_builtins(content), indent=1) + "\n", encoding="utf-8")


COMMAND = Command(
    name="bench",
    help="measure drafters against plain decoding",
    description="Measure drafters against plain decoding, alternately, on one or more models.",
    example="pilotfish bench --model smollm2-135m --arm ngram --arm auto --concurrency 1,8 --out bench",
    add_arguments=_add_arguments,
    run=_run,
)
