"""`pilotfish selftest`: check a machine's results and speed; the first command to run on a GPU host (docs/gpu.md)."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from pilotfish import __version__
from pilotfish.engine.config import EngineConfig
from pilotfish.errors import ConfigError, ModelError
from pilotfish.server.cli.command import Command, add_number
from pilotfish.server.cli.prompts import encode, read_suites
from pilotfish.server.cli.settings import add_flags, load, not_default, read_yaml
from pilotfish.server.cli.table import aligned
from pilotfish.server.config import ServerConfig
from pilotfish.server.console import Console

if TYPE_CHECKING:
    from pilotfish.tools.selftest.check import Result
    from pilotfish.tools.selftest.environment import Environment
    from pilotfish.tools.selftest.settings import SelfTest

OMITTED = frozenset(
    {"prefix_caching", "speculation", "adaptive_drafts", "verification", "seed"}
    | {"nnodes", "node_rank", "master_addr", "master_port"}
)
"""Engine settings that the checks choose themselves, and those for several hosts: each host is checked alone."""
PROMPTS = 8
LIMIT = 600
JSON_VERSION = 1
VERDICTS = ("passed", "warned", "failed", "skipped", "measured")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="a YAML file of settings, as for serve; flags win over it")
    parser.add_argument("--quick", action="store_true", help="smaller samples, and no model of 8 billion parameters")
    parser.add_argument("--json", metavar="FILE", help="write the whole result, as JSON")
    parser.add_argument("--report", metavar="DIR", help="measure more, step by step, and keep a page and JSON in DIR")
    parser.add_argument(
        "--steps", metavar="NAMES", help="with --report: these steps, separated by commas (default: all)"
    )
    parser.add_argument("--verbose", action="store_true", help="show every check, and why its bound is what it is")
    add_number(parser, "--limit", LIMIT, "seconds that one check may take, loading a model included")
    parser.add_argument(
        "--isolate",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="run each group of checks in its own process, so that a crash fails only one check (default: on)",
    )
    add_flags(parser, EngineConfig, "engine", OMITTED)


def _run(options: dict[str, Any]) -> int:
    target = options["json"] and _writable(options["json"])
    steps = _steps(options)
    content = read_yaml(options["config"], (EngineConfig, ServerConfig)) if options["config"] else {}
    config = load(EngineConfig, content, options).check()
    own_model = "model" in content or "model" in options
    console = Console(sys.stderr)
    begin = time.monotonic()
    # Imported here: --help and mistakes need none of it.
    from pilotfish.tools.selftest.settings import SelfTest

    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="pilotfish-selftest-"))
        prompts = _prompts(config, console) if own_model else ()
        quick = options["quick"]
        test = SelfTest(config=config, directory=directory, own_model=own_model, prompts=prompts, quick=quick)
        if options["report"]:
            return _first_hour(test, console, Path(options["report"]), steps, options["limit"])
        environment, found = _isolated(test, console, options["limit"]) if options["isolate"] else _here(test, console)
        results = []
        for result in found:
            results.append(result)
            if result.verdict == "failed":
                console.error(f"  FAILED {result.group}: {result.name}: {result.detail or _figure(result)}")
    console.line()
    print(*report(environment, results, time.monotonic() - begin, options["verbose"]), sep="\n")
    failed = any(result.verdict == "failed" for result in results)
    if target:
        whole = as_json(config, environment, results)
        try:
            target.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"json is {str(target)!r}, which cannot be written: {error}") from error
    return 1 if failed else 0


def _steps(options: Mapping[str, Any]) -> list[str]:
    """Return the names of the steps of a report. Raises ConfigError for flags that contradict each other."""
    from pilotfish.tools.selftest.report import STEPS

    if options["report"] and (options["json"] or not options["isolate"]):
        raise ConfigError("report writes JSON of its own, each step in its own process: leave out json and no-isolate")
    if options["steps"] is None:
        return list(STEPS)
    if not options["report"]:
        raise ConfigError("steps are those of a report: give --report DIR, too")
    names = [name.strip() for name in options["steps"].split(",")]
    for name in names:
        if name not in STEPS:
            raise ConfigError(f"steps has {name!r}, but the steps are {', '.join(STEPS)}")
    return names


def _first_hour(test: SelfTest, console: Console, folder: Path, steps: Sequence[str], limit: float) -> int:
    """Run the steps whose results are not in the folder yet, and keep each result there as soon as it is known."""
    from pilotfish.tools.selftest.report import PAGE, STEP_SECONDS, Step, open_report, save
    from pilotfish.tools.selftest.run import describe, run_group

    report = open_report(folder, describe(test), not_default(test.config))
    print(*_machine(report.environment), sep="\n", flush=True)
    for name in steps:
        if name in report.steps and report.steps[name].complete:
            print(f"{name}: done already", flush=True)
            continue
        step = report.steps[name] = Step()
        begin = time.monotonic()
        for result in run_group(test, name, lambda group, check: console.progress(group, 0.0), limit, STEP_SECONDS):
            step.results.append(result)
            step.seconds = time.monotonic() - begin
            save(report, folder, page=False)
            if result.verdict in ("failed", "warned"):
                console.error(f"  {result.verdict.upper()} {name}: {result.name}: {result.detail or _figure(result)}")
        step.complete = True
        step.seconds = time.monotonic() - begin
        save(report, folder)
        counts = {verdict: sum(result.verdict == verdict for result in step.results) for verdict in VERDICTS}
        shown = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
        print(f"{name}: {shown}, in {step.seconds:.0f} s", flush=True)
    console.line()
    print(f"The page: {folder / PAGE}")
    return 1 if any(result.verdict == "failed" for result in report.results) else 0


def _writable(name: str) -> Path:
    """Check that a file can be written before spending minutes on its content. Raises ConfigError."""
    path = Path(name)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ConfigError(f"json is {name!r}, which cannot be written: its folder is not there, or it is one itself")
    return path


def _prompts(config: EngineConfig, console: Console) -> tuple[tuple[int, ...], ...]:
    """Return the token ids of prompts for the user's model; none if it has no tokenizer or only dummy weights."""
    if config.load_format == "dummy":
        return ()
    from pilotfish.checkpoints.catalog import resolve
    from pilotfish.text.tokenizer import load_tokenizer

    files = resolve(config.model, console.progress)
    try:
        tokenizer = load_tokenizer(files)
    except ModelError as error:
        console.line(f"  no tokenizer, so prompts are random: {error}")
        return ()
    (texts,) = read_suites([], PROMPTS).values()
    return tuple(tuple(encode(tokenizer, text)) for text in texts)


