"""Checks of speed: memory bandwidth, passes of one row and of five, transfers to the device and back."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import msgspec
import torch

from pilotfish.checkpoints.catalog import resolve
from pilotfish.engine.build import Engine, build
from pilotfish.engine.config import EngineConfig
from pilotfish.engine.device import on_device
from pilotfish.engine.execution.batch import Span
from pilotfish.engine.execution.platform import CACHE_DTYPES, choose_quantization
from pilotfish.engine.llm import LLM
from pilotfish.engine.memory.free import free_memory
from pilotfish.engine.models.checkpoint import read_config
from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.params import SamplingParams
from pilotfish.tools.planner.devices import DEVICES, Device
from pilotfish.tools.planner.models import PlannedModel
from pilotfish.tools.selftest import small
from pilotfish.tools.selftest.check import Check, Finding, Skip
from pilotfish.tools.selftest.subject import Subject, ignore, release
from pilotfish.tools.selftest.timing import device_seconds, median_seconds, seconds_of

COPY_SHARE = 0.75
"""Share of the data sheet's bandwidth that a large copy must reach."""
FAILS, HEALTHY, AIM = 0.5, 0.65, 0.8
"""Shares of the data sheet's bandwidth that a pass of one row must reach, that a healthy card reaches, and the aim.
Servers with one kernel for each operator reach 0.71 to 0.76 on an H100."""
VERIFIED, VERIFY_COST = 5, 1.1
CONTEXT = 512
EIGHT_B_MEMORY = 20 << 30
"""Bytes that must be free for Llama-3.1-8B in 16 bits and a little cache."""

_NAMES = {
    r"B200\b": "b200",
    r"\bH200\b": "h200",
    r"\bH100 80GB HBM3\b": "h100",
    r"\bA100-SXM4-80GB\b": "a100",
    r"\bL40S\b": "l40s",
    r"\bL4\b": "l4",
    r"\bRTX 4090$": "rtx4090",
}
"""Patterns of the driver's names. Cards with similar names and other memory (H100 PCIe, A100 40GB) do not match."""

COPY_WHY = "a large copy should come near the data sheet: below 75 % of it a card is throttled, shared, or another one"
PASS_WHY = (
    f"a decoding step waits for its weights: below {FAILS:.0%} of the data sheet's bandwidth something is wrong, below "
    f"{HEALTHY:.0%} something may be; {AIM:.0%} is the aim"
)
VERIFY_WHY = (
    "the weights are read once, for five rows as for one; the rest of a pass grows a little: 1.1 is what the project "
    "asks for"
)


def checks(subject: Subject) -> Iterator[Check]:
    machine = _Machine(subject)
    compares = "bytes read and written by a large copy, with the card's data sheet"
    yield Check("memory, copy", compares, machine.copy, "GB/s", COPY_WHY)
    yield Check("host to device", "a small copy to the device, until it is there", machine.to_device, "us")
    yield Check("device to host", "a number of the device, until the host has it", machine.to_host, "us")
    for name, model in _models(subject):
        compares = f"bytes of weights and cache that a pass over one row at {CONTEXT} tokens reads, with the data sheet"
        yield Check(f"decode pass, {name}", compares, model.bandwidth, "GB/s", PASS_WHY)
        compares = f"a pass over {VERIFIED} rows of a sequence, in passes over one"
        yield Check(f"verify {VERIFIED} tokens, {name}", compares, model.verify, "times", VERIFY_WHY)
        compares = "a step with one sequence: plan, pass, sampling, commit"
        yield Check(f"step, {name}", compares, model.step, "ms")


def peaks(name: str) -> Device | None:
    """Return the data sheet of a card by the driver's name, if the planner knows it."""
    return next((DEVICES[known] for pattern, known in _NAMES.items() if re.search(pattern, name)), None)


