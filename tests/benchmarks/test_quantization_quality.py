"""The base file and the figures of `benchmarks/quantization_quality.py`, without a model."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.paths import ROOT

CONTEXT, VOCABULARY, CHUNKS = 16, 101, 3


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("quantization_quality")


class _Model:
    """Random logits for each chunk, the same for the same settings; `config` is how much they are moved."""

    vocab_size = VOCABULARY

    def __init__(self, config: Any) -> None:
        self._moved = float(config)

    def judged_logits(self, chunk: np.ndarray) -> torch.Tensor:
        noise = torch.Generator().manual_seed(int(chunk[0]))
        shape = (CONTEXT - 1 - CONTEXT // 2, VOCABULARY)
        logits = 2 * torch.randn(shape, generator=noise)
        logits[:, 0] -= 30  # less likely than a base can say
        return logits + self._moved * torch.randn(shape, generator=noise)

    def close(self) -> None:
        pass


def test_the_base_and_what_is_measured_against_it(
    program: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(program, "Model", _Model)
    path = tmp_path / "base"
    chunks = np.arange(CHUNKS * CONTEXT, dtype=np.int32).reshape(CHUNKS, CONTEXT)
    program.write_base(path, 0.0, chunks)
    base = program.read_base(path)
    assert (base.context, base.vocab_size) == (CONTEXT, VOCABULARY)
    assert (base.chunks == chunks).all()

    wanted = [_Model(0.0).judged_logits(chunk).log_softmax(1) for chunk in chunks]
    found = [_Model(0.5).judged_logits(chunk).log_softmax(1) for chunk in chunks]
    for kept, exact in zip(base.log_probabilities(), wanted, strict=True):
        likely = exact > exact.max(1, keepdim=True).values - program.RANGE
        assert (kept - exact)[likely].abs().max() < program.RANGE / 65535
    same = program.measure("same", 0.0, base)
    assert abs(same.mean_kl) < 1e-5
    assert same.same_top == 1
    assert same.perplexity == pytest.approx(same.base_perplexity, rel=1e-4)

    moved = program.measure("moved", 0.5, base)
    p, q = torch.cat(wanted), torch.cat(found)
    assert moved.tokens == CHUNKS * (CONTEXT - 1 - CONTEXT // 2)
    assert moved.mean_kl == pytest.approx((p.exp() * (p - q)).sum(1).mean().item(), rel=1e-3)
    assert moved.same_top == pytest.approx((p.argmax(1) == q.argmax(1)).double().mean().item())
    ids = torch.from_numpy(chunks[:, CONTEXT // 2 + 1 :].astype(np.int64)).reshape(-1, 1)
    assert moved.perplexity == pytest.approx(q.gather(1, ids).mean().neg().exp().item(), rel=1e-4)

    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(SystemExit, match="remove it"):
        program.read_base(path)
