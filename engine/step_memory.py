"""What a step takes of a GPU's memory beside weights and caches: the largest ones are tried before caches are sized.

The trials also compile and load kernels for prompts, which the captured passes do not reach: else the first prompt
would wait for that, and all others with it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from pilotfish.engine.config import EngineConfig
from pilotfish.engine.device import peak_memory
from pilotfish.engine.device.attempt import Attempt
from pilotfish.engine.draft import Draft
from pilotfish.engine.execution.batch import Span
from pilotfish.engine.execution.platform import Platform
from pilotfish.engine.execution.runner import ModelRunner
from pilotfish.engine.memory import kv_cache
from pilotfish.engine.memory.block_pool import BlockPool
from pilotfish.engine.memory.block_table import BlockTable
from pilotfish.engine.models.decoder_model import CausalModel
from pilotfish.engine.params import SamplingParams
from pilotfish.engine.request import Request
from pilotfish.engine.sampling.logit_spans import LogitSpan
from pilotfish.engine.sequence import Sequence
from pilotfish.engine.verification.choose import make_verifier
from pilotfish.errors import ConfigError

logger = logging.getLogger(__name__)

PARAMS = SamplingParams(temperature=1.0, top_p=0.9, seed=0)
"""What most clients send, and what takes the most memory: the whole vocabulary is sorted, row by row."""


def step_memory(target: CausalModel, drafts: list[CausalModel], platform: Platform, config: EngineConfig) -> int:
    """Bytes that a step of the target or a draft model takes at most on a GPU; 0 on the CPU, where nothing is tried.
    All ranks of a sharded model try at the same time. Raises ConfigError if the largest step does not fit at all."""
    taken = 0
    with Attempt() as attempt:
        taken = peak_memory(platform.device, lambda: try_steps(target, drafts, platform, config))
    if attempt.problem is not None:
        raise ConfigError(
            f"a step of {config.max_batch_tokens} rows and {config.max_num_seqs} sequences does not fit into the GPU's "
            f"memory beside the weights: lower max_batch_tokens or max_num_seqs ({attempt.problem})"
        )
    if taken:
        logger.info("memory: a step takes up to %d MiB beside the weights", taken >> 20)
    return taken


@torch.inference_mode()
def try_steps(target: CausalModel, drafts: list[CausalModel], platform: Platform, config: EngineConfig) -> None:
    """Compute the largest chunk of a prompt with each model, and draw in as many rows as may draw, over caches of a
    single block."""
    size = config.block_size
    longest = config.max_model_len or min(model.config.max_position for model in (target, *drafts))
    for model in (*drafts, target):
        caches = kv_cache.allocate(
            model.config, platform.attention, 1, size, platform.cache_dtype, platform.device, model.comm.size
        )
        runner = ModelRunner(model, caches, size, platform.device)
        runner.run(_spans(config.max_batch_tokens, longest, size, lambda length: 1))
    verified = min(1 + max(config.num_draft_tokens, config.suffix_draft_tokens), longest)
    drawn = min(config.max_batch_tokens, config.max_num_seqs * verified)
    spans = _spans(drawn, verified, size, lambda length: length)
    logits = runner.run(spans)
    if target.comm.rank == 0:
        guesses = [Draft((0,) * (span.logit_rows - 1), None, "") for span in spans]
        verifier = make_verifier(config.verification, (), platform.device)
        verifier.verify(logits, [_logit_span(guess, size) for guess in guesses], guesses)


def _spans(rows: int, longest: int, size: int, logit_rows: Callable[[int], int]) -> list[Span]:
    """Spans of `rows` rows in all, each as long as possible; all write to the same block."""
    lengths = [min(longest, rows - start) for start in range(0, rows, longest)]
    return [Span([0] * length, 0, [0] * -(-length // size), logit_rows(length)) for length in lengths]


def _logit_span(draft: Draft, size: int) -> LogitSpan:
    request = Request(id="", prompt_ids=(0,), params=PARAMS)
    sequence = Sequence(request, seed=0, blocks=BlockTable(BlockPool(1, size)))
    return LogitSpan(sequence, draft.tokens, rows=len(draft.tokens) + 1)
