"""The training loop of both kinds of draft: batches, optimizer, held-out acceptance, checkpoints."""

from __future__ import annotations

import ctypes
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pilotfish.tools.training.batches import Batch, held_out_batches, training_batches
from pilotfish.tools.training.features import FeatureStore
from pilotfish.tools.training.settings import TrainSettings, objective_of
from pilotfish.tools.training.student import Student, Tally

CHECKPOINT = "checkpoint.safetensors"
WARM_UP = 30
"""Steps over which the learning rate rises."""
HELD_OUT = 64
"""Conversations that acceptance is measured on."""
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


@dataclass(slots=True)
class TrainingProgress:
    """The loop's report after a step."""

    step: int
    loss: float
    """Running mean of the loss."""
    rates: list[float] | None = None
    """Held-out acceptance by position, and the accepted length, where they have just been measured."""
    accepted_length: float | None = None


@dataclass(slots=True)
class _State:
    step: int = 0
    epoch: int = 0
    batch: int = 0
    """Batches of the epoch that have been used."""
    loss: float = 0.0
    curve: list[dict[str, Any]] = field(default_factory=list)


def train(
    student: Student,
    store: FeatureStore,
    settings: TrainSettings,
    steps: int,
    folder: Path,
    on_progress: Callable[[TrainingProgress], object],
) -> list[dict[str, Any]]:
    """Train to `steps` optimizer steps, from the checkpoint in `folder` if there is one. Returns the learning curve:
    step, loss and held-out acceptance wherever they were measured.

    An interrupted run arrives at the weights that it would have had, because batches depend on the settings alone.
    """
    _keep_freed_memory()
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    state = _resume(student, optimizer, folder / CHECKPOINT)
    held_out = held_out_batches(store, settings.batch_tokens, HELD_OUT)

    def evaluate() -> None:
        tally = Tally.empty(student.steps)
        with _precision(settings):
            for batch in held_out:
                student.tally(batch, tally)
        rates = tally.rates()
        acceptance = [round(rate, 4) for rate in rates]
        state.curve.append({"step": state.step, "loss": round(state.loss, 4), "acceptance": acceptance})
        on_progress(TrainingProgress(state.step, state.loss, rates, tally.accepted_length()))

    if state.step == 0:
        evaluate()
    every = max(10, min(200, steps // 10))
    for batch in _batches(store, settings, state):
        if state.step >= steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * _schedule(state.step, steps)
        with _precision(settings):
            loss = student.loss(batch, objective_of(settings))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        state.step += 1
        state.batch += 1
        state.loss = float(loss.detach()) if state.loss == 0.0 else 0.95 * state.loss + 0.05 * float(loss.detach())
        on_progress(TrainingProgress(state.step, state.loss))
        if state.step % every == 0 or state.step == steps:
            evaluate()
            _save(student, optimizer, state, folder / CHECKPOINT)
    return state.curve


def _keep_freed_memory() -> None:
    """Make glibc keep freed memory: returning a step's tensors to the system and requesting them again takes half as
    long, in page faults, as the arithmetic. Without glibc this does nothing."""
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _batches(store: FeatureStore, settings: TrainSettings, state: _State) -> Iterator[Batch]:
    """Yield batches from where `state` is, epoch after epoch."""
    while True:
        empty = True
        for number, batch in enumerate(training_batches(store, state.epoch, settings.seed, settings.batch_tokens)):
            empty = False
            if number >= state.batch:
                yield batch
        if empty:
            raise ValueError("there is no training text: every conversation is held out")
        state.epoch, state.batch = state.epoch + 1, 0


def _schedule(step: int, steps: int) -> float:
    """Return the learning rate's factor: linear warm-up, then a cosine decay to a tenth."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    share = (step - WARM_UP) / max(1, steps - WARM_UP)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, share)))


def _precision(settings: TrainSettings) -> Any:
    return torch.autocast("cpu", torch.bfloat16) if settings.bfloat16 else nullcontext()


def _save(student: Student, optimizer: torch.optim.Optimizer, state: _State, path: Path) -> None:
    found = optimizer.state_dict()
    tensors = {f"student.{name}": each for name, each in student.state_dict().items()}
    for number, values in found["state"].items():
        tensors |= {f"optimizer.{number}.{name}": each for name, each in values.items()}
    about = {
        "groups": found["param_groups"],
        "state": [state.step, state.epoch, state.batch, state.loss, state.curve],
    }
    partial = path.with_suffix(".partial")
    save_file({name: each.contiguous() for name, each in tensors.items()}, partial, {"about": json.dumps(about)})
    os.replace(partial, path)


def _resume(student: Student, optimizer: torch.optim.Optimizer, path: Path) -> _State:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        return _State()
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["about"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    weights, states = {}, dict[int, dict[str, torch.Tensor]]()
    for name, each in tensors.items():
        owner, _, rest = name.partition(".")
        if owner == "student":
            weights[rest] = each
        else:
            number, _, key = rest.partition(".")
            states.setdefault(int(number), {})[key] = each
    student.load_state_dict(weights)
    optimizer.load_state_dict({"state": states, "param_groups": about["groups"]})
    return _State(*about["state"])