class _Machine:
    def __init__(self, subject: Subject) -> None:
        self.subject, self.device = subject, subject.device

    def copy(self) -> Finding:
        size = min(1 << 30 if self.device.type == "cuda" else 256 << 20, free_memory(self.device) // 4)
        source = torch.ones(size // 4, device=self.device)
        target = torch.empty_like(source)
        seconds = median_seconds(self.subject.device, lambda: target.copy_(source), 5 if self.subject.quick else 20)
        return _reached(self.subject, 2 * source.nbytes / seconds, COPY_SHARE)

    def to_device(self) -> Finding:
        self._only_on_gpus()
        values = torch.arange(64)
        seconds = median_seconds(self.subject.device, lambda: on_device(values, self.device), 100)
        large = torch.ones(16 << 20).pin_memory()
        rate = large.nbytes / median_seconds(self.subject.device, lambda: large.to(self.device, non_blocking=True), 5)
        return Finding(measured=1e6 * seconds, detail=f"large copies out of pinned memory: {rate / 1e9:.1f} GB/s")

    def to_host(self) -> Finding:
        self._only_on_gpus()
        number = torch.ones(1, device=self.device)
        return Finding(measured=1e6 * median_seconds(self.subject.device, number.item, 100))

    def _only_on_gpus(self) -> None:
        if self.device.type == "cpu":
            raise Skip("the CPU is the host")


@dataclass
class _Model:
    """A model to be timed; loaded when its first check runs."""

    subject: Subject
    config: EngineConfig
    judged: bool
    """Whether its figures have bounds."""

    @cached_property
    def shape(self) -> ModelConfig:
        return read_config(resolve(self.config.model, weights=False))

    @cached_property
    def engine(self) -> Engine:
        return build(self.config, ignore)

    @cached_property
    def blocks(self) -> list[int]:
        count = -(-(CONTEXT + VERIFIED) // self.engine.info.block_size)
        found = self.engine.pool.allocate(count)
        if found is None:
            raise Skip(f"the KV cache has no room for {CONTEXT} tokens: raise kv_cache_memory")
        return found

    @property
    def planned(self) -> PlannedModel:
        info, kept = self.engine.info, self.subject.platform.cache_dtype
        return PlannedModel(
            name=info.model,
            shape=self.shape,
            dtype=info.dtype,
            kv_dtype=next((name for name, dtype in CACHE_DTYPES.items() if dtype == kept), info.dtype),
            quantization=choose_quantization(self.config, self.shape, self.subject.platform.needs.capability),
        )

    def bandwidth(self) -> Finding:
        self._prepare()
        seconds, host = device_seconds(self.subject.device, self._pass_over(1), 10 if self.subject.quick else 30)
        read = sum(matrix.bytes for matrix in self.planned.matrices())
        read += round(self.planned.seen(CONTEXT)) * self.planned.kv_bytes_per_token()
        detail = f"{1e3 * seconds:.2f} ms for {read / 1e9:.2f} GB, {1e3 * host:.2f} ms to launch"
        if not self.judged:
            return _reached(self.subject, read / seconds, None, detail=detail)
        return _reached(self.subject, read / seconds, FAILS, HEALTHY, detail)

    def verify(self) -> Finding:
        self._prepare()
        one, five = self._pass_over(1), self._pass_over(VERIFIED)
        seconds = [(seconds_of(self.subject.device, one), seconds_of(self.subject.device, five)) for _ in range(33)][3:]
        ratio = statistics.median(more / less for less, more in seconds)
        slow, fast = (1e3 * statistics.median(column) for column in reversed(list(zip(*seconds, strict=True))))
        bound = VERIFY_COST if self.judged else None
        return Finding(measured=ratio, bound=bound, detail=f"{slow:.2f} ms against {fast:.2f}")

    def step(self) -> Finding:
        self._check_room()
        for name in ("engine", "blocks"):  # the step needs their memory
            self.__dict__.pop(name, None)
        release()
        tokens = 24 if self.subject.quick else 64
        times: list[float] = []
        with LLM(config=self.config) as llm:
            params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
            for request in llm.requests([[1] * 64], params):
                llm.core.add(request)
            while llm.core.has_work():
                begin = time.perf_counter()
                stats = llm.core.step().stats
                if not stats.prompt_tokens:
                    times.append(time.perf_counter() - begin)
        release()
        return Finding(measured=1e3 * statistics.median(times), detail=f"{1 / statistics.median(times):.1f} tokens/s")

    def _prepare(self) -> None:
        """Load the model and fill its cache with a context."""
        self._check_room()
        self.engine.runner.run([Span([1] * CONTEXT, 0, self.blocks)])

    def _check_room(self) -> None:
        if self.judged and "engine" not in self.__dict__:
            free = free_memory(self.subject.device)
            if free < EIGHT_B_MEMORY:
                raise Skip(f"it takes {EIGHT_B_MEMORY >> 30} GiB of the GPU's memory, and {free / 2**30:.1f} are free")
        if self.config.tensor_parallel_size > 1:
            raise Skip("the model is sharded: its ranks' passes are not timed by themselves")

    def _pass_over(self, rows: int) -> Callable[[], object]:
        span = Span([1] * rows, CONTEXT, self.blocks, logit_rows=rows)
        return lambda: self.engine.runner.run([span])


def _models(subject: Subject) -> Iterator[tuple[str, _Model]]:
    cuda = subject.device.type == "cuda"
    if not cuda:
        config = subject.small_config(subject.small("llama"), drafter=(), speculation="none")
        yield "small model", _Model(subject, config, judged=False)
    elif not subject.quick:
        folder = small.write_llama_8b(Path(subject.test.directory))
        config = subject.small_config(
            folder, load_format="dummy", drafter=(), speculation="none", kv_cache_memory=1 << 30, dtype="bfloat16"
        )
        yield "Llama-3.1-8B shape", _Model(subject, config, judged=True)
    if subject.test.own_model:
        config = msgspec.structs.replace(subject.config, adaptive_drafts=False, speculation="none", drafter=("ngram",))
        yield subject.config.model, _Model(subject, config, judged=False)


def _reached(
    subject: Subject, rate: float, share: float | None, healthy: float | None = None, detail: str = ""
) -> Finding:
    """A rate in bytes per second, against shares of the card's data sheet where the card is known: the least, and what
    a healthy card reaches."""
    card = card_of(subject)
    if card is None:
        return Finding(measured=rate / 1e9, detail=detail)
    reached = f"{rate / card.bandwidth:.0%} of {card.bandwidth / 1e9:.0f} ({card.source})"
    detail = f"{detail}; {reached}" if detail else reached
    bound, expected = (None if each is None else each * card.bandwidth / 1e9 for each in (share, healthy))
    return Finding(measured=rate / 1e9, bound=bound, expected=expected, at_least=True, detail=detail)


def card_of(subject: Subject) -> Device | None:
    """Return the data sheet of the subject's card, if the planner knows it."""
    return peaks(torch.cuda.get_device_name(subject.device)) if subject.device.type == "cuda" else None
