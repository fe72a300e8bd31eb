"""The training loop: batches, optimizer, held-out acceptance, checkpoints. It knows no kind of draft."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pilotfish.tools.training.batches import Batch, held_out_batches, training_batches
from pilotfish.tools.training.features import FeatureStore
from pilotfish.tools.training.losses import Objective
from pilotfish.tools.training.student import Student, Tally

CHECKPOINT = "checkpoint.pt"
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopSettings:
    steps: int
    """Optimizer steps of the whole run: the learning rate falls to a tenth over them."""
    batch_tokens: int = 2048
    learning_rate: float = 1e-3
    warm_up: int = 30
    objective: Objective = "lk"
    evaluate_every: int = 100
    held_out: int = 64
    """Conversations that acceptance is measured on."""
    seed: int = 0
    bfloat16: bool = False
    """Matrix products in bfloat16, where the processor or GPU is fast at it; parameters stay float32."""


@dataclass(slots=True)
class Progress:
    """What the loop tells as it goes."""

    step: int
    loss: float
    """Mean of the last ones."""
    rates: list[float] | None = None
    """Held-out acceptance by position, where it has just been measured, and the accepted length."""
    accepted_length: float | None = None


@dataclass(slots=True)
class _State:
    step: int = 0
    epoch: int = 0
    batch: int = 0
    """Batches of the epoch that are done."""
    loss: float = 0.0
    curve: list[dict[str, Any]] = field(default_factory=list)


def train(
    student: Student,
    store: FeatureStore,
    settings: LoopSettings,
    steps_drafted: int,
    folder: Path,
    on_progress: Callable[[Progress], None],
) -> list[dict[str, Any]]:
    """Train to `settings.steps`, from the checkpoint in `folder` if there is one. Returns the learning curve: step,
    loss and held-out acceptance, as they were measured.

    A run that was interrupted goes on to the weights that it would have had: batches and their order depend on the
    settings alone.
    """
    _keep_freed_memory()
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    state = _resume(student, optimizer, folder / CHECKPOINT)
    held_out = held_out_batches(store, settings.batch_tokens, settings.held_out)
    if state.step == 0:
        _evaluate(student, held_out, steps_drafted, state, settings, on_progress)
    for batch in _batches(store, settings, state):
        if state.step >= settings.steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * _schedule(state.step, settings)
        with _precision(settings):
            loss = student.loss(batch, settings.objective)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        state.step += 1
        state.batch += 1
        state.loss = float(loss.detach()) if state.loss == 0.0 else 0.95 * state.loss + 0.05 * float(loss.detach())
        on_progress(Progress(state.step, state.loss))
        if state.step % settings.evaluate_every == 0 or state.step == settings.steps:
            _evaluate(student, held_out, steps_drafted, state, settings, on_progress)
            _save(student, optimizer, state, folder / CHECKPOINT)
    return state.curve


def _keep_freed_memory() -> None:
    """Tell glibc to keep what is freed: tensors of a step's size, given back to the system and asked for again, cost as
    much time in page faults as half of the arithmetic. Elsewhere this does nothing."""
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _batches(store: FeatureStore, settings: LoopSettings, state: _State) -> Iterator[Batch]:
    """Epoch after epoch, from where `state` is."""
    while True:
        empty = True
        for number, batch in enumerate(training_batches(store, state.epoch, settings.seed, settings.batch_tokens)):
            empty = False
            if number >= state.batch:
                yield batch
        if empty:
            raise ValueError("there is no training text: every conversation is held out")
        state.epoch, state.batch = state.epoch + 1, 0


def _schedule(step: int, settings: LoopSettings) -> float:
    """A linear start, then half a cosine down to a tenth."""
    if step < settings.warm_up:
        return (step + 1) / settings.warm_up
    share = (step - settings.warm_up) / max(1, settings.steps - settings.warm_up)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, share)))


def _precision(settings: LoopSettings) -> Any:
    return torch.autocast("cpu", torch.bfloat16) if settings.bfloat16 else nullcontext()


def _evaluate(
    student: Student,
    held_out: list[Batch],
    steps_drafted: int,
    state: _State,
    settings: LoopSettings,
    on_progress: Callable[[Progress], None],
) -> None:
    tally = Tally.empty(steps_drafted)
    with _precision(settings):
        for batch in held_out:
            student.tally(batch, tally)
    rates, length = tally.rates(), tally.accepted_length()
    state.curve.append(
        {"step": state.step, "loss": round(state.loss, 4), "acceptance": [round(rate, 4) for rate in rates]}
    )
    on_progress(Progress(state.step, state.loss, rates, length))


def _save(student: Student, optimizer: torch.optim.Optimizer, state: _State, path: Path) -> None:
    content = {
        "student": student.state_dict(),
        "optimizer": optimizer.state_dict(),
        "state": [state.step, state.epoch, state.batch, state.loss, state.curve],
    }
    partial = path.with_suffix(".partial")
    torch.save(content, partial)
    os.replace(partial, path)


def _resume(student: Student, optimizer: torch.optim.Optimizer, path: Path) -> _State:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        return _State()
    content = torch.load(path, weights_only=True)
    student.load_state_dict(content["student"])
    optimizer.load_state_dict(content["optimizer"])
    return _State(*content["state"])
