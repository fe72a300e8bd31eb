"""Log-probabilities of tokens under the model's own distribution: raw logits, before anything in `processors`."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch

from pilotfish.engine.device import on_device
from pilotfish.engine.request import TokenLogprobs


@torch.inference_mode()
def token_logprobs(logits: torch.Tensor, tokens: Seq[int], top: int | Seq[int]) -> list[TokenLogprobs]:
    """Return, for each row, the log-probability of its token, and the `top` tokens with theirs, likeliest first.

    logits: (rows, vocab), any float type, not changed; tokens: one for each row; top: one number for all rows, or one
    for each. Natural logarithms, in float32.
    """
    if not tokens:
        return []
    wanted = [top] * len(tokens) if isinstance(top, int) else list(top)
    logprobs = torch.log_softmax(logits.float(), 1)
    chosen = logprobs.gather(1, on_device(tokens, logits.device).unsqueeze(1)).squeeze(1).tolist()
    most = min(max(wanted), logits.shape[1])
    if most == 0:
        return [TokenLogprobs(token, logprob) for token, logprob in zip(tokens, chosen, strict=True)]
    values, ids = (part.tolist() for part in logprobs.topk(most, 1))
    return [
        TokenLogprobs(token, logprob, tuple(zip(ids[i][:count], values[i][:count], strict=True)))
        for i, (token, logprob, count) in enumerate(zip(tokens, chosen, wanted, strict=True))
    ]
