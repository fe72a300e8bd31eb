"""Measure this machine's CPU as a device for `pilotfish plan`: its memory, its kernels, and the engine's own work.

    python benchmarks/measure_device.py --out cpu.json
    pilotfish plan --model smollm2-135m --gpu cpu.json

Nothing here depends on the models that are planned later. Matrices are measured alone, so many that they come from
memory and not from a cache; the rest comes from small models with random weights, as the difference that more layers,
sequences, context or vocabulary make to a step. The best round of each counts, because other work on the machine only
adds time: the more rounds, the less it matters. About 5 s a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import psutil
import torch

from pilotfish.engine.config import EngineConfig
from pilotfish.engine.execution.platform import thread_count
from pilotfish.engine.kernels.native import NativeKernels
from pilotfish.engine.llm import LLM
from pilotfish.engine.models.config import ModelConfig, RopeConfig
from pilotfish.engine.params import SamplingParams
from pilotfish.tools.checkpoint import config_of, random_weights, write_model
from pilotfish.tools.planner.devices import Device
from pilotfish.tools.planner.models import PlannedModel
from pilotfish.tools.planner.roofline import ROW_PASSES, kernel_count

INPUTS, OUTPUTS, MATRICES = 768, 2048, 64  # 6 MiB each, 384 MiB in all
ROWS = (1, 2, 4, 6, 8, 9, 12, 16, 18, 24, 32, 36, 48, 64, 72, 96, 128)
HIDDEN, INNER, HEAD_DIM = 64, 64, 64
STEPS = 24

Seconds = dict[str, float]


class Probe:
    """A small model whose steps are timed, at one number of sequences and one context length."""

    def __init__(self, folder: Path, shape: ModelConfig, sequences: int, context: int) -> None:
        self.shape, self.sequences, self.context = shape, sequences, context
        self.llm = LLM(
            model=str(_written(folder, shape)),
            kernels="native",
            speculation="none",
            adaptive_drafts=False,
            prefix_caching=False,
            kv_cache_memory=2**28,
            max_batch_tokens=8192,  # prompts in one step
        )

    def seconds(self) -> tuple[float, float]:
        """Return the median seconds of a step in which all sequences decode, and of drawing its tokens."""
        params = SamplingParams(temperature=0.0, max_tokens=STEPS + 1, ignore_eos=True)
        core = self.llm.core
        for request in self.llm.requests([[1] * self.context] * self.sequences, params):
            core.add(request)
        steps, draws = [], []
        while core.has_work():
            start = time.perf_counter()
            stats = core.step().stats
            if not stats.prompt_tokens and stats.running == self.sequences:
                steps.append(time.perf_counter() - start)
                draws.append(stats.seconds["sample"])
        return statistics.median(steps), statistics.median(draws)


class DeviceMeter:
    """Everything that is measured, loaded once; `round` measures it, `device` returns the device of all rounds."""

    def __init__(self, folder: Path) -> None:
        self.threads = thread_count(EngineConfig())
        self.kernels = NativeKernels()
        self.kernels.set_threads(self.threads)
        self.matrices = [self.kernels.prepare_linear(torch.randn(OUTPUTS, INPUTS)) for _ in range(MATRICES)]
        few, many = _shape(layers=4), _shape(layers=36)
        self.probes = {
            "few": Probe(folder / "few", few, 1, 32),
            "many": Probe(folder / "many", many, 1, 32),
            "eight": Probe(folder / "few", few, 8, 32),
            "vocabulary": Probe(folder / "vocabulary", _shape(layers=4, vocabulary=65536), 8, 32),
            "short": Probe(folder / "heads", _shape(layers=4, heads=24), 8, 32),
            "long": Probe(folder / "heads", _shape(layers=4, heads=24), 8, 1024),
        }
        self.drafting = LLM(
            model=str(folder / "few"),
            drafter=(f"draft={folder / 'few'}",),
            speculation="draft",
            adaptive_drafts=False,
            prefix_caching=False,
            kv_cache_memory=2**28,
        )
        self.rounds: list[Seconds] = []

    def round(self) -> None:
        with torch.inference_mode():
            found = {f"matrices {rows}": self._matrices(rows) for rows in ROWS}
            found["rows"] = self._row_operators()
        for name, probe in self.probes.items():
            found[name], found[f"{name} drawing"] = probe.seconds()
        found["draft pass"] = self._draft_pass()
        self.rounds.append(found)

    def device(self) -> Device:
        return _device({name: min(r[name] for r in self.rounds) for name in self.rounds[0]}, self.threads)

    def _matrices(self, rows: int) -> float:
        """Return the seconds of a pass over all matrices."""
        x = torch.randn(rows, INPUTS)
        start = time.perf_counter()
        for matrix in self.matrices:
            self.kernels.linear(x, matrix)
        return time.perf_counter() - start

    def _row_operators(self) -> float:
        """Return the seconds of a layer's row-wise operators, per byte that the planner counts for them."""
        rows, hidden, inner, heads = 64, 1024, 2816, 16
        x, gate_up, weight = torch.randn(rows, hidden), torch.randn(rows, 2 * inner), torch.ones(hidden)
        qkv, positions = torch.randn(rows, 3 * heads, 64), torch.arange(rows)
        angles = torch.randn(rows, 64)

        def layer() -> None:
            for _ in range(2):
                self.kernels.rms_norm(x, weight, 1e-5)
            self.kernels.rotate_(qkv[:, : 2 * heads], positions, angles)
            self.kernels.silu_mul(gate_up)

        counted = rows * (ROW_PASSES * hidden + 3 * inner + 2 * 3 * heads * 64) * 4
        return _median_time(layer, 20) / counted

    def _draft_pass(self) -> float:
        """Return the seconds of a pass of the smallest model as a draft model."""
        params = SamplingParams(temperature=0.0, max_tokens=8 * STEPS, ignore_eos=True)
        core, times = self.drafting.core, []
        for request in self.drafting.requests([[1] * 32], params):
            core.add(request)
        while core.has_work():
            stats = core.step().stats
            if drafted := sum(stats.drafted.values()):
                times.append(stats.seconds["draft"] / drafted)
        return statistics.median(times)


