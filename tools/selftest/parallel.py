"""Checks of tensor parallelism: a model's texts and log-probabilities on several ranks and on one; and all-reduces."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import chain

from pilotfish.engine.config import EngineConfig
from pilotfish.engine.llm import LLM
from pilotfish.engine.memory.free import free_memory
from pilotfish.engine.models.registry import parameter_count
from pilotfish.engine.params import SamplingParams
from pilotfish.tools.bench.arms import VANILLA, Arm
from pilotfish.tools.bench.compare import BOUNDS, differences_of, greedy_and_sampled, texts_of
from pilotfish.tools.selftest.all_reduce import AllReduceTest, Figures, measure_all_reduce
from pilotfish.tools.selftest.check import Check, Finding, Skip, skip
from pilotfish.tools.selftest.subject import Subject, release
from pilotfish.tools.selftest.text import Target, judged, targets

ARMS = ((Arm(VANILLA, "off"), 1), (Arm("ngram", "ngram"), 8))
"""The arms on several ranks with their batch sizes: plain decoding alone, and drafts in a batch."""
TEXT_WHY = (
    "the ranks' parts of a sum are rounded before they are added: two tokens that are nearly tied may change places, "
    "within a bound, which is asked of the engine as `pilotfish verify` does"
)
GAP_WHY = "the same bound as for texts: about four steps of the dtype between logits of 16 to 32"


def checks(subject: Subject) -> Iterator[Check]:
    ranks = subject.config.tensor_parallel_size
    if ranks == 1:
        reason = (
            "tensor_parallel_size is 1: with --tensor-parallel-size N a model on N ranks is compared with one rank's"
        )
        yield Check("ranks", "several ranks with one", partial(skip, reason))
        return
    for target in targets(subject):
        pair = _Pair(target)
        for mode in greedy_and_sampled(1):
            compares = f"texts on {ranks} ranks, without and with drafts, with plain decoding's on one"
            run = partial(pair.text, mode)
            yield Check(f"{mode}, {target.name}", compares, run, "unexplained differences", TEXT_WHY)
        compares = f"log-probabilities of prompts' tokens on {ranks} ranks with those on one"
        yield Check(f"log-probabilities, {target.name}", compares, pair.logprobs, "nats", GAP_WHY)
    yield from _all_reduce(subject)


@dataclass
class _Pair:
    """A model on all ranks, then on one, never both in memory; all checks share the results."""

    target: Target

    def config(self, ranks: int) -> EngineConfig:
        subject = self.target.subject
        settings: dict[str, object] = {"tensor_parallel_size": ranks, "drafter": ("ngram",)}
        if ranks == 1:
            settings["draft_tensor_parallel_size"] = 1
        folder = subject.small("llama", ranks=subject.config.tensor_parallel_size)
        return self.target.config(folder, **settings)

    @cached_property
    def sharded(self) -> tuple[dict[str, list[list[list[int]]]], list[list[float]]]:
        """The texts by mode and arm, and the log-probabilities, of the model on all ranks."""
        if self.target.own:
            _check_room(self.target.subject)
        with LLM(config=self.config(self.target.subject.config.tensor_parallel_size)) as llm:
            prompts = self.target.prompts(llm)
            texts = {
                mode: [texts_of(llm, prompts, params, arm, batch) for arm, batch in ARMS]
                for mode, params in greedy_and_sampled(self.target.tokens).items()
            }
            return texts, _logprobs(llm, prompts)

    @cached_property
    def whole(self) -> LLM:
        assert self.sharded  # first, so that both are never in memory
        release()
        return LLM(config=self.config(1))

    def text(self, mode: str) -> Finding:
        texts, _ = self.sharded
        params, prompts = greedy_and_sampled(self.target.tokens)[mode], self.target.prompts(self.whole)
        wanted = texts_of(self.whole, prompts, params, ARMS[0][0], 1)
        bound = BOUNDS[self.whole.info.dtype]
        differences = {
            arm.name: differences_of(self.whole, prompts, wanted, got, params, bound)
            for (arm, _), got in zip(ARMS, texts[mode], strict=True)
        }
        return judged(differences, len(ARMS) * len(prompts), bound)

    def logprobs(self) -> Finding:
        _, found = self.sharded
        wanted = _logprobs(self.whole, self.target.prompts(self.whole))
        gap = max(abs(a - b) for a, b in zip(chain(*wanted), chain(*found), strict=True))
        return Finding(measured=gap, bound=BOUNDS[self.whole.info.dtype], detail=f"{sum(map(len, wanted))} tokens")


def _check_room(subject: Subject) -> None:
    config, shape = subject.config, subject.shape
    if config.load_format == "dummy":
        raise Skip("load_format is 'dummy', whose weights are others on each rank")
    width = 1 if shape.quantization is not None else subject.platform.dtype.itemsize
    wanted = width * parameter_count(shape) * 1.1
    if (free := free_memory(subject.device)) < wanted:
        have, need = free / 2**30, wanted / 2**30
        raise Skip(f"one rank has no room for the model: {have:.1f} GiB are free, and it takes about {need:.1f}")


def _logprobs(llm: LLM, prompts: list[list[int]]) -> list[list[float]]:
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    done = llm.generate(prompts, params, speculation="off")
    return [[each.logprob for each in one.prompt_logprobs or () if each is not None] for one in done]


def _all_reduce(subject: Subject) -> Iterator[Check]:
    @cache
    def figures() -> Figures:
        settings = AllReduceTest(
            ranks=subject.config.tensor_parallel_size,
            device=subject.device.type,
            dtype=subject.platform.dtype,
            hidden_size=subject.shape.hidden_size,
            quick=subject.quick,
        )
        return measure_all_reduce(settings)

    def latency() -> Finding:
        detail = f"{figures().small:,} bytes, {figures().backend}"
        return Finding(measured=1e6 * figures().latency, detail=detail)

    def bandwidth() -> Finding:
        return Finding(measured=figures().bandwidth / 1e9, detail=figures().backend)

    def wrong() -> Finding:
        return Finding(measured=figures().wrong, bound=0)

    exact = "sums of whole numbers are exact, and every rank must have the same bits"
    yield Check("all-reduce, sums", "what every rank has with the sum", wrong, "wrong numbers", exact)
    yield Check("all-reduce, latency", "of a row of hidden states", latency, "us")
    compares = "bytes that cross a rank's link, 2 (n - 1) / n of 64 MiB"
    yield Check("all-reduce, bandwidth", compares, bandwidth, "GB/s")
