"""Checks of tensor parallelism: texts and log-probabilities of one model over several ranks and on one; and the cost of
the ranks' sums."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, partial
from itertools import chain

import msgspec

from pilotfish.engine.config import EngineConfig
from pilotfish.engine.llm import LLM
from pilotfish.engine.memory.free import free_memory
from pilotfish.engine.models.registry import parameter_count
from pilotfish.engine.params import SamplingParams
from pilotfish.tools.bench.arms import VANILLA, Arm
from pilotfish.tools.bench.compare import BOUNDS, differences_of, texts_of
from pilotfish.tools.selftest.all_reduce import AllReduceTest, Figures, measure_all_reduce
from pilotfish.tools.selftest.check import Check, Finding, Skip
from pilotfish.tools.selftest.subject import Subject, prompts_of, release
from pilotfish.tools.selftest.text import judged, modes

ARMS = ((Arm(VANILLA, "off"), 1), (Arm("ngram", "ngram"), 8))
"""Arms on several ranks, and their batch sizes: plain decoding one at a time, and drafts in a batch."""
TEXT_WHY = (
    "the ranks' parts of a sum are rounded before they are added: two tokens that are nearly tied may change places, "
    "within a bound, which is asked of the engine as `pilotfish verify` does"
)
GAP_WHY = "the same bound as for texts: about four steps of the dtype between logits of 16 to 32"


def checks(subject: Subject) -> Iterator[Check]:
    ranks = subject.config.tensor_parallel_size
    if ranks == 1:
        yield Check("ranks", "several ranks with one", _one_rank)
        return
    for pair in [_Pair(subject, own=False)] + [_Pair(subject, own=True)] * subject.test.own_model:
        for mode in modes(1):
            compares = f"texts on {ranks} ranks, without and with drafts, with plain decoding's on one"
            run = partial(pair.text, mode)
            yield Check(f"{mode}, {pair.name}", compares, run, "unexplained differences", TEXT_WHY)
        compares = f"log-probabilities of prompts' tokens on {ranks} ranks with those on one"
        yield Check(f"log-probabilities, {pair.name}", compares, pair.logprobs, "nats", GAP_WHY)
    reduce = _AllReduce(subject)
    exact = "sums of whole numbers are exact, and every rank must have the same bits"
    yield Check("all-reduce, sums", "what every rank has with the sum", reduce.wrong, "wrong numbers", exact)
    yield Check("all-reduce, latency", "of a row of hidden states", reduce.latency, "us")
    compares = "bytes that cross a rank's link, 2 (n - 1) / n of 64 MiB"
    yield Check("all-reduce, bandwidth", compares, reduce.bandwidth, "GB/s")


def _one_rank() -> Finding:
    raise Skip(
        "tensor_parallel_size is 1: with --tensor-parallel-size N a model on N ranks is compared with one rank's"
    )


class _Pair:
    """A model over all ranks, then on one; all checks share their results. Both are never in memory at once."""

    def __init__(self, subject: Subject, own: bool) -> None:
        self.subject, self.own = subject, own
        self.name = subject.config.model if own else "small model"
        self.ranks = subject.config.tensor_parallel_size
        self.count, self.tokens = (4, 16) if subject.quick else (8, 32)

    def config(self, ranks: int) -> EngineConfig:
        settings = {"tensor_parallel_size": ranks, "drafter": ("ngram",), "adaptive_drafts": False}
        if not self.own:
            return self.subject.small_config(self.subject.small("llama", ranks=self.ranks), **settings)
        fixed = {"prefix_caching": False, "speculation": "auto", "verification": "coupled", "seed": 0}
        if ranks == 1:
            fixed["draft_tensor_parallel_size"] = 1
        return msgspec.structs.replace(self.subject.config, **settings, **fixed)

    @cached_property
    def sharded(self) -> tuple[dict[str, list[list[list[int]]]], list[list[float]]]:
        """Texts by mode and arm, and log-probabilities, of the model over all ranks."""
        if self.own:
            self._check_room()
        with LLM(config=self.config(self.ranks)) as llm:
            texts = {
                mode: [texts_of(llm, self._prompts(llm), params, arm, batch) for arm, batch in ARMS]
                for mode, params in modes(self.tokens).items()
            }
            return texts, _logprobs(llm, self._prompts(llm))

    @cached_property
    def whole(self) -> LLM:
        assert self.sharded  # first, so that both need not be in memory
        release()
        return LLM(config=self.config(1))

    def text(self, mode: str) -> Finding:
        texts, _ = self.sharded
        params, prompts = modes(self.tokens)[mode], self._prompts(self.whole)
        wanted = texts_of(self.whole, prompts, params, ARMS[0][0], 1)
        bound = BOUNDS[self.whole.info.dtype]
        differences = {
            arm.name: differences_of(self.whole, prompts, wanted, got, params, bound)
            for (arm, _), got in zip(ARMS, texts[mode], strict=True)
        }
        return judged(differences, len(ARMS) * len(prompts), bound)

    def logprobs(self) -> Finding:
        _, found = self.sharded
        wanted = _logprobs(self.whole, self._prompts(self.whole))
        gap = max(abs(a - b) for a, b in zip(chain(*wanted), chain(*found), strict=True))
        return Finding(measured=gap, bound=BOUNDS[self.whole.info.dtype], detail=f"{sum(map(len, wanted))} tokens")

    def _prompts(self, llm: LLM) -> list[list[int]]:
        return [list(each) for each in prompts_of(self.subject, self.count, llm.info.vocab_size, self.own)]

    def _check_room(self) -> None:
        config, shape = self.subject.config, self.subject.shape
        if config.load_format == "dummy":
            raise Skip("load_format is 'dummy', whose weights are others on each rank")
        width = 1 if shape.quantization is not None else self.subject.platform.dtype.itemsize
        wanted = width * parameter_count(shape) * 1.1
        if (free := free_memory(self.subject.device)) < wanted:
            have, need = free / 2**30, wanted / 2**30
            raise Skip(f"one rank has no room for the model: {have:.1f} GiB are free, and it takes about {need:.1f}")


def _logprobs(llm: LLM, prompts: list[list[int]]) -> list[list[float]]:
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    done = llm.generate(prompts, params, speculation="off")
    return [[each.logprob for each in one.prompt_logprobs or () if each is not None] for one in done]


class _AllReduce:
    def __init__(self, subject: Subject) -> None:
        self.subject = subject

    @cached_property
    def figures(self) -> Figures:
        shape, platform = self.subject.shape, self.subject.platform
        settings = AllReduceTest(
            ranks=self.subject.config.tensor_parallel_size,
            device=platform.device.type,
            dtype=self.subject.dtype_name,
            hidden_size=shape.hidden_size,
            quick=self.subject.quick,
        )
        return measure_all_reduce(settings)

    def wrong(self) -> Finding:
        return Finding(measured=self.figures.wrong, bound=0)

    def latency(self) -> Finding:
        detail = f"{self.figures.small:,} bytes, {self.figures.backend}"
        return Finding(measured=1e6 * self.figures.latency, detail=detail)

    def bandwidth(self) -> Finding:
        return Finding(measured=self.figures.bandwidth / 1e9, detail=self.figures.backend)