def _device(seconds: Seconds, threads: int) -> Device:
    """Convert seconds to rates. A difference of two noisy times is at least zero; fewer rows take no longer than
    more."""
    params = INPUTS * OUTPUTS * MATRICES
    passes = {rows: min(seconds[f"matrices {more}"] for more in ROWS if more >= rows) for rows in ROWS}
    rates = {rows: 2 * rows * params / passes[rows] for rows in ROWS}
    few, many = _planned(_shape(layers=4)), _planned(_shape(layers=36))
    kernel = max(1e-7, (seconds["many"] - seconds["few"]) / (kernel_count(many) - kernel_count(few)))
    own = max(0.0, seconds["few"] - kernel_count(few) * kernel)
    sequence = max(0.0, (seconds["eight"] - seconds["few"]) / 7)
    logit = max(0.0, (seconds["vocabulary drawing"] - seconds["eight drawing"]) / (8 * (65536 - 512)))
    flops = 4 * 4 * 8 * 24 * HEAD_DIM * (1024 - 32)
    return Device(
        name="cpu",
        source=f"measured with {threads} threads, benchmarks/measure_device.py",
        memory=psutil.virtual_memory().total,
        bandwidth=params * 4 / passes[1],
        flops={"float32": max(rates.values())},
        flops_by_rows=rates,
        attention_flops=flops / max(1e-9, seconds["long"] - seconds["short"]),
        kernel_seconds=kernel,
        row_bandwidth=1 / seconds["rows"],
        step_seconds=max(0.0, own - sequence),
        sequence_seconds=sequence,
        logit_seconds=logit,
        draft_seconds=max(0.0, seconds["draft pass"] - kernel_count(few) * kernel),
        reserved=2**29,
        graphs=False,
        threads=threads,
    ).check()


def _shape(layers: int, vocabulary: int = 512, heads: int = 1) -> ModelConfig:
    return ModelConfig(
        architecture="llama",
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=-(-heads // 3),
        head_dim=HEAD_DIM,
        max_position=2048,
        rms_norm_eps=1e-5,
        rope=RopeConfig(),
        tie_embeddings=True,
    )


def _planned(shape: ModelConfig) -> PlannedModel:
    return PlannedModel(name="probe", shape=shape, dtype="float32", kv_dtype="float32")


def _written(folder: Path, shape: ModelConfig) -> Path:
    """Write a model of that shape with random weights, unless it is there; returns its folder."""
    if folder.exists():
        return folder
    return write_model(folder, config_of(shape), random_weights(shape, 0.1, torch.float32))


def _median_time(action: Callable[[], None], times: int) -> float:
    def timed() -> Iterator[float]:
        for _ in range(times):
            start = time.perf_counter()
            action()
            yield time.perf_counter() - start

    return statistics.median(timed())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the file to write (default: standard output)")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with ExitStack() as stack:
        meter = DeviceMeter(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        for _ in range(args.rounds + 1):
            meter.round()
        del meter.rounds[0]  # warm-up
        text = json.dumps(msgspec.to_builtins(meter.device(), str_keys=True), indent=1) + "\n"
    if args.out:
        args.out.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
