"""The report of a first hour on a machine: the results of steps, kept in a folder as they come, so that what is there
already need not be measured again."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from pilotfish import __version__
from pilotfish.errors import ConfigError
from pilotfish.tools.selftest.check import Result
from pilotfish.tools.selftest.environment import Environment
from pilotfish.tools.selftest.page import Section, page_of

STEPS = {
    "peaks": "what the card gives at most: bandwidth, products, starting a kernel",
    "kernels": "operators between the matrices, against float64",
    "attention": "each attention backend, against float64",
    "passes": "passes in the shape of Llama-3.1-8B: decoding, verifying, prompts; captured, eager, fp8",
    "profile": "kernels of a pass, and the slowest ones",
    "graphs": "replays of captured passes, bit for bit",
    "logits": "small models of each kind, against the reference",
    "sampling": "drawing, against NumPy",
    "text": "the same text with each drafter",
    "serving": "tokens a second at 1 to 256 streams, plain and with drafts; drawing; a drafted token",
    "backends": "attention by head size, to 128k tokens: time, and distance from float32",
    "speed": "copies, a pass and a step, judged",
    "parallel": "ranks, and all-reduces",
}
"""The steps, what would be learnt first at the front."""
STEP_SECONDS = 480.0
JSON, PAGE = "selftest.json", "selftest.html"
VERSION = 1


class Step(msgspec.Struct, kw_only=True):
    results: list[Result] = []
    seconds: float = 0.0
    complete: bool = False
    """False while it runs, and if it was cut off."""


class Report(msgspec.Struct, kw_only=True):
    version: int = VERSION
    pilotfish: str = __version__
    settings: dict[str, object] = {}
    environment: Environment
    steps: dict[str, Step] = {}

    @property
    def results(self) -> list[Result]:
        return [result for step in self.steps.values() for result in step.results]


def open_report(folder: Path, environment: Environment, settings: dict[str, object]) -> Report:
    """Return the report in a folder, which is made if need be. Raises ConfigError for a folder that cannot be used, or
    has the report of another machine or other settings."""
    path = folder / JSON
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = msgspec.json.decode(path.read_bytes(), type=Report) if path.exists() else None
    except OSError as error:
        raise ConfigError(f"report is {str(folder)!r}, which cannot be used: {error}") from None
    except msgspec.MsgspecError as error:
        raise ConfigError(f"report is {str(folder)!r}, but its {JSON} is none of this program: {error}") from None
    if found is None:
        return Report(environment=environment, settings=settings)
    for what, old, new in (
        ("machine", _machine(found.environment), _machine(environment)),
        ("settings", found.settings, msgspec.to_builtins(settings)),
    ):
        if old != new:
            raise ConfigError(
                f"report is {str(folder)!r}, but the one in it has other {what} ({old}): use another folder"
            )
    return found


def save(report: Report, folder: Path, page: bool = True) -> None:
    """Write the JSON and, with `page`, the page. A reader finds the old or the new file, never half of one."""
    _write(folder / JSON, msgspec.json.format(msgspec.json.encode(report), indent=1))
    if page:
        sections = [Section(name, STEPS[name], step.results, step.complete) for name, step in report.steps.items()]
        _write(folder / PAGE, page_of(report.environment, report.pilotfish, sections).encode())


def _machine(environment: Environment) -> str:
    gpus = ", ".join(gpu.name for gpu in environment.gpus) or environment.processor
    return f"{gpus}, torch {environment.packages.get('torch')}, {environment.dtype}"


def _write(path: Path, data: bytes) -> None:
    beside = path.with_suffix(path.suffix + ".part")
    beside.write_bytes(data)
    os.replace(beside, path)
