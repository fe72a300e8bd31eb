"""The files in configs/: each can be planned, divides, and fits on the GPUs that it says it is for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pilotfish.engine.config import EngineConfig
from pilotfish.engine.models.layout import what_does_not_divide
from pilotfish.engine.models.registry import expected_shapes
from pilotfish.server.cli.plan import planned_config
from pilotfish.server.cli.settings import load, read_yaml
from pilotfish.tools.planner.devices import find_device
from pilotfish.tools.planner.heads import PlannedHead
from pilotfish.tools.planner.memory import fits, plan_memory
from pilotfish.tools.planner.models import PlannedModel, rank_shapes
from pilotfish.tools.planner.setup import Setup, make_setup
from tests.support.paths import ROOT

CONFIGS = ROOT / "configs"
MEANT_FOR = {  # the GPU and the tensor-parallel degrees that each file's comments name
    "smollm2-135m": [("cpu", 1)],
    "llama-3.1-8b": [(gpu, 1) for gpu in ("l4", "rtx4090", "l40s", "a100", "h100", "h200", "b200")],
    "llama-3.1-70b": [("h100", 4), ("h100", 8), ("a100", 4), ("a100", 8)],
    "llama-3.1-405b-fp8": [("h100", 8), ("h200", 8), ("b200", 8)],
}


def read(name: str, ranks: int | None = None) -> EngineConfig:
    flags = {} if ranks is None else {"tensor_parallel_size": ranks}
    return planned_config({"config": str(CONFIGS / f"{name}.yaml"), **flags})


def setups(name: str) -> Iterator[Setup]:
    for gpu, ranks in MEANT_FOR[name]:
        yield make_setup(read(name, ranks), find_device(gpu))


def models(setup: Setup) -> list[PlannedModel | PlannedHead]:
    return [setup.target, *setup.draft_models]


def test_every_config_is_checked() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == MEANT_FOR.keys()


@pytest.mark.parametrize("name", MEANT_FOR)
def test_every_tensor_divides(name: str) -> None:
    for setup in setups(name):
        assert what_does_not_divide(setup.target.shape, setup.ranks) == []
        whole, parts = expected_shapes(setup.target.shape), rank_shapes(setup.target.shape, setup.ranks)
        for tensor, size in whole.items():
            for full, part in zip(size, parts[tensor], strict=True):
                assert part in (full, full // setup.ranks)
                assert full % part == 0
        for draft in setup.draft_models:  # those can be sharded, too
            assert what_does_not_divide(draft.shape, setup.ranks) == []


@pytest.mark.parametrize("name", MEANT_FOR)
def test_it_fits_with_a_request_of_the_longest_length_that_is_allowed(name: str) -> None:
    for setup in setups(name):
        memory = plan_memory(setup)
        assert fits(memory, setup), (setup.device.name, setup.ranks, memory)
        wanted = setup.settings.max_model_len or setup.target.shape.max_position
        assert memory.cached_tokens >= wanted, (setup.device.name, setup.ranks)


@pytest.mark.parametrize("name", MEANT_FOR)
def test_drafts_speak_the_targets_vocabulary_and_come_as_the_files_say(name: str) -> None:
    settings = read(name)
    setup = make_setup(settings, find_device(MEANT_FOR[name][0][0]))
    assert len({model.shape.vocab_size for model in models(setup)}) == 1
    assert settings.tensor_parallel_size == {"llama-3.1-70b": 4, "llama-3.1-405b-fp8": 8}.get(name, 1)
    drafts = {draft.name for draft in setup.drafts if draft.model is not None}
    wanted = {"llama-3.1-70b": {"8b", "1b"}, "llama-3.1-405b-fp8": {"8b", "1b"}, "llama-3.1-8b": {"1b"}}
    assert drafts == wanted.get(name, set())


def test_both_drafts_of_the_70b_do_not_fit_on_two_cards_as_its_comment_says() -> None:
    setup = make_setup(read("llama-3.1-70b", 2), find_device("h100"))
    assert not fits(plan_memory(setup), setup)


@pytest.mark.parametrize("name", MEANT_FOR)
def test_serve_takes_what_is_planned(name: str) -> None:
    content = read_yaml(str(CONFIGS / f"{name}.yaml"), (EngineConfig,))
    assert load(EngineConfig, content).check().tensor_parallel_size == read(name).tensor_parallel_size
