"""Chain: drafts that grow together on the device, token by token, and are read by the host once, when they are done.

A GPU is launched pass after pass this way, where a look at each token would have it wait for the host in between. The
price is that a drafter cannot stop early for want of confidence: what it is not confident of is cut off at the end.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch

from pilotfish.engine.device.transfer import ids_to_device
from pilotfish.engine.sampling import device_sampler as on_device
from pilotfish.engine.sampling.logit_spans import LogitSpan, rows_of
from pilotfish.engine.sampling.processors import adjust
from pilotfish.engine.sequence import Sequence
from pilotfish.engine.speculation.drafters.drafter import DraftRequest


class Chain:
    """`going`: which of the requests still want a token, as indices."""

    def __init__(self, requests: Seq[DraftRequest]) -> None:
        self._requests = requests
        self.going = list(range(len(requests)))
        self._columns: list[tuple[list[int], torch.Tensor, torch.Tensor]] = []

    @property
    def depth(self) -> int:
        """Tokens that those who are going have."""
        return len(self._columns)

    def spans(self) -> list[LogitSpan]:
        """Of the next tokens. What was drafted is not known here, only how much (see `knows_no_draft`)."""
        return [LogitSpan(self._requests[i].sequence, (0,) * self.depth, rows=1) for i in self.going]

    def draw(self, logits: torch.Tensor, eos_token_ids: Seq[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The next token of those who are going, as the target will draw it, and its chance: (going,) each, of their
        logits, (going, vocab), which may be changed."""
        spans = self.spans()
        return on_device.draw(adjust(logits, spans, eos_token_ids), rows_of(spans), chances=True)

    def add(self, tokens: torch.Tensor, chances: torch.Tensor) -> torch.Tensor | None:
        """Append (going,) tokens, and return which of them go on, as (count,) int64 on the device; None: all of them,
        or nobody, and then `going` is empty."""
        self._columns.append((self.going, tokens, chances))
        places = [i for i, each in enumerate(self.going) if self._requests[each].limit > self.depth]
        all_go_on = len(places) == len(self.going)
        self.going = [self.going[i] for i in places]
        return None if all_go_on or not places else ids_to_device(places, tokens.device)

    def read(self) -> list[tuple[list[int], list[float]]]:
        """Of each request the tokens and their chances. Waits for the device."""
        read: list[tuple[list[int], list[float]]] = [([], []) for _ in self._requests]
        if not self._columns:
            return read
        tokens = torch.cat([tokens for _, tokens, _ in self._columns]).double()
        chances = torch.cat([chances for _, _, chances in self._columns]).double()
        values = iter(zip(*torch.stack((tokens, chances)).tolist(), strict=True))  # numbers both hold exactly
        for going, _, _ in self._columns:
            for each, (token, chance) in zip(going, values, strict=False):
                read[each][0].append(int(token))
                read[each][1].append(chance)
        return read


def confident(chances: Seq[float], floor: float) -> int:
    """Tokens up to the first at which the product of the chances falls below the floor, and that one."""
    survival = 1.0
    for count, chance in enumerate(chances, start=1):
        survival *= chance
        if survival < floor:
            return count
    return len(chances)


def knows_no_draft(sequence: Sequence) -> bool:
    """Whether its distribution at a place depends on how many tokens were drafted before it, but not on which."""
    params = sequence.params
    return params.repetition_penalty == 1.0 and params.presence_penalty == params.frequency_penalty == 0.0
