"""The registry: one line and one file make a drafter that can be served, and nothing else has to know of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pilotfish.checkpoints.catalog import ModelFiles
from pilotfish.engine.config import EngineConfig
from pilotfish.engine.llm import LLM
from pilotfish.engine.params import SamplingParams
from pilotfish.engine.speculation.drafters import registry
from pilotfish.engine.speculation.drafters.registry import REGISTRY, DrafterKind
from pilotfish.errors import ConfigError
from pilotfish.tools.planner.devices import DEVICES
from pilotfish.tools.planner.setup import make_setup
from tests.support import toy_head as toy_head_files
from tests.support.texts import stats_of

PROMPTS = [[5, 6, 7, 8] * 5, [9, 9, 9, 9, 9], list(range(20, 60))]
PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True),
    SamplingParams(temperature=0.9, seed=3, frequency_penalty=0.4, max_tokens=24, ignore_eos=True),
]


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry with one line more."""
    line = DrafterKind("toy", prior=0.2, module="tests.support.toy_drafter")
    monkeypatch.setattr(registry, "REGISTRY", (*REGISTRY, line))


@pytest.fixture
def toy_head(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder of the files of a model-based drafter, which the registry knows by one line more."""
    line = DrafterKind("toy-head", prior=0.2, module="tests.support.toy_head", recognise=toy_head_files.recognise)
    monkeypatch.setattr(registry, "REGISTRY", (line, *REGISTRY))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "toy.json").write_text('{"token": 9}')
    return tmp_path


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("adaptive", [False, True])
def test_a_new_drafter_is_one_file_and_one_line(tiny: Callable[[str], Path], adaptive: bool) -> None:
    settings: dict[str, Any] = {"model": str(tiny("llama")), "kv_cache_memory": 4 << 20, "adaptive_drafts": adaptive}
    with LLM(drafter=("toy", "suffix"), **settings) as llm:
        assert llm.info.drafters == ("toy", "suffix", "prediction", "grammar")
        for params in PARAMS:
            plain = llm.generate(PROMPTS, params, speculation="off")
            drafted = llm.generate(PROMPTS, params, speculation="toy")
            assert [each.token_ids for each in drafted] == [each.token_ids for each in plain]
            if not adaptive:
                assert all(stats_of(each).drafter == "toy" and stats_of(each).drafted_tokens for each in drafted)
        controller = llm.core.engine.speculator._controller
        assert controller is None or controller.acceptance.priors["toy"] == 0.2


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_new_model_based_drafter_is_one_file_and_one_line(
    tiny: Callable[[str], Path], toy_head: Path, adaptive: bool
) -> None:
    settings: dict[str, Any] = {"model": str(tiny("llama")), "kv_cache_memory": 4 << 20, "adaptive_drafts": adaptive}
    with LLM(drafter=("ngram", f"mine={toy_head}"), **settings) as llm:
        assert llm.info.drafters == ("ngram", "prediction", "grammar", "mine")
        for params in PARAMS:
            plain = llm.generate(PROMPTS, params, speculation="off")
            drafted = llm.generate(PROMPTS, params, speculation="mine")
            assert [each.token_ids for each in drafted] == [each.token_ids for each in plain]
            if not adaptive:
                assert all(stats_of(each).drafter == "mine" and stats_of(each).drafted_tokens for each in drafted)


@pytest.mark.usefixtures("toy")
def test_names_derive_from_the_registry() -> None:
    assert registry.default_entries("another") == ("ngram", "suffix", "suffix-memory", "toy")
    assert registry.default_entries("smollm2-135m", memory=False)[:3] == ("ngram", "suffix", "toy")
    with pytest.raises(ConfigError, match="cannot be called 'toy'"):
        registry.parse_entries(["toy=some/model"])
    with pytest.raises(ConfigError, match="'toy' keeps its name"):
        registry.parse_entries(["other=toy"])
    with pytest.raises(ConfigError, match="give it 'ngram', 'suffix', 'suffix-memory', 'toy' or a model"):
        registry.parse_entries([""])
    sources = registry.find(["toy", "ngram"], "another")
    assert [source.name for source in sources] == ["toy", "ngram", "prediction", "grammar"]
    registry.check_speculation("toy", sources)
    with pytest.raises(ConfigError, match="'auto', 'none', 'toy', 'ngram', 'prediction'"):
        registry.check_speculation("suffix", sources)


@pytest.mark.parametrize("kind", REGISTRY, ids=lambda kind: kind.name)
def test_every_line_has_its_module(kind: DrafterKind) -> None:
    module = kind.implementation()
    assert hasattr(module, "load" if kind.needs_files else "make")


def test_files_are_recognised(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLMEagle3"]}))
    assert registry.kind_of(ModelFiles("head", "huggingface", tmp_path)).name == "eagle3"
    assert registry.kind_of(ModelFiles("draft", "huggingface", tiny("llama"))).name == "draft-model"
    assert registry.kind_of(ModelFiles("draft", "gguf", tmp_path / "model.gguf")).name == "draft-model"
    assert registry.find([f"mine={tmp_path}"], "another")[0].kind.name == "eagle3"


def test_the_registry_is_read_without_torch() -> None:
    program = "import sys, pilotfish.engine.speculation.drafters.registry as r; r.parse_entries(['ngram']); "
    program += "sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.usefixtures("toy")
def test_the_planner_knows_a_new_drafter(tiny: Callable[[str], Path]) -> None:
    settings = EngineConfig(model=str(tiny("llama")), drafter=("toy",))
    (draft,) = make_setup(settings, DEVICES["h100"]).drafts
    assert (draft.name, draft.kind) == ("toy", "lookup")
