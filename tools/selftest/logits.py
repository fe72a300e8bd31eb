"""Checks of whole models, run through the paged cache in prefill chunks, verify spans and decode rows, against one pass
of the reference arithmetic over the same tokens and weights."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from math import sqrt
from typing import Any

import torch

from pilotfish.checkpoints.catalog import ModelFiles
from pilotfish.engine.config import EngineConfig
from pilotfish.engine.device import synchronize
from pilotfish.engine.execution.batch import Span
from pilotfish.engine.execution.loader import load_model
from pilotfish.engine.execution.platform import Platform
from pilotfish.engine.execution.runner import ModelRunner
from pilotfish.engine.kernels.protocol import Kernels
from pilotfish.engine.layers.attention.backend import AttentionBackend
from pilotfish.engine.memory import kv_cache
from pilotfish.engine.memory.free import free_memory
from pilotfish.engine.models.checkpoint import iter_weights
from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.models.decoder_model import DecoderModel
from pilotfish.engine.models.registry import parameter_count, tensors_of
from pilotfish.engine.weights.quantization import Quantization, dequantized, quantized
from pilotfish.tools.selftest import small
from pilotfish.tools.selftest.check import Check, Finding, Skip
from pilotfish.tools.selftest.reference import ReferenceAttention, ReferenceKernels
from pilotfish.tools.selftest.subject import Subject, ignore, release

UNIT = "of the logits' deviation"
CHUNKS = ((0, 37), (37, 64), (64, 69), (69, 70), (70, 79), (79, 80))
"""Positions of the spans that a prompt is computed in: prefill, verification, decoding."""
TOKENS = CHUNKS[-1][1]

BOUNDS = {torch.float32: 1e-4, torch.float16: 0.015, torch.bfloat16: 0.12}
"""Bounds for two layers, by dtype."""
MOST, FP8_BOUND = 0.4, 0.5
WHY = (
    "the same weights, so what differs is the rounding of what passes through the layers: about 15 steps of the dtype "
    "for two layers, more with the root of their number, but no more than 0.4; a wrong kernel, mask or position is off "
    "by about 1"
)
FP8_WHY = (
    "both round activations to fp8, in steps of 1/16 to 1/8, but what is near the edge of a step on one side may fall "
    "to the other; a wrong kernel, mask or scale is off by about 1"
)


def checks(subject: Subject) -> Iterator[Check]:
    compares = f"logits of {TOKENS} tokens on {subject.device} in {subject.dtype_name}, in chunks, with the CPU's"
    why = FP8_WHY if subject.config.quantization == "fp8" else WHY
    for kind in small.KINDS:
        yield Check(f"small {kind} model", compares, partial(_small, subject, kind), UNIT, why)
    if subject.test.own_model:
        why = FP8_WHY if subject.scheme == "fp8" else WHY
        yield Check(subject.config.model, compares, partial(_own, subject), UNIT, why)


def _small(subject: Subject, kind: str) -> Finding:
    folder = subject.small(kind)
    # The platform is the user's model's; small models have a head_dim of 64, and may need another one.
    platform = subject.platform if subject.platform.needs.head_dim == 64 else None
    config = subject.small_config(folder)
    return _compared(str(folder), platform, config, torch.float64, config.quantization == "fp8")


def _own(subject: Subject) -> Finding:
    shape, config = subject.shape, subject.config
    if config.load_format == "dummy":
        raise Skip("load_format is 'dummy', whose weights are other ones on each device")
    if config.tensor_parallel_size > 1:
        raise Skip("the model is sharded: see the group 'parallel'")
    parameters = parameter_count(shape)
    wanted_memory = 4 * parameters + (4 << 30)
    if (free := free_memory(torch.device("cpu"))) < wanted_memory:
        raise Skip(
            f"the reference takes {wanted_memory / 2**30:.0f} GiB of host memory, and {free / 2**30:.0f} are free"
        )
    return _compared(config.model, subject.platform, config, torch.float32, subject.scheme == "fp8")


def _compared(name: str, platform: Platform | None, config: EngineConfig, dtype: torch.dtype, fp8: bool) -> Finding:
    """Compare a model with its reference in `dtype`. platform: None chooses the model's own."""
    model, platform, files = load_model(name, platform, config, TOKENS, ignore)
    shape = model.config
    found = chunked(model, shape, platform).cpu()
    del model
    release()
    wanted = reference(files, shape, platform.dtype, dtype, tokens(shape), fp8)
    errors = gaps(found, wanted)
    same = float((found.argmax(1) == wanted.argmax(1)).double().mean())
    detail = f"largest at token {int(errors.argmax())}; the likeliest token is the same for {same:.0%}"
    bound = FP8_BOUND if fp8 else min(MOST, BOUNDS[platform.dtype] * sqrt(max(2, shape.num_layers) / 2))
    return Finding(measured=float(errors.max()), bound=bound, detail=detail)


def tokens(shape: ModelConfig) -> list[int]:
    generator = torch.Generator().manual_seed(11)
    ids: list[int] = torch.randint(shape.vocab_size, (TOKENS,), generator=generator).tolist()
    return ids


def chunked(model: Any, shape: ModelConfig, platform: Platform) -> torch.Tensor:
    """Return the logits of all tokens, (TOKENS, vocab_size), computed chunk by chunk, with blocks in random order."""
    size = platform.block_size
    count = -(-TOKENS // size)
    caches = kv_cache.allocate(shape, platform.attention, count + 2, size, platform.cache_dtype, platform.device)
    runner = ModelRunner(model, caches, size, platform.device)
    blocks = torch.randperm(count + 2, generator=torch.Generator().manual_seed(3)).tolist()[:count]
    ids = tokens(shape)
    parts = [runner.run([Span(ids[a:b], a, blocks, logit_rows=b - a)]).clone() for a, b in CHUNKS]
    synchronize(platform.device)
    return torch.cat(parts)


def reference(
    files: ModelFiles, shape: ModelConfig, rounded: torch.dtype, dtype: torch.dtype, ids: list[int], fp8: bool
) -> torch.Tensor:
    """Return logits, (tokens, vocab_size) in `dtype` on the CPU, of the model with its weights rounded to `rounded`.

    fp8: the layers' matrices, and what they are multiplied by, are rounded to fp8.
    """
    cpu, count = torch.device("cpu"), len(ids)
    kernels: Kernels[Any] = ReferenceKernels(dtype)
    attention: AttentionBackend = ReferenceAttention()
    weights = iter_weights(files, shape, rounded)
    if fp8:
        quantization = shape.quantization or Quantization("fp8")
        weights = quantized(weights, tensors_of(shape), quantization, cpu)
    elif shape.quantization is not None:
        weights = dequantized(weights, rounded)
    model = DecoderModel(shape, kernels, attention, weights, count, cpu)
    size = -(-count // 16) * 16
    runner = ModelRunner(model, kv_cache.allocate(shape, attention, 1, size, dtype, cpu), size, cpu)
    return runner.run([Span(ids, 0, [0], logit_rows=count)])


def gaps(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return each row's root mean square of the logits' differences, (rows,) float64, in standard deviations of all."""
    wanted = wanted.cpu().double()
    return (found.cpu().double() - wanted).square().mean(1).sqrt() / wanted.std()
