"""Predicted seconds: the roofline's properties, figures worked out by hand, and what drafting makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pilotfish.errors import ConfigError
from pilotfish.tools.planner.devices import DEVICES, Device, find_device
from pilotfish.tools.planner.plan import VANILLA, acceptance_at, make_plan, predict
from pilotfish.tools.planner.roofline import all_reduce_seconds, step_seconds
from pilotfish.tools.planner.setup import Setup
from pilotfish.tools.planner.speculation import acceptance_for, expected_tokens

SetupOf = Callable[..., Setup]
FIXTURE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=60)
IMPROVED = ("bandwidth", "link_bandwidth", "bandwidth_share", "flops_share", "link_share")
WORSENED = ("link_latency", "kernel_seconds", "step_seconds", "sequence_seconds")


def total(setup: Setup, rows: int = 1, sequences: int = 1, context: int = 1024) -> float:
    return step_seconds(setup.target, setup.device, setup.ranks, rows, sequences, context).total


def changed(setup: Setup, **fields: float) -> Setup:
    return replace(setup, device=msgspec.structs.replace(setup.device, **fields))


@given(
    gpu=st.sampled_from(sorted(DEVICES)),
    name=st.sampled_from(IMPROVED + WORSENED),
    rows=st.integers(1, 512),
    context=st.integers(1, 100_000),
    factor=st.floats(1.01, 1.25),
)
@FIXTURE
def test_a_better_device_is_never_slower(
    setup_of: SetupOf, gpu: str, name: str, rows: int, context: int, factor: float
) -> None:
    setup = setup_of(gpu, 4)
    better = getattr(setup.device, name) * (factor if name in IMPROVED else 1 / factor)
    assert total(changed(setup, **{name: better}), rows, 1, context) <= total(setup, rows, 1, context)


@given(rows=st.integers(1, 1000), sequences=st.integers(1, 64), context=st.integers(1, 50_000))
@FIXTURE
def test_more_work_never_takes_less_time(setup_of: SetupOf, rows: int, sequences: int, context: int) -> None:
    setup = setup_of()
    rows = max(rows, sequences)
    now = total(setup, rows, sequences, context)
    assert now <= total(setup, rows + 1, sequences, context)
    assert now <= total(setup, rows + 1, sequences + 1, context)
    assert now <= total(setup, rows, sequences, context + 1)


def test_the_parts_are_the_whole(setup_of: SetupOf) -> None:
    step = step_seconds(setup_of().target, DEVICES["h100"], 4, 8, 8, 1000)
    parts = (step.weights, step.attention, step.all_reduce, step.rows, step.kernels, step.engine)
    assert step.total == pytest.approx(sum(parts))
    assert min(parts) > 0


def test_a_step_worked_out_by_hand(setup_of: SetupOf) -> None:
    """One row on 4 H100s: every matrix is read once, at 0.8 of 3.35 TB/s; the embedding is only looked up."""
    setup = setup_of(ranks=4)
    step = step_seconds(setup.target, setup.device, 4, 1, 1, 1000)
    read = 2 * (70_553_706_496 - 128_256 * 8192 - (2 * 80 + 1) * 8192) / 4
    assert step.weights == pytest.approx(read / (0.8 * 3.35e12), rel=1e-6)
    assert step.attention == pytest.approx(1000 * 327_680 / 4 / (0.8 * 3.35e12), rel=1e-6)
    message = 4 * 2e-6 + 1.5 * 8192 * 2 / (0.8 * 450e9)
    logits = 4 * 2e-6 + 1.5 * 128_256 * 2 / (0.8 * 450e9)
    assert step.all_reduce == pytest.approx(161 * message + logits, rel=1e-6)
    many = step_seconds(setup.target, setup.device, 4, 4096, 4096, 1, logit_rows=1)
    layers = 2 * 4096 * 80 * 8192 * (2 * 8192 + 2 * 1024 + 3 * 28672) / 4
    assert many.weights == pytest.approx(layers / (0.7 * 989e12), rel=0.01)  # by arithmetic now


def test_one_gpu_needs_no_all_reduce_and_fp8_halves_the_reading(setup_of: SetupOf) -> None:
    assert all_reduce_seconds(DEVICES["h100"], 1, 1e9) == 0
    plain, fp8 = (setup_of("b200", 1, quantization=kind) for kind in ("none", "fp8"))
    seconds = [step_seconds(setup.target, setup.device, 1, 1, 1, 1).weights for setup in (plain, fp8)]
    assert seconds[1] == pytest.approx(seconds[0] / 2, rel=0.05)  # the head stays


def test_measured_rates_are_met_where_they_were_measured() -> None:
    device = Device(
        name="x", source="", memory=1, bandwidth=1e9, flops={"float32": 1.0}, flops_by_rows={1: 1e9, 4: 3e9, 8: 4e9}
    )
    assert [device.rate("float32", rows) for rows in (1, 4, 8, 100)] == pytest.approx([1e9, 3e9, 4e9, 4e9])
    seconds = [rows / device.rate("float32", rows) for rows in range(1, 40)]
    assert seconds == sorted(seconds)
    assert seconds[5] == pytest.approx((seconds[3] + seconds[7]) / 2)


@given(acceptance=st.floats(0, 1), length=st.integers(0, 32))
def test_expected_tokens_are_the_papers_formula(acceptance: float, length: int) -> None:
    expected = expected_tokens(acceptance, length)
    if acceptance < 0.999:
        assert expected == pytest.approx((1 - acceptance ** (length + 1)) / (1 - acceptance), rel=1e-9)
    assert 1 <= expected <= length + 1 + 1e-9
    assert expected_tokens(1.0, length) == length + 1
    assert expected_tokens(0.0, length) == 1


def test_expected_tokens_are_what_chance_gives() -> None:
    """Against the definition: walk along the draft until a token is rejected."""
    import random

    random.seed(0)
    runs = 40_000
    tokens = 0
    for _ in range(runs):
        tokens += 1
        for _ in range(4):
            if random.random() >= 0.7:
                break
            tokens += 1
    assert tokens / runs == pytest.approx(expected_tokens(0.7, 4), abs=0.03)


@given(acceptance=st.floats(0.001, 0.999), length=st.integers(1, 16))
def test_the_acceptance_for_a_number_of_tokens_gives_it_back(acceptance: float, length: int) -> None:
    found = acceptance_for(expected_tokens(acceptance, length), length)
    assert found == pytest.approx(acceptance, abs=1e-6)
    assert acceptance_for(length + 1.01, length) is None
    assert acceptance_for(0.99, length) is None


def test_nothing_accepted_is_slower_than_vanilla_and_break_even_is_vanilla(setup_of: SetupOf) -> None:
    setup = setup_of()
    for draft in setup.drafts:
        for batch in (1, 32):
            for length in (1, 4, 8):
                assert predict(setup, draft, batch, 1000, length, 0.0).speedup < 1
                even = acceptance_at(setup, draft, batch, 1000, length, 1.0)
                if even is None:
                    assert predict(setup, draft, batch, 1000, length, 1.0).speedup < 1
                else:
                    assert predict(setup, draft, batch, 1000, length, even).speedup == pytest.approx(1, rel=1e-3)


def test_a_plan_has_every_combination_and_vanilla_once_for_each_batch(setup_of: SetupOf) -> None:
    setup = setup_of()
    plan = make_plan(setup, 2048, [1, 8], [2, 4], {"8b": 0.9})
    found = [(each.drafter, each.batch, each.draft_length) for each in plan.predictions]
    drafted = [(name, batch, k) for batch in (1, 8) for name in ("ngram", "8b", "1b") for k in (2, 4)]
    assert sorted(found) == sorted([(VANILLA, 1, 0), (VANILLA, 8, 0), *drafted])
    assert {each.acceptance for each in plan.predictions if each.drafter == "8b"} == {0.9}
    assert {each.acceptance for each in plan.predictions if each.drafter == "1b"} == {0.7}
    for each in plan.predictions:
        vanilla = plan.best(VANILLA, each.batch)
        assert each.speedup == pytest.approx(each.tokens_per_second / vanilla.tokens_per_second)
    narrow = make_plan(setup_of(max_batch_tokens=32), 2048, [1, 8], [2, 4], {})
    assert {each.draft_length for each in narrow.predictions if each.batch == 8} == {0, 2}
    with pytest.raises(ConfigError, match="batch is 512, but max_num_seqs is 256"):
        make_plan(setup, 2048, [512], [2], {})
    with pytest.raises(ConfigError, match="draft_lengths has 9, but num_draft_tokens is 8"):
        make_plan(setup, 2048, [1], [9], {})
    with pytest.raises(ConfigError, match="acceptance is given for '3b', but the drafters are: 'ngram', '8b', '1b'"):
        make_plan(setup, 2048, [1], [2], {"3b": 0.9})
    with pytest.raises(ConfigError, match="context is 200000, but a request may have 131072 tokens"):
        make_plan(setup, 200_000, [1], [2], {})


def test_the_published_figure_of_70b_is_that_of_four_h100s(setup_of: SetupOf) -> None:
    """60 tokens per second were published, without the hardware; four H100s are what the roofline says it takes."""
    speeds = {ranks: 1 / total(setup_of(ranks=ranks), context=512) for ranks in (2, 4, 8)}
    assert speeds[4] == pytest.approx(60, rel=0.1)
    assert speeds[2] < 45
    assert speeds[8] > 80


def test_devices_come_from_files_too(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    content = msgspec.to_builtins(DEVICES["h100"]) | {"name": "mine", "bandwidth": 1e12}
    path.write_text(json.dumps(content))
    assert find_device(str(path)).bandwidth == 1e12
    assert find_device("H200") is DEVICES["h200"]
    assert find_device("cpu").threads > 0
    for change, message in (
        ({"bandwidth": "fast"}, "Expected `float`"),
        ({"bandwith": 1.0}, "unknown field `bandwith`"),
        ({"memory": 0}, "memory is 0, but must be above 0"),
        ({"flops_share": 1.5}, r"flops_share is 1.5, but must be in \(0, 1\]"),
        ({"flops": {}}, "flops must have a rate above 0"),
    ):
        path.write_text(json.dumps(content | change))
        with pytest.raises(ConfigError, match=message):
            find_device(str(path))
    with pytest.raises(ConfigError, match="cannot read the device in"):
        find_device(str(tmp_path / "none.json"))
    with pytest.raises(ConfigError, match="b200, h200, h100, a100, l40s, l4, rtx4090, cpu"):
        find_device("abacus")


def test_an_activation_within_its_product_is_no_kernel(setup_of: SetupOf) -> None:
    """On Hopper, in passes of few rows: a kernel less for each layer."""
    setup = setup_of("h200")
    plain = changed(setup, gated_products=False)
    for rows, less in ((1, 1), (64, 1), (65, 0)):
        saved = total(plain, rows) - total(setup, rows)
        expected = less * setup.target.shape.num_layers * setup.device.kernel_seconds
        assert saved == pytest.approx(expected, rel=1e-6, abs=1e-12)
