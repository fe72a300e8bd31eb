"""How many sequences and rows a step may have where the settings do not say: by device."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotfish.engine.config import EngineConfig, with_step_limits
from pilotfish.tools.planner.devices import DEVICES
from pilotfish.tools.planner.setup import make_setup

SETTING = st.integers(0, 20_000)
MEMORY = st.none() | st.integers(4 * 10**9, 300 * 10**9)


@given(seqs=SETTING, rows=SETTING, memory=MEMORY)
def test_what_is_set_stays_and_the_rest_goes_with_it(seqs: int, rows: int, memory: int | None) -> None:
    if 0 < rows < seqs:
        rows, seqs = seqs, rows
    config = EngineConfig(max_num_seqs=seqs, max_batch_tokens=rows).check()
    limited = with_step_limits(config, memory).check()
    assert limited.max_num_seqs == seqs or (seqs == 0 and limited.max_num_seqs > 0)
    assert limited.max_batch_tokens == rows or (rows == 0 and limited.max_batch_tokens > 0)
    assert limited.max_batch_tokens >= limited.max_num_seqs
    assert with_step_limits(limited, memory) == limited


@pytest.mark.parametrize(
    ("device", "limits"),
    [
        ("cpu", (32, 512)),
        ("l4", (256, 2048)),
        ("rtx4090", (256, 2048)),
        ("a100", (256, 8192)),
        ("l40s", (256, 8192)),
        ("h100", (256, 8192)),
        ("b200", (256, 8192)),
    ],
)
def test_by_device(device: str, limits: tuple[int, int]) -> None:
    card = DEVICES[device] if device != "cpu" else None
    limited = with_step_limits(EngineConfig(), None if card is None else card.memory)
    assert (limited.max_num_seqs, limited.max_batch_tokens) == limits
    if card is not None:  # the planner plans what the engine would do
        settings = make_setup(EngineConfig(model="smollm2-135m"), card).settings
        assert (settings.max_num_seqs, settings.max_batch_tokens) == limits
