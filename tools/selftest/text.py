"""Checks that speculation does not change the text, as `pilotfish verify` does: of a small model with several drafters,
and of the user's own; greedy and sampled, one request at a time and eight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial

import msgspec

from pilotfish.engine.config import EngineConfig
from pilotfish.engine.llm import LLM
from pilotfish.engine.params import SamplingParams
from pilotfish.tools.bench.arms import arms_of
from pilotfish.tools.bench.compare import Difference, bound_of, compare
from pilotfish.tools.selftest.check import Check, Finding
from pilotfish.tools.selftest.subject import Subject, prompts_of

BATCHES = (1, 8)
WHY = (
    "a drafted token is kept only if it is the target's own: no text may differ, but where two tokens are so nearly "
    "tied that the rounding of a batch explains it, which is asked of the engine as `pilotfish verify` does"
)
SAMPLED = {"temperature": 0.8, "top_p": 0.9}


def modes(tokens: int) -> dict[str, SamplingParams]:
    common = {"max_tokens": tokens, "ignore_eos": True, "seed": 0}
    return {
        "greedy": SamplingParams(temperature=0.0, **common),  # type: ignore[arg-type]
        "sampled": SamplingParams(**SAMPLED, **common),  # type: ignore[arg-type]
    }


def checks(subject: Subject) -> Iterator[Check]:
    for texts in [_Texts(subject, own=False)] + [_Texts(subject, own=True)] * subject.test.own_model:
        for mode in modes(1):
            compares = "texts of each drafter, 1 and 8 at a time, with plain decoding's of 1 at a time"
            run = partial(texts.compare, mode)
            yield Check(f"{mode}, {texts.name}", compares, run, "unexplained differences", WHY)


class _Texts:
    """The texts of one target; both modes share the engine."""

    def __init__(self, subject: Subject, own: bool) -> None:
        self.subject, self.own = subject, own
        self.name = subject.config.model if own else "small model"
        self.count, self.tokens = (4, 16) if subject.quick else (8, 32)

    @cached_property
    def _llm(self) -> LLM:
        return LLM(config=self._config)

    @property
    def _config(self) -> EngineConfig:
        subject = self.subject
        if self.own:
            own = {"prefix_caching": False, "adaptive_drafts": False, "speculation": "auto", "seed": 0}
            return msgspec.structs.replace(subject.config, **own, verification="coupled")
        # One draft that is as good as always right, and one that is as good as never.
        target, other = subject.small("llama"), subject.small("llama", seed=1)
        drafters = ("ngram", "suffix", f"same={target}", f"other={other}")
        return subject.small_config(target, drafter=drafters, max_batch_tokens=256)

    def compare(self, mode: str) -> Finding:
        llm = self._llm
        prompts = prompts_of(self.subject, self.count, llm.info.vocab_size, self.own)
        chosen = {mode: modes(self.tokens)[mode]}
        found = list(compare(llm, prompts, arms_of([], llm.info), chosen, BATCHES, lambda count: None))
        differences = {f"{each.arm}, batch {each.batch}": each.differences for each in found}
        return judged(differences, sum(each.texts for each in found), bound_of(llm.info))


def judged(differences: Mapping[str, Sequence[Difference]], texts: int, bound: float) -> Finding:
    """Count the differences that near-ties do not explain; `differences` are by a description of the texts."""
    every = [(where, each) for where, found in differences.items() for each in found]
    wrong = [(where, each) for where, each in every if not each.explained]
    detail = f"{texts - len(every)} of {texts} texts identical, {len(every) - len(wrong)} near-ties"
    if wrong:
        where, first = wrong[0]
        detail += f"; first: {where}, prompt {first.prompt}, token {first.position}"
    return Finding(measured=len(wrong), bound=0, detail=f"{detail} (logits may differ by {bound:g})")
