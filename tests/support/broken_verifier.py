"""A verifier that believes what is drafted: a bug of the kind that bench and verify have to find."""

from __future__ import annotations

import torch

from pilotfish.engine.draft import Draft
from pilotfish.engine.sampling.logit_spans import LogitSpan
from pilotfish.engine.verification.coupled import CoupledVerifier
from pilotfish.engine.verification.verifier import Verdict


class GullibleVerifier(CoupledVerifier):
    """Takes every draft's first token, right or wrong."""

    def verify(self, logits: torch.Tensor, spans: list[LogitSpan], drafts: list[Draft]) -> list[Verdict]:
        verdicts = super().verify(logits, spans, drafts)
        return [
            Verdict([draft.tokens[0], *verdict.tokens[1:]], verdict.accepted, verdict.logprobs)
            if draft.tokens
            else verdict
            for draft, verdict in zip(drafts, verdicts, strict=True)
        ]