def _isolated(test: SelfTest, console: Console, limit: float) -> tuple[Environment, Iterator[Result]]:
    from pilotfish.tools.selftest.run import describe, run_groups

    return describe(test), run_groups(test, lambda group, name: console.progress(group, 0.0), limit)


def _here(test: SelfTest, console: Console) -> tuple[Environment, Iterator[Result]]:
    from pilotfish.tools.selftest.groups import describe_here, run_group
    from pilotfish.tools.selftest.run import GROUPS

    def results() -> Iterator[Result]:
        for group in GROUPS:
            console.progress(group, 0.0)
            yield from run_group(test, group, (), lambda name: None)

    return describe_here(test), results()


def as_json(config: EngineConfig, environment: Environment, results: Sequence[Result]) -> dict[str, Any]:
    """Return the content of the `--json` file, which docs/gpu.md documents. NaN becomes null."""
    whole = {
        "version": JSON_VERSION,
        "pilotfish": __version__,
        "passed": not any(result.verdict == "failed" for result in results),
        "settings": not_default(config),
        "environment": environment,
        "results": list(results),
    }
    decoded: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(whole))  # turns NaN into null
    return decoded


def report(environment: Environment, results: Sequence[Result], seconds: float, verbose: bool) -> list[str]:
    """Return the lines of the printed report: a page, unless many checks failed."""
    lines = [*_machine(environment), "", *_groups(results), "", *_figures(results), ""]
    if verbose:
        lines += [*_everything(results), ""]
    for result in results:
        if result.verdict == "failed":
            lines += _failure(result)
    for reason, names in _skipped(results).items():
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        lines.append(f"skipped {shown}: {reason}")
    counts = {verdict: sum(result.verdict == verdict for result in results) for verdict in VERDICTS}
    shown = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    return [*lines, "", f"{'FAILED' if counts['failed'] else 'Nothing failed'}: {shown}, in {seconds:.0f} s"]


