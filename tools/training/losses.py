"""The losses that training minimizes, so that more drafted tokens are accepted.

p is the target's distribution, q the draft model's, both over the draft vocabulary; p sums to less than 1 where the
target gives mass to other tokens. A token drawn from q is accepted with probability alpha = sum of min(p, q) (arXiv
2211.17192).

- "kl": the Kullback-Leibler divergence KL(p || q), the usual choice.
- "tv": 1 - alpha, the total variation distance itself. Its gradients vanish where q is far from p.
- "lk": the adaptive hybrid of LK losses (arXiv 2602.23881): w KL + (1 - w) TV, with w = exp(-3 alpha), so KL
  dominates while acceptance is low, and acceptance itself once it is high.
- "lk-log": -log alpha, from the same source.
- "ce": the cross-entropy of the text's own next tokens, without the target's distribution: DFlash's (arXiv 2602.06036).
- "ce-tv": a tenth of that and nine tenths of the L1 distance of p and q, twice the total variation: DSpark's (the paper
  in github.com/deepseek-ai/DeepSpec).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pilotfish.tools.training.settings import Objective

_DECAY = 3.0
_TINY = 1e-6
_CE_SHARE = 0.1


def draft_loss(
    logits: torch.Tensor,
    target: torch.Tensor,
    objective: Objective,
    weights: torch.Tensor | None = None,
    said: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the weighted mean loss over rows.

    logits: (rows, draft_vocab) of the draft, float32; target: (rows, draft_vocab) p, float32, no gradient; weights:
    (rows,), None for the same of all; said: (rows,) int64, for "ce" and "ce-tv", the columns of the text's next tokens,
    or -1 for one that is not in the draft's vocabulary.
    """
    weights = logits.new_ones(len(logits)) if weights is None else weights
    whole = weights.sum().clamp(min=_TINY)
    if objective in ("ce", "ce-tv"):
        assert said is not None
        known = weights * (said >= 0)
        losses = F.cross_entropy(logits, said.clamp(min=0), reduction="none")
        cross_entropy = (losses * known).sum() / known.sum().clamp(min=_TINY)
        if objective == "ce":
            return cross_entropy
        distance = (torch.softmax(logits, dim=1) - target).abs().sum(1)
        return _CE_SHARE * cross_entropy + (1.0 - _CE_SHARE) * (distance * weights).sum() / whole
    log_q = torch.log_softmax(logits, dim=1)
    alpha = torch.minimum(log_q.exp(), target).sum(1)
    if objective == "tv":
        return ((1.0 - alpha) * weights).sum() / whole
    if objective == "lk-log":
        return -((alpha + _TINY).log() * weights).sum() / whole
    # KL of p renormalized over the draft's vocabulary, up to a constant; rows are weighted by p's mass there.
    divergence = -((target * log_q).sum(1) * weights).sum() / (target.sum(1) * weights).sum().clamp(min=_TINY)
    if objective == "kl":
        return divergence
    share = torch.exp(-_DECAY * (alpha.detach() * weights).sum() / whole)
    return share * divergence + (1.0 - share) * ((1.0 - alpha) * weights).sum() / whole
