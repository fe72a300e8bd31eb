"""Checks that speculation does not change the text, as `pilotfish verify` does: of a small model with several drafters,
and of the user's own; greedy and sampled, one request at a time and eight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import msgspec

from pilotfish.engine.config import EngineConfig
from pilotfish.engine.llm import LLM
from pilotfish.tools.bench.arms import arms_of
from pilotfish.tools.bench.compare import Difference, bound_of, compare, greedy_and_sampled
from pilotfish.tools.selftest.check import Check, Finding
from pilotfish.tools.selftest.subject import Subject

BATCHES = (1, 8)
WHY = (
    "a drafted token is kept only if it is the target's own: no text may differ, but where two tokens are so nearly "
    "tied that the rounding of a batch explains it, which is asked of the engine as `pilotfish verify` does"
)


@dataclass(frozen=True)
class Target:
    """A model whose texts are compared: the small one, or the user's own."""

    subject: Subject
    own: bool

    @property
    def name(self) -> str:
        return self.subject.config.model if self.own else "small model"

    @property
    def tokens(self) -> int:
        """Tokens of each text."""
        return 16 if self.subject.quick else 32

    def config(self, folder: Path, **settings: object) -> EngineConfig:
        """Return the engine's settings; `folder` is the small model's, which the user's own model does not need."""
        if not self.own:
            return self.subject.small_config(folder, **settings)
        fixed = {"prefix_caching": False, "adaptive_drafts": False, "speculation": "auto", "seed": 0}
        return msgspec.structs.replace(self.subject.config, **fixed, verification="coupled", **settings)

    def prompts(self, llm: LLM) -> list[list[int]]:
        """Return the test's prompts for the user's model, if there are any; otherwise random ones."""
        count = 4 if self.subject.quick else 8
        if self.own and self.subject.test.prompts:
            return list(map(list, self.subject.test.prompts[:count]))
        return [self.subject.tokens(24 + 7 * i, llm.info.vocab_size, seed=100 + i) for i in range(count)]


def targets(subject: Subject) -> list[Target]:
    return [Target(subject, own) for own in (False, True)[: 1 + subject.test.own_model]]


def checks(subject: Subject) -> Iterator[Check]:
    for target in targets(subject):
        texts = _Texts(target)
        for mode in greedy_and_sampled(1):
            compares = "texts of each drafter, 1 and 8 at a time, with plain decoding's of 1 at a time"
            run = partial(texts.compare, mode)
            yield Check(f"{mode}, {target.name}", compares, run, "unexplained differences", WHY)


@dataclass
class _Texts:
    """The texts of one target; both modes share the engine."""

    target: Target

    @cached_property
    def _llm(self) -> LLM:
        subject = self.target.subject
        small, other = subject.small("llama"), subject.small("llama", seed=1)
        # The small model has a draft that is nearly always right, and one that is nearly always wrong.
        drafters = ("ngram", "suffix", f"same={small}", f"other={other}")
        own = {} if self.target.own else {"drafter": drafters, "max_batch_tokens": 256}
        return LLM(config=self.target.config(small, **own))

    def compare(self, mode: str) -> Finding:
        llm = self._llm
        chosen = {mode: greedy_and_sampled(self.target.tokens)[mode]}
        arms = arms_of([], llm.info)
        found = list(compare(llm, self.target.prompts(llm), arms, chosen, BATCHES, lambda count: None))
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
