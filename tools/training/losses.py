"""The losses that training minimizes, so that more drafted tokens are accepted.

p is the target's distribution, q the draft's, both over the draft's vocabulary; p's sum is below 1 where the target has
other tokens in mind. A token drawn from q is accepted with probability alpha = sum of min(p, q) (arXiv 2211.17192).

- "kl": the Kullback-Leibler divergence of p to q: what is usually made small.
- "tv": 1 - alpha, the total variation distance itself. Its gradients vanish where the draft is far off.
- "lk": the adaptive hybrid of LK losses (arXiv 2602.23881): w KL + (1 - w) TV, with w = exp(-3 alpha), so KL leads
  while the draft is bad, and acceptance itself once it is good.
- "lk-log": -log alpha, of the same source.
"""

from __future__ import annotations

import torch

from pilotfish.tools.training.settings import Objective

_DECAY = 3.0
_TINY = 1e-6


def draft_loss(logits: torch.Tensor, target: torch.Tensor, objective: Objective) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean loss over rows, and alpha of each row, (rows,), without a gradient.

    logits: (rows, draft_vocab) of the draft, float32; target: (rows, draft_vocab) p, float32, no gradient.
    """
    log_q = torch.log_softmax(logits, dim=1)
    alpha = torch.minimum(log_q.exp(), target).sum(1)
    if objective == "tv":
        return (1.0 - alpha).mean(), alpha.detach()
    if objective == "lk-log":
        return -(alpha + _TINY).log().mean(), alpha.detach()
    mass = target.sum(1)
    # Of p made whole again on the draft's vocabulary, up to what does not depend on the draft; rows weigh as much as p
    # has there.
    divergence = -(target * log_q).sum(1)
    rows = mass.sum().clamp(min=_TINY)
    if objective == "kl":
        return divergence.sum() / rows, alpha.detach()
    weight = torch.exp(-_DECAY * alpha.detach().mean())
    return weight * divergence.sum() / rows + (1.0 - weight) * (1.0 - alpha).mean(), alpha.detach()
