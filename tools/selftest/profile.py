"""Profile: the kernels of a decoding pass, counted, and the slowest of them, by torch's profiler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile

from pilotfish.engine.device import synchronize
from pilotfish.tools.selftest.check import Check, Finding, Skip
from pilotfish.tools.selftest.passes import CONTEXT, TimedModel
from pilotfish.tools.selftest.subject import Subject

SLOWEST = 10
PASSES_OF = (("decode", [1], CONTEXT), ("decode, 64 streams", [1] * 64, CONTEXT), ("prompt", [512], 0))
PASSES = 5


def checks(subject: Subject) -> Iterator[Check]:
    models = [TimedModel(subject, "16 bits")]
    if subject.device.type == "cuda":
        models.append(TimedModel(subject, "fp8", quantization="fp8"))
    for model in models:
        for lengths, start, name in (
            ([1], CONTEXT, "decode"),
            ([1] * 64, CONTEXT, "decode, 64 streams"),
            ([512], 0, "prompt"),
        ):
            compares = "kernels of a pass, of a layer, and the ten that take longest: their microseconds in a pass"
            yield Check(f"{model.name}: {name}", compares, partial(kernels, model, lengths, start), "kernels")


def kernels(model: TimedModel, lengths: list[int], start: int) -> Finding:
    """Count the kernels of a pass."""
    device = model.subject.device
    if device.type != "cuda":
        raise Skip("there are no kernels to count on the CPU")
    spans = model.spans(lengths, start)
    for _ in range(3):
        model.engine.runner.run(spans)
    synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        for _ in range(PASSES):
            model.engine.runner.run(spans)
        synchronize(device)
    counts: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    for event in seen.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith(("Memcpy", "Memset")):
            counts[event.name] += 1
            seconds[event.name] += event.device_time
    total = sum(counts.values()) / PASSES
    layers = model.shape.num_layers
    values = {"a layer": total / layers, "us": sum(seconds.values()) / PASSES}
    slowest = {f"{name[:90]} ({counts[name] / PASSES:.0f}x)": us / PASSES for name, us in seconds.most_common(SLOWEST)}
    return Finding(measured=total, values=values | slowest, detail=f"{total / layers:.1f} kernels a layer")
