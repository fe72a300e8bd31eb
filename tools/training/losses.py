"""The losses that training minimizes, so that more drafted tokens are accepted.

p is the target's distribution, q the draft model's, both over the draft vocabulary; p sums to less than 1 where the
target gives mass to other tokens. A token drawn from q is accepted with probability alpha = sum of min(p, q) (arXiv
2211.17192).

- "kl": the Kullback-Leibler divergence KL(p || q), the usual choice.
- "tv": 1 - alpha, the total variation distance itself. Its gradients vanish where q is far from p.
- "lk": the adaptive hybrid of LK losses (arXiv 2602.23881): w KL + (1 - w) TV, with w = exp(-3 alpha), so KL
  dominates while acceptance is low, and acceptance itself once it is high.
- "lk-log": -log alpha, from the same source.
"""

from __future__ import annotations

import torch

from pilotfish.tools.training.settings import Objective

_DECAY = 3.0
_TINY = 1e-6


def draft_loss(logits: torch.Tensor, target: torch.Tensor, objective: Objective) -> torch.Tensor:
    """Return the mean loss over rows.

    logits: (rows, draft_vocab) of the draft, float32; target: (rows, draft_vocab) p, float32, no gradient.
    """
    log_q = torch.log_softmax(logits, dim=1)
    alpha = torch.minimum(log_q.exp(), target).sum(1)
    if objective == "tv":
        return (1.0 - alpha).mean()
    if objective == "lk-log":
        return -(alpha + _TINY).log().mean()
    # KL of p renormalized over the draft's vocabulary, up to a constant; rows are weighted by p's mass there.
    divergence = -(target * log_q).sum(1)
    rows = target.sum(1).sum().clamp(min=_TINY)
    if objective == "kl":
        return divergence.sum() / rows
    weight = torch.exp(-_DECAY * alpha.detach().mean())
    return weight * divergence.sum() / rows + (1.0 - weight) * (1.0 - alpha).mean()