def _machine(environment: Environment) -> list[str]:
    packages = ", ".join(f"{name} {version}" for name, version in environment.packages.items())
    cuda = f", CUDA {environment.cuda}" if environment.cuda else ""
    lines = [
        f"Pilotfish {__version__} on {environment.device} in {environment.dtype}, {environment.kernels} kernels",
        f"{environment.processor}, {environment.cores} cores, {_gib(environment.memory)}; {environment.system}",
        f"Python {environment.python}, {packages}{cuda}"
        + (f", driver {environment.driver}" if environment.driver else ""),
    ]
    for i, gpu in enumerate(environment.gpus):
        lines.append(f"GPU {i}: {gpu.name}, {gpu.capability}, {_gib(gpu.memory)}, {_gib(gpu.free)} free")
    apart = [
        f"{i} and {j}"
        for i, row in enumerate(environment.peers)
        for j, reaches in enumerate(row)
        if i < j and not reaches
    ]
    if apart:
        lines.append(f"GPUs that cannot reach each other's memory: {', '.join(apart)}")
    return lines


def _groups(results: Sequence[Result]) -> list[str]:
    head = ["group", *VERDICTS, "closest to its bound", "s"]
    body = []
    for group in dict.fromkeys(result.group for result in results):
        own = [result for result in results if result.group == group]
        counts = [str(sum(result.verdict == verdict for result in own) or "") for verdict in VERDICTS]
        body.append([group, *counts, _closest(own), f"{sum(result.seconds for result in own):.1f}"])
    return aligned(head, body, ("group", "closest to its bound"))


def _closest(results: Sequence[Result]) -> str:
    shares = {r.name: s for r in results if r.verdict == "passed" and (s := _share(r)) is not None}
    if not shares:
        return ""
    name = max(shares, key=lambda each: shares[each])
    return f"{shares[name]:.0%} of it: {name}" if shares[name] else "every one is exact"


def _share(result: Result) -> float | None:
    """Return the measured value as a share of its bound."""
    if result.measured is None or result.bound is None:
        return None
    if result.at_least:
        return result.bound / result.measured
    return result.measured / result.bound if result.bound else 0.0


def _figures(results: Sequence[Result]) -> list[str]:
    """Return the table of speeds and other measured values without a bound."""
    body = [
        [result.name, _number(result.measured), result.unit, _bound(result), result.detail]
        for result in results
        if result.measured is not None and (result.group == "speed" or result.verdict == "measured")
    ]
    head = ("figure", "measured", "unit", "bound", "detail")
    return aligned(head, body, ("figure", "unit", "detail")) if body else []


def _everything(results: Sequence[Result]) -> list[str]:
    head = ("check", "verdict", "measured", "bound", "unit", "s")
    body = [
        [
            f"{result.group}: {result.name}",
            result.verdict,
            _number(result.measured),
            _bound(result),
            result.unit,
            f"{result.seconds:.2f}",
        ]
        for result in results
    ]
    why = dict.fromkeys(f"{result.group}: {result.why}" for result in results if result.why)
    return [*aligned(head, body, ("check", "verdict", "unit")), "", *why]


def _failure(result: Result) -> list[str]:
    lines = [f"FAILED {result.group}: {result.name}"]
    if result.compares:
        lines.append(f"  compares {result.compares}")
    if result.measured is not None:
        lines.append(f"  measured {_figure(result)}")
        lines.append(f"  bound: {_bound(result)}" + (f", since {result.why}" if result.why else ""))
    if result.detail:
        lines.append(f"  {result.detail}")
    return lines


def _skipped(results: Sequence[Result]) -> Mapping[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for result in results:
        if result.verdict == "skipped":
            reasons.setdefault(result.detail, []).append(f"{result.group}: {result.name}")
    return reasons


def _figure(result: Result) -> str:
    return f"{_number(result.measured)} {result.unit}".strip()


def _bound(result: Result) -> str:
    if result.bound is None:
        return ""
    return f"{'at least' if result.at_least else 'at most'} {_number(result.bound)}"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 1000 else f"{value:.3g}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


COMMAND = Command(
    name="selftest",
    help="check that this machine computes what it should, and how fast",
    description="Check this machine: its kernels, attention, sampling, whole models, speculation, CUDA graphs and "
    "tensor parallelism against references, and its speed. Without --model on small models, with no download.",
    example="pilotfish selftest --quick\npilotfish selftest --model smollm2-135m --json result.json",
    status="Exit status: 0 if nothing failed, 1 if something did, 2 for settings that cannot work.",
    add_arguments=_add_arguments,
    run=_run,
)
