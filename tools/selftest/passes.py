"""Passes: how long the passes of a model in the shape of Llama-3.1-8B take (random weights), decoding, verifying and
reading prompts, captured and eager, in 16 bits and in fp8, beside what the planner predicts. On the CPU a small one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from pilotfish.checkpoints.catalog import resolve
from pilotfish.engine.build import Engine, build
from pilotfish.engine.config import EngineConfig
from pilotfish.engine.execution.batch import Span
from pilotfish.engine.execution.platform import choose_quantization
from pilotfish.engine.memory.free import free_memory
from pilotfish.engine.models.checkpoint import read_config
from pilotfish.engine.models.config import ModelConfig
from pilotfish.tools.planner.models import PlannedModel
from pilotfish.tools.planner.roofline import pass_seconds
from pilotfish.tools.selftest import small
from pilotfish.tools.selftest.check import Check, Finding, Skip
from pilotfish.tools.selftest.speed import EIGHT_B_MEMORY, FAILS, HEALTHY, PASS_WHY, card_of
from pilotfish.tools.selftest.subject import Subject, ignore
from pilotfish.tools.selftest.timing import device_seconds, seconds_of

CONTEXT = 512
STREAMS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
VERIFIED = (2, 3, 5, 9, 17)
PROMPTS = (128, 512, 2048, 8192)
CACHE = 24 << 30
"""Bytes of the KV cache: 256 sequences of 512 tokens take 16 GiB."""


def checks(subject: Subject) -> Iterator[Check]:
    yield from _of(TimedModel(subject, "captured"), STREAMS, VERIFIED, PROMPTS)
    if subject.device.type == "cuda":
        yield from _of(TimedModel(subject, "eager", enforce_eager=True), (1, 64), (5,), (512,))
        yield from _of(TimedModel(subject, "fp8", quantization="fp8"), (1, 8, 64), (5,), (2048,))


def _of(
    model: TimedModel, streams: tuple[int, ...], verified: tuple[int, ...], prompts: tuple[int, ...]
) -> Iterator[Check]:
    compares = "seconds of a pass on the device, by CUDA events; values: until the host has launched it, the planner's"
    if not model.cuda:
        streams, verified, prompts = (1, 4), (5,), (64,)

    def check(name: str, run: Callable[[], Finding], unit: str = "ms", why: str = "") -> Check:
        return Check(f"{model.name}: {name}", compares, run, unit, why)

    yield check("load", model.load, "s")
    if model.name == "captured" and model.cuda:
        yield check("roofline at batch 1", model.roofline, "GB/s", PASS_WHY)
    for count in streams:
        yield check(f"decode, {count} streams", partial(model.time, [1] * count))
    for rows in verified:
        yield check(f"verify {rows} rows", partial(model.time, [rows]))
    if model.name == "captured":
        for count in streams[3:6]:
            yield check(f"mixed drafts, {count} streams", partial(model.time, [1 + i % 9 for i in range(count)]))
    for length in prompts:
        yield check(f"prompt of {length} tokens", partial(model.time, [length], 0))


@dataclass
class TimedModel:
    """A model that is loaded once its first check runs."""

    subject: Subject
    name: str
    quantization: str = "none"
    enforce_eager: bool = False

    @property
    def cuda(self) -> bool:
        return self.subject.device.type == "cuda"

    @cached_property
    def config(self) -> EngineConfig:
        own = {"drafter": (), "speculation": "none", "enforce_eager": self.enforce_eager}
        if not self.cuda:
            return self.subject.small_config(self.subject.small("llama"), **own)
        return self.subject.small_config(
            small.write_llama_8b(Path(self.subject.test.directory)),
            **own,
            load_format="dummy",
            dtype="bfloat16",
            quantization=self.quantization,
            kv_cache_memory=self.cache_memory,
            max_model_len=PROMPTS[-1] + CONTEXT,
            max_batch_tokens=PROMPTS[-1],
            max_num_seqs=STREAMS[-1],
            num_draft_tokens=VERIFIED[-1] - 1,
        )

    @cached_property
    def cache_memory(self) -> int:
        free = free_memory(self.subject.device)
        if free < EIGHT_B_MEMORY:
            raise Skip(f"it takes {EIGHT_B_MEMORY >> 30} GiB of the GPU's memory, and {free / 2**30:.1f} are free")
        return min(CACHE, free - EIGHT_B_MEMORY)

    @cached_property
    def engine(self) -> Engine:
        if self.config.tensor_parallel_size > 1:
            raise Skip("the model is sharded: its ranks' passes are not timed by themselves")
        return build(self.config, ignore)

    @cached_property
    def shape(self) -> ModelConfig:
        return read_config(resolve(self.config.model, weights=False))

    @cached_property
    def planned(self) -> PlannedModel:
        quantization = choose_quantization(self.config, self.shape, self.subject.platform.needs.capability)
        dtype = "bfloat16" if self.cuda else self.subject.dtype_name
        return PlannedModel(name=self.name, shape=self.shape, dtype=dtype, kv_dtype=dtype, quantization=quantization)

    def load(self) -> Finding:
        before = free_memory(self.subject.device)
        seconds = seconds_of(self.subject.device, lambda: self.engine)
        taken = before - free_memory(self.subject.device)
        return Finding(measured=seconds, values={"GiB": taken / 2**30}, detail="captures included")

    def time(self, lengths: list[int], start: int = CONTEXT) -> Finding:
        spans = self.spans(lengths, start)
        run = partial(self.engine.runner.run, spans)
        seconds, host = device_seconds(self.subject.device, run, self.repeats(lengths))
        rows = sum(lengths)
        values = {"host ms": 1e3 * host, "rows": rows, "tokens per second": rows / seconds}
        card = card_of(self.subject)
        if card is not None:
            predicted = pass_seconds(self.planned, card, 1, rows, len(lengths), start + max(lengths), len(lengths))
            values |= {"planned ms": 1e3 * predicted.total}
            values |= {"share of bandwidth": self.bytes_of(lengths, start) / seconds / card.bandwidth}
        return Finding(measured=1e3 * seconds, values=values)

    def roofline(self) -> Finding:
        """Bytes per second of a pass of one row."""
        spans = self.spans([1], CONTEXT)
        seconds, _ = device_seconds(self.subject.device, lambda: self.engine.runner.run(spans), 30)
        rate, card = self.bytes_of([1], CONTEXT) / seconds, card_of(self.subject)
        if card is None:
            return Finding(measured=rate / 1e9)
        bound, expected = (share * card.bandwidth / 1e9 for share in (FAILS, HEALTHY))
        detail = f"{rate / card.bandwidth:.0%} of {card.bandwidth / 1e9:.0f} ({card.source})"
        return Finding(measured=rate / 1e9, bound=bound, expected=expected, at_least=True, detail=detail)

    def bytes_of(self, lengths: list[int], start: int) -> int:
        """Bytes of weights and of keys and values that a pass reads at least once."""
        keys = len(lengths) * round(self.planned.seen(start + max(lengths)))
        return sum(matrix.bytes for matrix in self.planned.matrices()) + keys * self.planned.kv_bytes_per_token()

    def spans(self, lengths: list[int], start: int) -> list[Span]:
        """Spans of sequences of their own, whose cached tokens are whatever is there."""
        size, blocks = self.engine.info.block_size, iter(range(self.engine.pool.num_blocks))
        needed = [-(-(start + length) // size) for length in lengths]
        if sum(needed) > self.engine.pool.num_blocks:
            raise Skip(f"the KV cache has no room for {sum(needed)} blocks of {size} tokens")
        wanted = [length if start else 1 for length in lengths]
        return [
            Span([1] * length, start, [next(blocks) for _ in range(count)], logit_rows=rows)
            for length, count, rows in zip(lengths, needed, wanted, strict=True)
        ]

    def repeats(self, lengths: list[int]) -> int:
        return 5 if self.subject.quick or sum(lengths) > 1024 or not self.cuda else 20
